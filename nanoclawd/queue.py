"""Messages that wait: how they come, and how they end without a turn. Each function is one step of a write.

Their states are in states.py, what a turn does with them in leases.py, what becomes of the deliveries that
these steps cause in outbox.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from nanoclawd import journal, limits
from nanoclawd.db import Row, Transaction, now_ms
from nanoclawd.errors import Refused
from nanoclawd.ids import AgentName, MessageId, new_message_id
from nanoclawd.messages import (
    Event,
    Place,
    SessionRow,
    Turn,
    message_of,
    notify,
    one_line,
    session_row,
    tell,
)
from nanoclawd.states import MessageState


def enqueue(
    tx: Transaction,
    agent: AgentName,
    event: Event,
    *,
    conversation: Place | None = None,
    context: str = "",
    hops: int = 0,
    command: str = "",
) -> tuple[MessageId, SessionRow | None]:
    """Store a message for an agent and return its id and session; the session is None if it was stored
    before.

    `conversation` is what the session is about, by default chat and thread; `hops` counts the agents that it
    has come through. Raises Refused if too many wait already.
    """
    if (known := tx.one("find_delivered", agent=agent, **event.key)) is not None:
        return MessageId(known["id"]), None
    about = dict(zip(("channel", "chat", "thread"), conversation or event.place, strict=True))
    row = tx.one("find_session", agent=agent, **about)
    if row is None:
        prefix = "".join(c if c.isascii() and c.isalnum() else "_" for c in about["channel"].lower())[:32]
        row = tx.one("add_session", prefix=prefix or "all", now=now_ms(), agent=agent, **about)
    assert row is not None
    session = session_row(row)
    tx.all("use_session", session=session.id, now=now_ms())
    if event.revision:
        for old in tx.all("supersede", session=session.id, now=now_ms(), **event.key):
            tell(tx, "message-superseded", session, old["id"], None)
    _require_room(tx, session.id)
    message = new_message_id()
    stored = {
        "session": session.id,
        "sender": event.sender,
        "body": event.text,
        "context": context,
        "command": command,
        "hops": hops,
    }
    tx.all("enqueue", id=message, now=now_ms(), **stored, **event.key)
    size = len(event.text.encode())
    tell(tx, "message-queued", session, message, None, channel=event.channel, size_bytes=size)
    return message, session


def tell_agent(tx: Transaction, session: SessionRow, place: Place, event: str, text: str) -> None:
    """Have the router say something to an agent in a session, as a message without a sender, if there is
    room; once, by `event`, which is no platform's: nothing that is sent answers it.
    """
    channel, chat, thread = place
    said = Event(channel=channel, chat=chat, thread=thread, event=event, revision=0, sender="", text=text)
    with suppress(Refused):
        enqueue(tx, session.agent, said, conversation=session.place)


def _require_room(tx: Transaction, session: int, *, counted: int = 0) -> None:
    """Raise Refused if a session has no room for a message; `counted`: it is queued already."""
    (waiting,) = tx.all("count_queued", session=session)
    in_session, total = waiting["in_session"] - counted, waiting["total"] - counted
    if in_session >= limits.QUEUED_PER_SESSION or total >= limits.QUEUED_TOTAL:
        raise Refused(
            f"{in_session} messages wait for this chat and {total} in all",
            hint="wait until the agent has caught up; 'nanoclawctl status' shows what it does",
        )


def bury_session(tx: Transaction, session: SessionRow, reason: str) -> list[str]:
    """End all that waits for a session as dead letters, because a person wants it so; returns the events."""
    rows = tx.all("open_messages", session=session.id)
    if rows:
        bury(tx, session, rows, reason, level=journal.info)
    return [row["event"] for row in rows]


def bury(
    tx: Transaction,
    session: SessionRow,
    rows: Sequence[Row],
    reason: str,
    turn: Turn | None = None,
    *,
    level: Callable[..., None] = journal.error,
) -> None:
    """End messages as dead letters, and say so in their chat: once for all of a turn."""
    for row in rows:
        tx.all("finish_message", id=row["id"], state=MessageState.DEAD, now=now_ms(), reason=reason)
        counts = {name: row[name] for name in ("attempts", "deferrals")}
        tell(tx, "message-dead", session, row["id"], row["turn"], reason, level, **counts)
    told = rows[-1:] if turn is not None else rows
    for row in told:
        subject = "Your message" if len(rows) == 1 or turn is None else f"Your last {len(rows)} messages"
        text = f"{subject} could not be answered: {one_line(reason)}"
        notify(tx, session, message_of(tx, row), turn, text, life=row["revived"])


def stop_session(tx: Transaction, session: SessionRow, place: Place) -> tuple[list[str], bool]:
    """The person said stop: end all that waits for a session in one chat. What its turn has is not tried
    again.

    Returns the events of what has ended, and whether there is such a turn.
    """
    where = dict(zip(("channel", "chat", "thread"), place, strict=True))
    ended = end_stopped(tx, session, "finish_queued", **where)
    return ended, bool(tx.all("mark_stopping", session=session.id, **where))


def end_stopped(tx: Transaction, session: SessionRow, query: str, **where: str) -> list[str]:
    """End messages as stopped, and say so in their chat; returns the events."""
    end = {"state": MessageState.STOPPED, "now": now_ms(), "reason": "stopped by the person"}
    stopped = tx.all(query, session=session.id, **end, **where)
    for row in stopped:
        notify(tx, session, message_of(tx, row), None, "Stopped.", life=row["revived"])
        tell(tx, "message-stopped", session, row["id"], None)
    return [row["event"] for row in stopped]


def retry_dead_letter(tx: Transaction, id: str) -> bool:
    """Put a dead message or delivery back, as if never tried; False if it is not dead, or dropped.

    Raises Refused if too many messages wait already.
    """
    if (row := tx.one("retry_message", id=id)) is not None:
        _require_room(tx, row["session"], counted=1)
        return True
    return bool(tx.all("retry_delivery", key=id))


def drop_dead_letter(tx: Transaction, id: str) -> bool:
    """Have done with a dead message or delivery; False if it is not dead, or dropped already."""
    return bool(tx.all("drop_message", id=id) or tx.all("drop_delivery", key=id))
