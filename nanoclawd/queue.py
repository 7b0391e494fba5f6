"""Messages: what may happen to them, each as one operation on the database.

Their states are in states.py. Each function here is one step, to be run by Database.write(). What becomes of
the deliveries that these steps cause is in outbox.py.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from nanoclawd import journal, limits, wire
from nanoclawd.db import Row, Transaction, now_ms
from nanoclawd.errors import NotFound, Refused
from nanoclawd.ids import AgentName, MessageId, SessionName, TurnId, new_message_id, new_turn_id, unit_name
from nanoclawd.states import MessageState


class DeliveryKind(StrEnum):
    REPLY = "reply"
    MESSAGE = "message"
    NOTICE = "notice"
    EDIT = "edit"  #: these three have a target
    REACTION = "reaction"
    REDACTION = "redaction"


class Treatment(StrEnum):
    """What a failed turn means for its messages."""

    RETRY = "retry"  #: may be their fault: an attempt is used up
    DEFER = "defer"  #: not their fault: tried for hours
    SPLIT = "split"  #: one of them cannot be answered: each is tried alone
    BURY = "bury"  #: another attempt would end alike


#: Codes of FinishTurn() for what is no message's fault, and passes by itself, or does not.
_PASSING = frozenset(("rate_limit", "overloaded", "connection"))
_LASTING = frozenset(("authentication", "quota"))


def treatment(code: str, *, retryable: bool, shared: bool) -> Treatment:
    """Return how a turn is treated that failed with a code of io.nanoclaw.Agent; `shared`: by messages."""
    if retryable:
        return Treatment.DEFER if code in _PASSING else Treatment.RETRY
    return Treatment.SPLIT if shared and code not in _LASTING else Treatment.BURY


_EVENT_KEY = ("channel", "chat", "thread", "event", "revision")
#: channel, chat, thread
Place = tuple[str, str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionRow:
    """One session, as the database has it. What it is about has "" for what is all the same to it."""

    id: int
    agent: AgentName
    name: SessionName
    channel: str
    chat: str
    thread: str

    @property
    def place(self) -> Place:
        return self.channel, self.chat, self.thread


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

    @property
    def key(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _EVENT_KEY}

    @property
    def place(self) -> Place:
        return self.channel, self.chat, self.thread


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One message of a turn."""

    id: MessageId
    place: Place  #: where it was said
    event: str
    sender: str  #: "": the router
    text: str
    received_at: int  #: ms
    context: str  #: what was said before it, as JSON, or ""
    command: str  #: "compact": the agent is to do that; "": it is a message
    hops: int = 0  #: agents that it has come through since a person said something
    files: Sequence[Row] = ()  #: that came with it

    @property
    def is_event(self) -> bool:
        """Whether the platform knows it: not what the router or another agent says."""
        return bool(self.sender) and not self.hops


@dataclass(kw_only=True, slots=True)
class Turn:
    """Messages of one session that were leased together, with what earlier attempts at them sent already."""

    id: TurnId
    first: TurnId  #: of the first attempt: all attempts that are shared have the same
    attempt: int  #: tries of its first message that count, this one included
    messages: list[Message]  #: oldest first; grows by those that join
    already_sent: Sequence[tuple[str, str]] = ()  #: key of the delivery, text
    stopping: bool = False  #: the person has said stop

    @property
    def message(self) -> MessageId:
        """The oldest message, which names the turn in the journal and in keys."""
        return self.messages[0].id

    @property
    def place(self) -> Place:
        """Where all of it was said: what is said in one chat is never answered in another."""
        return self.messages[0].place

    @property
    def hops(self) -> int:
        """How many agents it has come through since a person said something."""
        return max(message.hops for message in self.messages)

    def full_key(self, key: str) -> str:
        """Return the key of a delivery that the runner calls `key`: the same in each attempt."""
        known = [sent for sent, _ in self.already_sent if sent.partition("/")[2] == key]
        return known[0] if known else f"{self.message}/{key}"

    @property
    def events(self) -> list[str]:
        return [message.event for message in self.messages if message.is_event]

    def behind(self, last: str) -> list[Message]:
        """Return the messages behind the one with that id. Raises Refused."""
        ids = [message.id for message in self.messages]
        if last not in ids:
            raise Refused("last: the turn has no such message")
        return self.messages[ids.index(MessageId(last)) + 1 :]


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """What became of messages whose turn, or whose container, failed."""

    messages: list[Row]
    not_before: int | None  #: when the first of them is tried again (ms); None: they are dead

    @property
    def events(self) -> list[str]:
        return [row["event"] for row in self.messages if is_event(row)]

    @property
    def place(self) -> Place:
        return place_of(self.messages[0])


