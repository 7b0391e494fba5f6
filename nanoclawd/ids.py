"""Names and ids: what they look like, and how to make new ones."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from typing import NewType

from nanoclawd.errors import NotFound, Refused

AgentName = NewType("AgentName", str)  #: [a-z][a-z0-9_]{0,31}; also part of unit and directory names
SessionName = NewType("SessionName", str)  #: [a-z0-9_]{1,48}; the instance of the agent's unit
ChannelName = NewType("ChannelName", str)  #: [a-z][a-z0-9_]{0,31}; the instance of the adapter's unit
PersonName = NewType("PersonName", str)  #: [a-z][a-z0-9_-]{0,31}; the owner's word for somebody
MessageId = NewType("MessageId", str)  #: "m" and 16 hex digits
TurnId = NewType("TurnId", str)  #: "t" and 16 hex digits
CredentialName = NewType("CredentialName", str)  #: [a-z][a-z0-9_-]{0,63}; part of a file's name

# No dash: Quadlet and systemd look for drop-ins under every dash-truncated prefix of a unit's name, so
# "a-b" would inherit what is meant for "a". No escape is needed either: %i equals %I.
AGENT_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}", re.ASCII)
#: nanoclaw-channel@.service is an adapter's, and so on: not names for agents.
RESERVED = ("agents", "channel", "gateway", "podman")
TERMINAL = ChannelName("terminal")  #: nanoclawctl's: whoever may open its socket is the owner
SESSION_NAME = re.compile(r"[a-z0-9_]{1,48}", re.ASCII)
PERSON_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}", re.ASCII)
CREDENTIAL_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}", re.ASCII)


def parse_agent_name(text: str) -> AgentName:
    """Return `text` as an agent's name, or raise Refused."""
    _parse(text, AGENT_NAME, "an agent", "1 to 32 of a-z, 0-9 and _, beginning with a letter")
    if text in RESERVED:
        raise Refused(f"'{text}' is the name of a unit of ours", hint="choose another name for the agent")
    return AgentName(text)


def parse_channel_name(text: str) -> ChannelName:
    """Return `text` as the name of a channel that can be added, or raise Refused."""
    _parse(text, AGENT_NAME, "a channel", "1 to 32 of a-z, 0-9 and _, beginning with a letter")
    if text == TERMINAL:
        raise Refused(f"the channel '{TERMINAL}' is nanoclawctl's own", hint="choose another name")
    return ChannelName(text)


def no_agent(name: str, known: Iterable[str]) -> NotFound:
    """Return the error for an agent that is none of `known`, with the name that was probably meant."""
    from difflib import get_close_matches  # slow to import, and rarely needed

    close = get_close_matches(name, list(known), n=1)
    meant = f"; did you mean '{close[0]}'?" if close else ""
    return NotFound(f"no agent named '{name[:64]}'", hint=f"'nanoclawctl agent list' shows all{meant}")


def parse_session_name(text: str) -> SessionName:
    """Return `text` as a session's name, or raise Refused."""
    return SessionName(_parse(text, SESSION_NAME, "a session", "1 to 48 of a-z, 0-9 and _"))


def parse_person_name(text: str) -> PersonName:
    """Return `text` as a person's name, or raise Refused."""
    form = "1 to 32 of a-z, 0-9, _ and -, beginning with a letter"
    return PersonName(_parse(text, PERSON_NAME, "a person", form))


def parse_destination_name(text: str) -> str:
    """Return `text` as a name for a chat that an agent may write to, or raise Refused."""
    form = "1 to 32 of a-z, 0-9, _ and -, beginning with a letter"
    return _parse(text, PERSON_NAME, "a destination", form)


def parse_credential_name(text: str) -> CredentialName:
    """Return `text` as a credential's name, or raise Refused, without it: it may be a value."""
    if not CREDENTIAL_NAME.fullmatch(text):
        form = "1 to 64 of a-z, 0-9, _ and -, beginning with a letter, e.g. 'anthropic'"
        raise Refused("this is not a name for a credential", hint=f"use {form}")
    return CredentialName(text)


def _parse(text: str, pattern: re.Pattern[str], what: str, form: str) -> str:
    if not pattern.fullmatch(text):
        raise Refused(f"{text[:80]!r} is not a name for {what}", hint=f"use {form}")
    return text


def unit_name(agent: AgentName, session: SessionName) -> str:
    """Return the name of the session's systemd unit."""
    return f"nanoclaw-{agent}@{session}.service"


def new_message_id() -> MessageId:
    """Return a fresh id; 64 random bits, so that two never meet."""
    return MessageId("m" + secrets.token_hex(8))


def new_turn_id() -> TurnId:
    """Return a fresh id; a runner cannot guess another session's."""
    return TurnId("t" + secrets.token_hex(8))
