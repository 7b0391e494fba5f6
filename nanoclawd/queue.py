"""Messages and deliveries: what may happen to them, each as one operation on the database.

A message is queued, leased by a turn, and ends answered, stopped or dead; a delivery is pending, leased by
an adapter, and ends sent or dead. Each function here is one step of that, to be run by Database.write().
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from nanoclawd import limits
from nanoclawd.db import Row, Transaction, now_ms
from nanoclawd.errors import NotFound, Refused
from nanoclawd.ids import AgentName, MessageId, SessionName, TurnId, new_message_id, new_turn_id


class MessageState(StrEnum):
    QUEUED = "queued"  #: waits; not before not_before
    LEASED = "leased"  #: a turn has it until lease_expires_at
    ANSWERED = "answered"  #: its turn ended
    STOPPED = "stopped"  #: the person stopped it
    DEAD = "dead"  #: attempts used up, or cannot be answered; the chat was told


class DeliveryKind(StrEnum):
    REPLY = "reply"
    MESSAGE = "message"
    NOTICE = "notice"


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionRow:
    """One session, as the database has it."""

    id: int
    agent: AgentName
    name: SessionName
    channel: str
    chat: str
    thread: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """What a channel delivers; the first five fields are its idempotency key."""

    channel: str
    chat: str
    thread: str
    event: str
    revision: int
    sender: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """A leased message, with what earlier attempts at it sent already."""

    id: TurnId
    attempt: int
    message: MessageId
    event: str
    sender: str
    text: str
    received_at: int  #: ms
    already_sent: Sequence[tuple[str, str]]  #: key, text


def session_row(row: Row) -> SessionRow:
    return SessionRow(
        id=row["id"],
        agent=AgentName(row["agent"]),
        name=SessionName(row["name"]),
        channel=row["channel"],
        chat=row["chat"],
        thread=row["thread"],
    )


def backoff_ms(attempt: int) -> int:
    """Return the wait after failed attempt number `attempt` (1-based): about 2, 4, 8 … s, at most 15 min.

    With a tenth of jitter, so that what failed together is not tried together.
    """
    if attempt < 1:
        raise ValueError("attempts are counted from 1")
    wait_s = min(limits.BACKOFF_MAX_S, limits.BACKOFF_FIRST_S * 2.0 ** min(attempt - 1, 30))
    return int(wait_s * 1000 * random.uniform(0.9, 1.1))


def enqueue(tx: Transaction, agent: AgentName, event: Event) -> tuple[MessageId, SessionRow | None]:
    """Store a message for an agent and return its id and session; the session is None if it was stored
    before.

    Raises Refused if too many wait already.
    """
    key = {
        "channel": event.channel,
        "chat": event.chat,
        "thread": event.thread,
        "event": event.event,
        "revision": event.revision,
    }
    if (known := tx.one("find_delivered", **key)) is not None:
        return MessageId(known["id"]), None
    place = {"agent": agent, "channel": event.channel, "chat": event.chat, "thread": event.thread}
    row = tx.one("find_session", **place)
    if row is None:
        prefix = "".join(c if c.isascii() and c.isalnum() else "_" for c in event.channel.lower())[:32]
        row = tx.one("add_session", prefix=prefix, now=now_ms(), **place)
    assert row is not None
    session = session_row(row)
    (waiting,) = tx.all("count_queued", session=session.id)
    if waiting["in_session"] >= limits.QUEUED_PER_SESSION or waiting["total"] >= limits.QUEUED_TOTAL:
        raise Refused(
            f"{waiting['in_session']} messages wait for this chat and {waiting['total']} in all",
            hint="wait until the agent has caught up; 'nanoclawctl status' shows what it does",
        )
    message = new_message_id()
    tx.all(
        "enqueue", id=message, session=session.id, sender=event.sender, body=event.text, now=now_ms(), **key
    )
    return message, session


def claim_turn(tx: Transaction, session: SessionRow) -> Turn | None:
    """Lease the session's oldest message, if it is due, to a new turn. One that is leased already is not
    taken.
    """
    row = tx.one("claim_message", session=session.id, turn=new_turn_id(), now=now_ms(), expires=_lease_end())
    return None if row is None else _turn(tx, row)


def leased_turn(tx: Transaction, session: SessionRow) -> Turn | None:
    """Return the turn that the session has leased, if any."""
    row = tx.one("leased_message", session=session.id)
    return None if row is None else _turn(tx, row)


def _turn(tx: Transaction, row: Row) -> Turn:
    sent = tx.all("already_sent", message=row["id"]) if row["attempts"] > 1 else []
    # The message's id was put before the runner's key, see send_message().
    already = [(r["key"].partition("/")[2], r["body"]) for r in sent]
    return Turn(
        id=TurnId(row["turn"]),
        attempt=row["attempts"],
        message=MessageId(row["id"]),
        event=row["event"],
        sender=row["sender"],
        text=row["body"],
        received_at=row["received_at"],
        already_sent=already,
    )


def renew_lease(tx: Transaction, session: SessionRow, turn: TurnId) -> bool:
    """Return whether the turn still has its lease, now until a full lease from now."""
    return tx.one("renew_lease", session=session.id, turn=turn, expires=_lease_end()) is not None


def send_message(tx: Transaction, session: SessionRow, turn: Turn, key: str, text: str) -> None:
    """Publish what the agent sends in mid-turn; the same key again changes nothing. Raises Refused."""
    full_key = f"{turn.message}/{key}"
    (count,) = tx.all("count_sends", message=turn.message, key=full_key)
    if count["sends"] >= limits.SENDS_PER_TURN:
        raise Refused(f"more than {limits.SENDS_PER_TURN} messages in one turn")
    _publish(tx, session, turn.message, full_key, DeliveryKind.MESSAGE, text, turn.event)


def finish_turn(
    tx: Transaction, session: SessionRow, turn: Turn, state: MessageState, replies: Sequence[str]
) -> None:
    """End a turn: its message is acknowledged and its replies are in the outbox, or neither."""
    if tx.one("finish_turn", id=turn.message, turn=turn.id, state=state, now=now_ms()) is None:
        raise NotFound(f"turn {turn.id} has no lease any more")
    for number, text in enumerate(replies):
        _publish(
            tx, session, turn.message, f"{turn.message}.reply{number}", DeliveryKind.REPLY, text, turn.event
        )


def fail_message(
    tx: Transaction,
    session: SessionRow,
    message: Row,
    *,
    reason: str,
    retryable: bool,
    retry_after_ms: int | None = None,
) -> int | None:
    """Put a message back for a later attempt, or bury it with a notice in its chat.

    Returns when it will be tried again (ms), or None if it is dead.
    """
    if retryable and message["attempts"] < limits.ATTEMPTS:
        wait = max(
            backoff_ms(max(1, message["attempts"])),
            min(retry_after_ms or 0, int(limits.BACKOFF_MAX_S * 1000)),
        )
        not_before = now_ms() + wait
        tx.all("requeue_message", id=message["id"], not_before=not_before, reason=reason)
        return not_before
    bury_message(tx, session, message, reason)
    return None


def fail_start(tx: Transaction, session: SessionRow, *, reason: str) -> tuple[Row, int | None] | None:
    """The session's container did not start: that counts as an attempt at its oldest message.

    Returns that message and when it will be tried again (None: it is dead); None if nothing waits.
    """
    message = tx.one("next_message", session=session.id)
    if message is None:
        return None
    if message["state"] == MessageState.QUEUED:
        tx.all("count_attempt", id=message["id"])
        message = tx.one("next_message", session=session.id)
        assert message is not None
    return message, fail_message(tx, session, message, reason=reason, retryable=True)


def bury_message(tx: Transaction, session: SessionRow, message: Row, reason: str) -> None:
    """End a message as a dead letter, and say so in its chat."""
    tx.all("finish_message", id=message["id"], state=MessageState.DEAD, now=now_ms(), reason=reason)
    _publish(
        tx,
        session,
        MessageId(message["id"]),
        f"{message['id']}.notice",
        DeliveryKind.NOTICE,
        f"Your message could not be answered: {reason}",
        message["event"],
    )


def stop_session(tx: Transaction, session: SessionRow) -> list[str]:
    """End all that waits for a session because the person said stop; returns the events."""
    stopped = tx.all(
        "finish_queued",
        session=session.id,
        state=MessageState.STOPPED,
        now=now_ms(),
        reason="stopped by the person",
    )
    for row in stopped:
        publish_stopped(tx, session, MessageId(row["id"]), row["event"])
    return [row["event"] for row in stopped]


def publish_stopped(tx: Transaction, session: SessionRow, message: MessageId, event: str) -> None:
    """Tell the chat that a message was stopped: it ends in a notice like everything else, not in silence."""
    _publish(tx, session, message, f"{message}.notice", DeliveryKind.NOTICE, "Stopped.", event)


def claim_deliveries(
    tx: Transaction, channel: str, *, chat: str | None = None, event: str | None = None, limit: int = 64
) -> list[Row]:
    """Lease what is due for an adapter, oldest first."""
    rows = tx.all("claim_deliveries", channel=channel, chat=chat, event=event, now=now_ms(), limit=limit)
    return sorted(
        rows, key=lambda row: int(row["seq"])
    )  # RETURNING has no order: sqlite.org/lang_returning.html


def end_delivery(
    tx: Transaction,
    channel: str,
    key: str,
    *,
    sent: bool,
    receipt: str | None = None,
    reason: str | None = None,
) -> Row | None:
    """Note that a delivery was sent, or is dead; None if that was known. Raises NotFound."""
    state = "sent" if sent else "dead"
    row = tx.one(
        "end_delivery", channel=channel, key=key, state=state, now=now_ms(), receipt=receipt, reason=reason
    )
    if row is None and tx.one("find_delivery", channel=channel, key=key) is None:
        raise NotFound(f"no delivery {key[:80]!r} on channel '{channel}'")
    return row


def retry_dead_letter(tx: Transaction, id: str) -> bool:
    """Put a dead message or delivery back, as if never tried; False if it is not dead, or dropped."""
    return bool(tx.all("retry_message", id=id) or tx.all("retry_delivery", key=id))


def drop_dead_letter(tx: Transaction, id: str) -> bool:
    """Have done with a dead message or delivery; False if it is not dead, or dropped already."""
    return bool(tx.all("drop_message", id=id) or tx.all("drop_delivery", key=id))


def _lease_end() -> int:
    return now_ms() + int(limits.LEASE_S * 1000)


def _publish(
    tx: Transaction,
    session: SessionRow,
    message: MessageId,
    key: str,
    kind: DeliveryKind,
    text: str,
    in_reply_to: str,
) -> None:
    place: dict[str, Any] = {"agent": session.agent, "channel": session.channel, "chat": session.chat}
    tx.all(
        "publish",
        key=key,
        message=message,
        thread=session.thread,
        kind=kind,
        body=text,
        in_reply_to=in_reply_to,
        now=now_ms(),
        **place,
    )