def place_of(row: Row) -> Place:
    return row["channel"], row["chat"], row["thread"]


def is_event(row: Row) -> bool:
    """Whether the platform knows a message, as Message.is_event says."""
    return bool(row["sender"]) and not row["hops"]


def session_row(row: Row) -> SessionRow:
    return SessionRow(**{field.name: row[field.name] for field in fields(SessionRow)})


def backoff_ms(attempt: int) -> int:
    """Return the wait after failed attempt number `attempt` (1-based): about 2, 4, 8 … s, at most 15 min.

    With a tenth of jitter, so that what failed together is not tried together.
    """
    if attempt < 1:
        raise ValueError("attempts are counted from 1")
    wait_s = min(limits.BACKOFF_MAX_S, limits.BACKOFF_FIRST_S * 2.0 ** min(attempt - 1, 30))
    return int(wait_s * 1000 * random.uniform(0.9, 1.1))


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
            _tell(tx, "message-superseded", session, old["id"], None)
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
    _tell(tx, "message-queued", session, message, None, channel=event.channel, size_bytes=size)
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


def claim_turn(tx: Transaction, session: SessionRow, *, attempts: int) -> Turn | None:
    """Lease the session's oldest message, if it is due, to a new turn, with those behind it that fit.

    None if there is none, or one is leased already. A second attempt has the same messages as the first, as
    the agent remembers them; further ones, and the last of the `attempts` that a message gets, have a single
    message, so that one that breaks every turn takes no other along.
    """
    head = tx.one(
        "claim_message", session=session.id, turn=new_turn_id(), now=now_ms(), expires=_lease_end()
    )
    if head is None:
        return None
    turn = _turn(tx, [head])
    if head["attempts"] <= limits.SHARED_ATTEMPTS and head["attempts"] < attempts:
        first_turn = None if head["first_turn"] == turn.id else head["first_turn"]
        turn.messages += _join(tx, session, turn, first_turn)
    for message in turn.messages:
        _tell(tx, "message-leased", session, message.id, turn.id, attempt=turn.attempt)
    return turn


def next_due(tx: Transaction, session: SessionRow) -> int | None:
    """Return when the session's oldest message may be tried (ms); None: there is none, or it runs."""
    row = tx.one("next_message", session=session.id)
    return None if row is None or row["state"] == MessageState.LEASED else row["not_before"]


def join_turn(tx: Transaction, session: SessionRow, turn: Turn) -> list[Message]:
    """Lease to a running first attempt what has arrived behind its messages, oldest first; returns it.

    The caller adds it to the turn once that is on disk.
    """
    joining = _join(tx, session, turn, None) if turn.first == turn.id else []
    for message in joining:
        _tell(tx, "message-leased", session, message.id, turn.id, attempt=turn.attempt)
    return joining


def _join(tx: Transaction, session: SessionRow, turn: Turn, first_turn: str | None) -> list[Message]:
    room = limits.TURN_MESSAGES - len(turn.messages)
    space = limits.TURN_BYTES - sum(_wire_bytes(message.text + message.context) for message in turn.messages)
    joining = []
    for row in tx.all("behind_turn", session=session.id, limit=max(0, room)):
        space -= _wire_bytes(row["body"] + row["context"])
        if row["first_turn"] != first_turn or place_of(row) != turn.place or space < 0:
            break
        if row["command"] or turn.messages[0].command:  # it has a turn of its own
            break
        tx.all("join_turn", seq=row["seq"], turn=turn.id, expires=_lease_end())
        joining.append(_message(tx, row))
    return joining


