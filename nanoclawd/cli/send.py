"""One message to an agent, for scripts and pipes."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
import uuid
from argparse import Namespace
from math import inf

from nanoclawd import limits
from nanoclawd.cli import output
from nanoclawd.cli.conversation import Activity, Attachment, Conversation, Delivery, check_text
from nanoclawd.cli.parser import UsageError
from nanoclawd.cli.screen import Screen
from nanoclawd.errors import Failed, NanoclawError, Refused

STORE_S = 30.0  #: without --wait: for the message to be stored


def send(options: Namespace) -> int:
    """Send; with --wait print the reply too, and return 1 if it is a notice about a failure."""
    with contextlib.ExitStack() as files:
        attached = [files.enter_context(Attachment(path)) for path in options.file or ()]
        message = "" if attached and options.TEXT is None else check_text(_read_text(options.TEXT))
        return _send(options, message, attached)


def _send(options: Namespace, message: str, files: list[Attachment]) -> int:
    event = str(uuid.uuid4())
    screen = Screen(sys.stderr, preview=False)
    conversation = Conversation(options.AGENT, options.chat, screen)
    conversation.until = time.monotonic() + (STORE_S if not options.wait else options.timeout or inf)
    conversation.connect(event, conversation.inbox.put if options.wait else None)
    replies: list[Delivery] = []
    try:
        stored = conversation.deliver(message, event, files)
        if options.wait:
            replies = _wait(conversation, event, screen, quiet=options.json)
    except TimeoutError:
        hint = f"it is not lost: the reply will be in '{_chat_command(options)}'"
        raise Failed(f"no reply within {options.timeout} s", hint=hint) from None
    except KeyboardInterrupt:
        output.talk(f"If it was sent, the reply will be in '{_chat_command(options)}'.")
        raise
    if options.wait and not replies:
        hint = f"see 'nanoclawctl logs {options.AGENT}'"
        raise Failed("the agent ended its work without a reply", hint=hint)
    if options.json:
        shown = [{"kind": reply.kind, "text": reply.text, "key": reply.key} for reply in replies]
        output.say_json({"message": stored or None, "event": event, "replies": shown})
        _report(conversation, replies)
    elif not options.wait:
        output.say(stored or "It is a command; the router's answer is in the chat.")
    return 1 if stored and replies and all(reply.kind == "notice" for reply in replies) else 0


def _wait(conversation: Conversation, event: str, screen: Screen, *, quiet: bool) -> list[Delivery]:
    """Return the replies; unless `quiet` they are printed as they come. What goes on is a line on stderr."""
    replies: dict[str, Delivery] = {}
    screen.begin("sent")
    try:
        for item in conversation.follow(event):
            match item:
                case Delivery():
                    if item.key not in replies and not quiet:
                        screen.erase()
                        output.say(item.text.rstrip("\n"))
                        _report(conversation, [item])
                    replies[item.key] = item
                case Activity(kind="queued", text=reason) if reason:
                    screen.erase()
                    output.talk(reason)
                case Activity(kind=kind, text=words) if kind not in ("text", "idle"):
                    screen.set_status(f"{kind} {words}")
                case NanoclawError():
                    raise item
    finally:
        screen.end()
    return list(replies.values())


def _report(conversation: Conversation, replies: list[Delivery]) -> None:
    sys.stdout.flush()  # only what is printed is reported
    for reply in replies:
        conversation.report(reply.key)


def _chat_command(options: Namespace) -> str:
    chat = ["--chat", options.chat] if options.chat else []
    return shlex.join(["nanoclawctl", "chat", options.AGENT, *chat])


def _read_text(argument: str | None) -> str:
    if argument is not None and argument != "-":
        message = argument
    elif argument is None and sys.stdin.isatty():
        raise UsageError("there is no text to send", hint="add it, pipe it, or use 'nanoclawctl chat'")
    else:
        data = sys.stdin.buffer.read(limits.TEXT_BYTES + 2)
        # Cut in the middle of a character it is too long, and check_text() says so.
        errors = "replace" if len(data) > limits.TEXT_BYTES else "strict"
        try:
            message = data.decode(errors=errors).removesuffix("\n")
        except UnicodeDecodeError as exc:
            raise Refused(f"the message is not UTF-8 at byte {exc.start}") from None
    if not message.strip():
        raise UsageError("there is no text to send")
    return message
