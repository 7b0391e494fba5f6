"""The message and dead letter commands."""

from __future__ import annotations

from argparse import Namespace
from functools import partial

from nanoclawd.cli import control, output
from nanoclawd.cli.parser import UsageError
from nanoclawd.cli.text import cut, one_line
from nanoclawd.errors import NanoclawError
from nanoclawd.wire import Json

TEXT_CELLS = 60  #: of a text in a list


def _id(document: Json) -> str:
    return str(document.get("id") or document["key"])


_MESSAGES: output.Fields = {
    "MESSAGE": "id",
    "STATE": "state",
    "RECEIVED": "receivedAt",
    "AGENT": "agent",
    "CHAT": "chat",
    "TRIES": lambda message: message["attempts"] + message["deferrals"],
    "TEXT": lambda message: cut(one_line(message["text"]), TEXT_CELLS),
}
_DEAD_LETTERS: output.Fields = {
    "DEAD LETTER": _id,
    "KIND": lambda letter: letter.get("kind", "message"),
    "ENDED": "endedAt",
    "AGENT": "agent",
    "CHAT": "chat",
    "REASON": "reason",
}


def message_list(options: Namespace) -> None:
    parameters = {"agent": options.AGENT, "state": options.state, "limit": options.limit}
    found = [reply["message"] for reply in control.list_all("ListMessages", parameters)]
    output.say_list(options, "messages", found, _MESSAGES, "There are no such messages.")


def message_show(options: Namespace) -> None:
    replies = control.list_all("ShowMessage", {"id": options.ID})
    message = next((reply["message"] for reply in replies if reply.get("message")), None)
    deliveries = [reply["delivery"] for reply in replies if reply.get("delivery")]
    if options.json:
        return output.say_json({"message": message, "deliveries": deliveries})
    for number, document in enumerate([message, *deliveries] if message else deliveries):
        print("\n" * (number > 0), end="")
        text = document.pop("text")
        output.say_document(document)
        output.say(f"\n{text.rstrip()}")
    if message:
        output.talk(f"\nIts story: journalctl --user NANOCLAWD_MESSAGE={message['id']}")


deadletter_show = message_show


def deadletter_list(options: Namespace) -> None:
    output.say_list(
        options, "deadLetters", control.dead_letters(), _DEAD_LETTERS, "There are no dead letters."
    )


def _change(method: str, done: str, options: Namespace) -> None:
    """Do one thing to each of the dead letters; what is refused does not keep the others from it."""
    if bool(options.LETTER) == options.all:
        raise UsageError("name dead letters, or say --all", hint="'nanoclawctl deadletter list' shows them")
    changed, failed = [], None
    for id in map(_id, control.dead_letters()) if options.all else options.LETTER:
        try:
            changed.append(control.call(method, {"id": id})["id"])
        except NanoclawError as exc:
            failed = failed or exc
        else:
            if not options.json:
                output.talk(f"{changed[-1]} {done}.")
    if failed is not None:
        raise failed
    output.done(options, {"deadLetters": changed}, "" if changed else "There are no dead letters.")


deadletter_retry = partial(_change, "RetryDeadLetter", "is tried again")
deadletter_drop = partial(_change, "DropDeadLetter", "is dropped")