def leased_turn(tx: Transaction, session: SessionRow) -> Turn | None:
    """Return the turn that the session has leased, if any."""
    rows = tx.all("leased_messages", session=session.id)
    return _turn(tx, rows) if rows else None


def _turn(tx: Transaction, rows: Sequence[Row]) -> Turn:
    head = rows[0]
    attempt = head["attempts"] + head["deferrals"]
    sent = []
    if head["first_turn"] != head["turn"]:
        sent = tx.all("already_sent", message=head["id"], first_turn=head["first_turn"])
    return Turn(
        id=TurnId(head["turn"]),
        first=TurnId(head["first_turn"]),
        attempt=attempt,
        messages=[_message(tx, row) for row in rows],
        already_sent=[(row["key"], row["body"][: limits.ALREADY_SENT_CHARACTERS]) for row in sent],
        stopping=any(row["stopping"] for row in rows),
    )


def _message(tx: Transaction, row: Row) -> Message:
    return Message(
        id=MessageId(row["id"]),
        place=place_of(row),
        event=row["event"],
        sender=row["sender"],
        text=row["body"],
        received_at=row["received_at"],
        context=row["context"],
        command=row["command"],
        hops=row["hops"],
        files=tx.all("files_of_event", **{name: row[name] for name in _EVENT_KEY}),
    )


def _wire_bytes(text: str) -> int:
    return len(wire.encode({"": text}))


