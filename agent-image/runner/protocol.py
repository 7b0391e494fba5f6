"""What the router tells a runner, as checked values.

NamedTuples and not dataclasses: importing dataclasses alone is a third of the time until Hello.
"""

from __future__ import annotations

from typing import Any, NamedTuple

PROTOCOL = 1
VERSION = "0.1.0"


class ProtocolError(Exception):
    """The router sent something that the contract does not have; the message names the field."""


class Settings(NamedTuple):
    """The answer to Hello: all the configuration that a runner gets."""

    agent: str
    session: str
    provider: str
    model: str  #: empty: the provider's default
    instructions: str  #: may be empty
    heartbeat_s: float  #: the lease must be renewed at least this often
    idle_s: float  #: good-bye after this long without work


class Message(NamedTuple):
    id: str
    sender: str
    received_at: float  #: seconds since 1970, UTC
    text: str


class Sent(NamedTuple):
    key: str
    text: str


class Turn(NamedTuple):
    id: str
    attempt: int  #: 1 for the first try
    messages: tuple[Message, ...]  #: oldest first, never empty
    already_sent: tuple[Sent, ...]  #: what an earlier attempt sent before it broke off


def parse_settings(reply: dict[str, Any]) -> Settings:
    return Settings(
        agent=_text(reply, "agent"),
        session=_text(reply, "session"),
        provider=_text(reply, "provider"),
        model=_text(reply, "model"),
        instructions=_text(reply, "instructions"),
        heartbeat_s=_number(reply, "heartbeatSeconds"),
        idle_s=_number(reply, "idleSeconds"),
    )


def parse_turn(raw: object) -> Turn:
    turn = _object(raw, "turn")
    messages = tuple(_message(item) for item in _list(turn, "messages"))
    if not messages:
        raise ProtocolError("turn.messages: must not be empty")
    return Turn(
        id=_text(turn, "id"),
        attempt=int(_number(turn, "attempt")),
        messages=messages,
        already_sent=tuple(
            Sent(key=_text(item, "key"), text=_text(item, "text"))
            for item in (_object(raw, "alreadySent") for raw in _list(turn, "alreadySent"))
        ),
    )


def _message(raw: object) -> Message:
    item = _object(raw, "messages")
    return Message(
        id=_text(item, "id"),
        sender=_text(item, "sender"),
        received_at=_number(item, "receivedAt"),
        text=_text(item, "text"),
    )


def _object(raw: object, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ProtocolError(f"{where}: must be an object")
    return raw


def _list(raw: dict[str, Any], field: str) -> list[object]:
    value = raw.get(field)
    if not isinstance(value, list):
        raise ProtocolError(f"{field}: must be a list")
    return value


def _text(raw: dict[str, Any], field: str) -> str:
    value = raw.get(field)
    if not isinstance(value, str):
        raise ProtocolError(f"{field}: must be a string")
    return value


def _number(raw: dict[str, Any], field: str) -> float:
    value = raw.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ProtocolError(f"{field}: must be a number")
    return value
