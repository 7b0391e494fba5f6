"""Commands in chats: what is one, and which there are. Pure.

A message is a command if it begins with "/" and a word that is one, or is nothing but "/" and a word, which
is then explained. So a path is none, nor is "/tmp is full". "//" in the place of "/" makes the same an
ordinary message. What was edited, quoted, or written by a program or an agent never is a command.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum

WORD_CHARACTERS = 32
_COMMAND = re.compile(rf"\s*/([A-Za-z]{{1,{WORD_CHARACTERS}}})(?:\s+(.*))?", re.DOTALL | re.ASCII)


class Level(IntEnum):
    """What somebody has to be to an agent; each may what those before it may."""

    GUEST = 0  #: may talk to it, since everybody may
    MEMBER = 1
    ADMIN = 2  #: of the agent, or of all, or the owner


@dataclass(frozen=True, slots=True)
class Command:
    takes: str  #: "AGENT": the one that is meant, if there are several; "ID"
    level: Level
    help: str


COMMANDS = {
    "help": Command("", Level.GUEST, "what you can say to the router here"),
    "agents": Command("", Level.GUEST, "who listens here"),
    "status": Command("AGENT", Level.GUEST, "what an agent does"),
    "stop": Command("AGENT", Level.MEMBER, "stop what it does for this chat, and what waits for it"),
    "clear": Command(
        "AGENT", Level.MEMBER, "have it forget this conversation; in a room only its admins may"
    ),
    "compact": Command("AGENT", Level.MEMBER, "have it sum up this conversation, which then costs less"),
    "cost": Command("AGENT", Level.MEMBER, "what this conversation has cost, and for its admins the day"),
    "approve": Command("ID", Level.ADMIN, "allow what is asked about; alone: list what waits"),
    "deny": Command("ID", Level.ADMIN, "deny it"),
}


@dataclass(frozen=True, slots=True)
class Said:
    """A command as somebody said it."""

    word: str
    argument: str

    @property
    def known(self) -> Command | None:
        return COMMANDS.get(self.word)


def parse(text: str) -> Said | None:
    """Return the command that a text is, known or not; None: it is a message."""
    if (found := _COMMAND.fullmatch(text)) is None:
        return None
    said = Said(found[1].lower(), " ".join((found[2] or "").split()))
    return said if said.known or not said.argument else None


def unescape(text: str) -> str:
    """Return what is meant by a text that would be a command but for one more slash."""
    bare = text.lstrip()[1:]
    return bare if text.lstrip().startswith("//") and parse(bare) is not None else text