def renew_lease(tx: Transaction, session: SessionRow, turn: TurnId) -> bool:
    """Return whether the turn still has its lease, now until a full lease from now."""
    return bool(tx.all("renew_lease", session=session.id, turn=turn, expires=_lease_end()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Saying:
    """What an agent sends in mid-turn."""

    kind: DeliveryKind = DeliveryKind.MESSAGE
    text: str
    place: Place | None = None  #: None: where its turn is
    target_key: str | None = None  #: the delivery that it is about
    target_event: str | None = None  #: the event that it is about
    choices: Sequence[str] = ()


def send(tx: Transaction, session: SessionRow, turn: Turn, key: str, saying: Saying) -> None:
    """Publish what the agent sends in mid-turn, as turn.full_key() names it; the same key again, by a later
    attempt too, changes nothing.

    Raises Refused.
    """
    (count,) = tx.all("count_sends", message=turn.message, key=key)
    if count["sends"] >= limits.SENDS_PER_TURN:
        raise Refused(f"more than {limits.SENDS_PER_TURN} messages in one turn")
    # Each message of a shared attempt must find it, also when it is tried alone.
    about = turn.first if len(turn.messages) > 1 else turn.id
    message = turn.messages[-1]
    say(tx, session.agent, message.id, key, saying, place=saying.place or turn.place, turn=about, to=message)


def say(
    tx: Transaction,
    agent: AgentName,
    message: str | None,
    key: str,
    saying: Saying,
    *,
    place: Place,
    turn: str | None = None,
    to: Message | None = None,
) -> None:
    """Publish what an agent says in `place`, because of `message`; it answers `to`, if said there."""
    answered = to.event if to is not None and to.place == place and to.is_event else None
    channel, chat, thread = place
    tx.all(
        "publish_more",
        key=key,
        message=message,
        turn=turn,
        agent=agent,
        channel=channel,
        chat=chat,
        thread=thread,
        kind=saying.kind,
        body=saying.text,
        in_reply_to=answered if saying.target_event is None else saying.target_event,
        now=now_ms(),
        target_key=saying.target_key,
        target_event=saying.target_event,
        choices=json.dumps(saying.choices) if saying.choices else "",
    )
    tx.places.append(place)


def finish_turn(
    tx: Transaction,
    session: SessionRow,
    turn: Turn,
    state: MessageState,
    replies: Sequence[str],
    answers: Sequence[str] = (),
    last: str | None = None,
) -> None:
    """End a turn: its messages are acknowledged and its replies are in the outbox, or neither.

    `answers` has the id of the message that each reply is for, or "": for all. `last` is the last message
    that the runner has seen; those behind it go back to the queue. Raises NotFound, Refused.
    """
    unseen = turn.behind(last) if last is not None else []
    for message in unseen:
        tx.all("leave_turn", id=message.id, turn=turn.id)
        _tell(tx, "message-put-back", session, message.id, turn.id)
    if not tx.all("finish_turn", session=session.id, turn=turn.id, state=state, now=now_ms()):
        raise NotFound(f"turn {turn.id} has no lease any more")
    _end(tx, session, "end_stopping")
    seen = turn.messages[: len(turn.messages) - len(unseen)]
    for message in seen:
        _tell(
            tx, f"message-{state}", session, message.id, turn.id, attempt=turn.attempt, replies=len(replies)
        )
    known = {message.id: message for message in seen}
    for number, text in enumerate(replies):
        answered = answers[number] if answers else ""
        if answered and answered not in known:
            raise Refused(f"answers[{number}]: the turn has no such message")
        key = f"{turn.message}.reply{number}"
        message = known[MessageId(answered)] if answered else seen[-1]
        _publish(tx, session, message, key, DeliveryKind.REPLY, text, None if answered else turn.id)
    if state is MessageState.STOPPED:
        _notify(tx, session, seen[-1], turn, "Stopped.")


def fail_turn(
    tx: Transaction,
    session: SessionRow,
    *,
    reason: str,
    how: Treatment,
    attempts: int,
    retry_after_ms: int = 0,
) -> Failure | None:
    """Put what the session has leased back for a later attempt, or bury it with a notice in its chat.

    `attempts` is how many a message gets. What the person said stop to ends so. Returns None if nothing else
    was leased.
    """
    _end(tx, session, "end_stopping")
    rows = tx.all("leased_messages", session=session.id)
    if not rows:
        return None
    turn = _turn(tx, rows)
    again = [row for row in rows if _may_try_again(row, how, attempts)]
    if dead := [row for row in rows if row not in again]:
        _bury(tx, session, dead, reason, turn if len(dead) == len(rows) else None)
    if not again:
        return Failure(messages=rows, not_before=None)
    wait = max(_backoff_ms(again[0], how), min(retry_after_ms, int(limits.RETRY_AFTER_MAX_S * 1000)))
    not_before = now_ms() + wait
    for row in again:
        tx.all("requeue_message", id=row["id"], not_before=not_before, reason=reason)
        _tell_retry(tx, session, row, reason, wait)
        if how is Treatment.DEFER:
            tx.all("count_deferral", id=row["id"])
        elif how is Treatment.SPLIT:
            tx.all("end_sharing", id=row["id"], attempts=min(limits.SHARED_ATTEMPTS, attempts - 1))
    if how is Treatment.DEFER and wait >= limits.DELAY_NOTICE_S * 1000:
        text = f"Still waiting: {one_line(reason).rstrip('.')}. This is tried again by itself."
        _notify(tx, session, turn.messages[-1], turn, text, name="delay")
    return Failure(messages=rows, not_before=not_before)


def _may_try_again(row: Row, how: Treatment, attempts: int) -> bool:
    if how is Treatment.DEFER:
        return int(row["deferrals"]) < limits.DEFERRALS
    return how in (Treatment.RETRY, Treatment.SPLIT) and int(row["attempts"]) < attempts


def _backoff_ms(row: Row, how: Treatment) -> int:
    if how is Treatment.SPLIT:
        return 0
    return backoff_ms(row["deferrals"] + 1 if how is Treatment.DEFER else max(1, row["attempts"]))


def put_back(tx: Transaction, session: SessionRow) -> None:
    """Put what the session has leased back into the queue: we broke its turn off."""
    _end(tx, session, "end_stopping")
    for row in tx.all("put_back", session=session.id):
        _tell(tx, "message-put-back", session, row["id"], row["turn"])


def fail_start(
    tx: Transaction, session: SessionRow, *, reason: str, final: bool, attempts: int
) -> Failure | None:
    """The session's container did not start: that counts as an attempt at its oldest message.

    `final`: another start would end alike. Returns None if nothing waits.
    """
    message = tx.one("next_message", session=session.id)
    if message is None:
        return None
    tried = message["attempts"] + 1
    wait = backoff_ms(tried)
    not_before = now_ms() + wait
    tx.all("fail_start", id=message["id"], not_before=not_before, reason=reason)
    if not final and tried < attempts:
        _tell_retry(tx, session, message, reason, wait)
        return Failure(messages=[message], not_before=not_before)
    _bury(tx, session, [message], reason)
    return Failure(messages=[message], not_before=None)


def bury_session(tx: Transaction, session: SessionRow, reason: str) -> list[str]:
    """End all that waits for a session as dead letters, because a person wants it so; returns the events."""
    rows = tx.all("open_messages", session=session.id)
    if rows:
        _bury(tx, session, rows, reason, level=journal.info)
    return [row["event"] for row in rows]


def _bury(
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
        _tell(tx, "message-dead", session, row["id"], row["turn"], reason, level, **counts)
    told = rows[-1:] if turn is not None else rows
    for row in told:
        subject = "Your message" if len(rows) == 1 or turn is None else f"Your last {len(rows)} messages"
        text = f"{subject} could not be answered: {one_line(reason)}"
        _notify(tx, session, _message(tx, row), turn, text, life=row["revived"])


def one_line(reason: str) -> str:
    """Return what a person sees of a reason: one line, neither a stack nor a body."""
    line = " ".join(reason.split())
    return line if len(line) <= limits.REASON_CHARACTERS else f"{line[: limits.REASON_CHARACTERS - 1]}…"


def stop_session(tx: Transaction, session: SessionRow, place: Place) -> tuple[list[str], bool]:
    """The person said stop: end all that waits for a session in one chat. What its turn has is not tried
    again.

    Returns the events of what has ended, and whether there is such a turn.
    """
    where = dict(zip(("channel", "chat", "thread"), place, strict=True))
    ended = _end(tx, session, "finish_queued", **where)
    return ended, bool(tx.all("mark_stopping", session=session.id, **where))


def _end(tx: Transaction, session: SessionRow, query: str, **where: str) -> list[str]:
    """End messages as stopped, and say so in their chat; returns the events."""
    end = {"state": MessageState.STOPPED, "now": now_ms(), "reason": "stopped by the person"}
    stopped = tx.all(query, session=session.id, **end, **where)
    for row in stopped:
        _notify(tx, session, _message(tx, row), None, "Stopped.", life=row["revived"])
        _tell(tx, "message-stopped", session, row["id"], None)
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


def _tell(
    tx: Transaction,
    event: str,
    session: SessionRow,
    message: str,
    turn: str | None,
    text: str = "",
    level: Callable[..., None] = journal.info,
    **fields: Any,
) -> None:
    """Tell the journal of a message: with its id, these lines are its story."""
    unit = unit_name(session.agent, session.name)
    tx.tell(level, event, text, message=message, turn=turn, agent=session.agent, unit=unit, **fields)


def _tell_retry(tx: Transaction, session: SessionRow, row: Row, reason: str, wait_ms: int) -> None:
    counts = {name: row[name] for name in ("attempts", "deferrals")}
    text = f"{reason}, retrying in {wait_ms / 1000:.0f} s"
    _tell(tx, "message-failed", session, row["id"], row["turn"], text, journal.warning, **counts)


def _lease_end() -> int:
    return now_ms() + int(limits.LEASE_S * 1000)


def _notify(
    tx: Transaction,
    session: SessionRow,
    message: Message,
    turn: Turn | None,
    text: str,
    *,
    name: str = "notice",
    life: int = 0,
) -> None:
    # A dead letter that an operator put back may die again, and that is to be told, too.
    key = f"{message.id}.{name}{life or ''}"
    _publish(tx, session, message, key, DeliveryKind.NOTICE, text, None if turn is None else turn.id)


def _publish(
    tx: Transaction,
    session: SessionRow,
    message: Message,
    key: str,
    kind: DeliveryKind,
    text: str,
    turn: TurnId | None,
) -> None:
    """Queue something for the chat: about a whole turn, or about `message` alone."""
    channel, chat, thread = message.place
    tx.all(
        "publish",
        key=key,
        message=message.id,
        turn=turn,
        agent=session.agent,
        channel=channel,
        chat=chat,
        thread=thread,
        kind=kind,
        body=text,
        in_reply_to=message.event if message.is_event else None,
        now=now_ms(),
    )
    tx.places.append(message.place)
