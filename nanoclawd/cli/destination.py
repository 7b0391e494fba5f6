"""The destination commands: where agents may send something besides the chat that they answer in."""

from __future__ import annotations

from argparse import Namespace

from nanoclawd.cli import control, output
from nanoclawd.cli.text import cut, one_line

_TITLE_CELLS = 60
_DESTINATIONS: output.Fields = {
    "AGENT": "agent",
    "DESTINATION": "name",
    "CHANNEL": "channel",
    "ID": "chat",
    "TITLE": lambda found: cut(one_line(found["title"]), _TITLE_CELLS),
}


def destination_list(options: Namespace) -> None:
    replies = control.list_all("ListDestinations", {"agent": options.AGENT})
    found = [reply["destination"] for reply in replies]
    output.say_list(options, "destinations", found, _DESTINATIONS, "There are no destinations.")


def destination_add(options: Namespace) -> None:
    what = {"agent": options.AGENT, "destination": options.DESTINATION}
    reply = control.call("AddDestination", {**what, "chat": options.NUMBER})
    where = "the terminal" if options.NUMBER is None else f"chat {options.NUMBER}"
    output.done(options, reply, f"'{options.DESTINATION}' of '{options.AGENT}' is {where}.")


def destination_remove(options: Namespace) -> None:
    reply = control.call("RemoveDestination", {"agent": options.AGENT, "destination": options.DESTINATION})
    output.done(options, reply, f"'{options.AGENT}' has no destination '{options.DESTINATION}' any more.")
