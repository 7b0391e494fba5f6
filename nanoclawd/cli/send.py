"""One message to an agent, for scripts and pipes."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
import uuid
from argparse import Namespace
from queue import Empty

from nanoclawd import limits
from nanoclawd.cli import control, output
from nanoclawd.cli.conversation import (
    Activity,
    Attachment,
    Broken,
    Calls,
    Delivery,
    Inbox,
    Turn,
    chat_id,
    check_text,
)
from nanoclawd.cli.parser import UsageError
from nanoclawd.cli.screen import Screen
from nanoclawd.cli.shown import Shown, shown_file
from nanoclawd.errors import Failed, NanoclawError, Refused

STORE_S = 30.0  #: without --wait: for the message to be stored
ASK_S = 2.0  #: for the reason of a delay, which nobody waits for


def run(options: Namespace) -> int:
    """Send; with --wait print the reply too, and return 1 if it is a notice about a failure."""
    message = check_text(_read_text(options.TEXT))
    chat = chat_id(options.AGENT, options.chat)
    event = str(uuid.uuid4())
    inbox: Inbox = Inbox()
    until = time.monotonic() + (STORE_S if not options.wait else options.timeout or float("inf"))
    if options.wait:
        # Before the connection that the message takes, so that nothing that is said about it is missed.
        Attachment(chat, event=event, put=inbox.put)
    calls = Calls(chat, options.AGENT)
    waiting = _Wait(options, Turn(event), inbox, calls)
    try:
        with control.suggesting(options.AGENT):
            stored = calls.deliver(message, event, until=until)
        replies = waiting.run(until) if options.wait else []
    except KeyboardInterrupt:
        waiting.screen.end()
        output.talk(f"If it was sent, the reply will be in '{waiting.chat_command}'.")
        raise
    if not options.wait and not options.json:
        output.say(stored)
    if options.wait and not replies:
        raise Failed(
            "the agent ended its work without a reply", hint=f"see 'nanoclawctl logs {options.AGENT}'"
        )
    if options.json:
        shown = [{"kind": reply.kind, "text": reply.text, "key": reply.key} for reply in replies]
        output.say_json({"message": stored, "event": event, "replies": shown})
        waiting.report(replies)
    return 1 if replies and all(reply.kind == "notice" for reply in replies) else 0


class _Wait:
    """Waits for the reply: text on stdout as it comes, what goes on in one line on stderr."""

    def __init__(self, options: Namespace, turn: Turn, inbox: Inbox, calls: Calls) -> None:
        self.options = options
        self.turn = turn
        self.inbox = inbox
        self.calls = calls
        self.screen = Screen(sys.stderr, preview=False)
        self.shown = Shown(shown_file())
        chat = ["--chat", options.chat] if options.chat else []
        self.chat_command = shlex.join(["nanoclawctl", "chat", options.AGENT, *chat])

    def run(self, until: float) -> list[Delivery]:
        """Return the replies. Raises Failed if there is none at the time `until` (time.monotonic())."""
        replies: dict[str, Delivery] = {}
        self.screen.begin("sent")
        while (left_s := self.turn.left_s(time.monotonic())) != 0:
            wait_s = until - time.monotonic() if left_s is None else left_s
            if wait_s <= 0:
                self.screen.end()
                raise Failed(f"no reply within {self.options.timeout} s", hint=self._late())
            try:
                item = self.inbox.get(timeout=min(wait_s, 1.0))
            except Empty:
                self.screen.tick()
                continue
            match item:
                case Delivery():
                    self.turn.note(item, time.monotonic())
                    if item.key not in replies and not self.options.json:
                        self.screen.erase()
                        output.say(item.text.rstrip("\n"))
                        self.report([item])
                    replies[item.key] = item
                case Activity():
                    self.turn.note(item, time.monotonic())
                    if item.kind not in ("text", "idle"):
                        self.screen.set_status(f"{item.kind} {item.text}")
                case Broken(error=error):
                    self.screen.end()
                    raise error
        self.screen.end()
        return list(replies.values())

    def _late(self) -> str:
        """Return what to do when there is no reply in time."""
        agent = self.options.AGENT
        with contextlib.suppress(NanoclawError):
            runtime = control.call("ShowAgent", {"name": agent}, timeout_s=ASK_S)["runtime"]
            if runtime["state"] == "held":
                return f"'{agent}' is stopped; the message waits until 'nanoclawctl agent start {agent}'"
        return f"it goes on; the reply will be in '{self.chat_command}'"

    def report(self, replies: list[Delivery]) -> None:
        """Report what is printed, as such."""
        sys.stdout.flush()
        for reply in replies:
            self.shown.add(reply.key)
            self.calls.report_sent(reply.key)


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
