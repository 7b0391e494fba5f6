"""The one table of what an agent may ask the router to do, beyond talking in its chat: [guard]. Pure.

What an agent asks of the gateway is not here: that is its policy's, see policy.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from nanoclawd import tomltable
from nanoclawd.tomltable import BadValue, Rows, whole_number

APPROVALS_MAX = 9  #: people who have to agree


class Say(StrEnum):
    """What becomes of an action."""

    ALLOW = "allow"
    HOLD = "hold"  #: it waits until somebody who may has allowed it
    DENY = "deny"


class Action(StrEnum):
    CREATE_AGENT = "create_agent"
    MESSAGE_AGENT = "message_agent"
    SEND_ELSEWHERE = "send_elsewhere"
    SEND_FILE = "send_file"
    EDIT = "edit"
    REACT = "react"


@dataclass(frozen=True, slots=True)
class Row:
    default: Say
    what: str  #: what the agent would do, as it reads behind "may"
    everywhere: bool = False  #: it is about more than that agent: an admin of it alone may not allow it


TABLE = {
    Action.CREATE_AGENT: Row(Say.HOLD, "create another agent", everywhere=True),
    Action.MESSAGE_AGENT: Row(Say.HOLD, "write to another agent"),
    Action.SEND_ELSEWHERE: Row(Say.HOLD, "write to a chat other than the one that it answers in"),
    Action.SEND_FILE: Row(Say.ALLOW, "send a file to its chat"),
    Action.EDIT: Row(Say.ALLOW, "change what it has sent"),
    Action.REACT: Row(Say.ALLOW, "react to a message of its chat"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Privileges:
    """The table [guard] of an agent's file, or of nanoclaw.toml for all agents. None: not said there."""

    create_agent: Say | None = None
    message_agent: Say | None = None
    send_elsewhere: Say | None = None
    send_file: Say | None = None
    edit: Say | None = None
    react: Say | None = None
    approvals: int | None = None  #: how many people have to allow what is held

    def say(self, action: Action) -> Say:
        said: Say | None = getattr(self, action)
        return TABLE[action].default if said is None else said

    @property
    def needed(self) -> int:
        """How many people have to allow what is held."""
        return self.approvals or 1

    def or_default(self, default: Privileges) -> Privileges:
        """Return this, with what it does not say as in `default`."""
        given = {key: value for key, value in asdict(self).items() if value is not None}
        return Privileges(**(asdict(default) | given))


def _say(value: Any) -> Say:
    try:
        return Say(value)
    except ValueError:
        raise BadValue("must be allow, hold or deny", 'write e.g. create_agent = "deny"') from None


NOT_SAID = Privileges()
KEYS: Rows = {**dict.fromkeys(Action, _say), "approvals": whole_number(1, APPROVALS_MAX)}
#: Reads [guard].
parse_privileges = tomltable.table(
    Privileges, KEYS, hint='write [guard] and below it e.g. send_elsewhere = "allow"'
)
