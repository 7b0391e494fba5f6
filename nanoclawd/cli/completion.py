"""Completion for shells: their scripts ask `nanoclawctl _complete WORD …` whenever Tab is pressed.

It prints a line for each word that may come next, with its help behind a tab; ":files" or ":directories"
leaves the answer to the shell. It is no promise to anybody.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from nanoclawd.cli import control
from nanoclawd.cli.table import COMMANDS, NOUNS, Command, Option
from nanoclawd.errors import NanoclawError

SCRIPTS = Path(__file__).with_name("completions")


def completion(options: Namespace) -> None:
    print(SCRIPTS.joinpath(f"nanoclawctl.{options.SHELL}").read_text(), end="")


def answer(words: Sequence[str]) -> None:
    """Print what may stand in place of the last of `words`, those after the program's name."""
    *before, current = words or [""]
    for word, help_ in _offers(before, current):
        if word.startswith((current, ":")):
            print(f"{word}\t{help_}".rstrip())


def _offers(before: Sequence[str], current: str) -> Iterable[tuple[str, str]]:
    end = [("--help", "show help")]
    if not before:
        nouns = {command.words[0]: command.help for command in COMMANDS} | NOUNS
        return [*nouns.items(), *end, ("--version", "print the version")]
    command = next((c for c in COMMANDS if c.words == tuple(before[: len(c.words)])), None)
    verbs = [(c.words[1], c.help) for c in COMMANDS if [*c.words[:-1]] == [*before]]
    if command is None:
        return verbs + end if verbs else []
    wanted = _wanted(command, before[len(command.words) :])
    if wanted is not None and (wanted.metavar or not current.startswith("-")):
        if values := verbs + _values(wanted):
            return values
        if wanted.metavar:
            return []
    return [(o.name, o.help) for o in command.options if not o.positional] + end


def _wanted(command: Command, before: Sequence[str]) -> Option | None:
    """Return the option whose value comes after the words `before`, else the next positional argument."""
    positional = [option for option in command.options if option.positional]
    wanted = None
    for word in before:
        if wanted is not None:
            wanted = None
        elif word.startswith("-"):
            wanted = next((o for o in command.options if o.metavar and word in (o.name, o.short)), None)
        elif positional and not positional[0].repeat:
            del positional[0]
    return wanted or next(iter(positional), None)


def _values(option: Option) -> list[tuple[str, str]]:
    if option.complete == "agents":
        return [(name, "") for name in control.agent_names()]
    if option.complete == "letters":
        with suppress(NanoclawError):
            letters = control.dead_letters(timeout_s=control.COMPLETION_S)
            return [(letter.get("id") or letter["key"], letter["reason"] or "") for letter in letters]
        return []
    if option.complete == "chats":
        chats = control.listed("ListChats", "chat")
        return [(str(chat["number"]), chat["title"] or chat["chat"]) for chat in chats]
    if option.complete == "channels":
        return [(channel["name"], channel["kind"]) for channel in control.listed("ListChannels", "channel")]
    if option.complete == "adapters":
        from nanoclawd.channelfile import kinds  # slow to import

        return [(kind, "") for kind in kinds()]
    if option.complete == "people":
        return [(person["name"], "") for person in control.listed("ListPeople", "person")]
    if option.complete == "approvals":
        with suppress(NanoclawError):
            found = control.approvals(None, "pending", timeout_s=control.COMPLETION_S)
            return [(approval["id"], approval["agent"]) for approval in found]
        return []
    if option.complete:
        return [(f":{option.complete}", "")]
    return [(choice, "") for choice in option.choices]
