"""Who may talk to an agent in a chat: decided by accounts and roles, before anything is made of a
message.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum


class Access(StrEnum):
    """What an agent's chat does with senders who are nothing there."""

    STRICT = "strict"  #: drops and counts their messages
    ASK = "ask"  #: keeps their messages until somebody has answered
    PUBLIC = "public"  #: takes them, though not many at once


class Role(StrEnum):
    OWNER = "owner"  #: may all, everywhere
    ADMIN = "admin"  #: may talk to one agent, or to all, in each chat
    MEMBER = "member"  #: may talk to one agent in each chat, or to all agents of a chat
    DENIED = "denied"  #: may talk to nobody in a chat


class Verdict(StrEnum):
    KNOWN = "known"  #: may talk to the agent
    STRANGER = "stranger"  #: may talk to it since everybody may
    HELD = "held"  #: somebody has to say
    DROPPED = "dropped"


@dataclass(frozen=True, slots=True)
class Standing:
    """One of the roles of a person: in a chat (its id), to an agent, or, without either, everywhere."""

    role: Role
    agent: str = ""
    chat: int | None = None


def decide_access(standings: Collection[Standing], agent: str, chat: int, access: Access) -> Verdict:
    """Return what becomes of a message to `agent` in `chat` of a sender with those roles, perhaps none."""
    if Standing(Role.DENIED, chat=chat) in standings:
        return Verdict.DROPPED
    for standing in standings:
        match standing:
            case Standing(Role.OWNER | Role.ADMIN, agent=""):
                return Verdict.KNOWN
            case Standing(Role.ADMIN | Role.MEMBER, agent=name) if name and name == agent:
                return Verdict.KNOWN
            case Standing(Role.MEMBER, chat=place) if place is not None and place == chat:
                return Verdict.KNOWN
    return {Access.STRICT: Verdict.DROPPED, Access.ASK: Verdict.HELD, Access.PUBLIC: Verdict.STRANGER}[
        access
    ]


def may_answer(standings: Collection[Standing], agent: str) -> bool:
    """Return whether somebody with those roles may say what `agent` may do; "": what is of more than one."""
    if Standing(Role.OWNER) in standings or Standing(Role.ADMIN) in standings:
        return True
    return bool(agent) and Standing(Role.ADMIN, agent) in standings
