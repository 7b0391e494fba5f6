"""Turns: messages that are leased together, what an agent says meanwhile, and how they end.

Each function is one step of a write.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from enum import StrEnum

from nanoclawd import journal, limits, wire
from nanoclawd.db import Row, Transaction, now_ms
from nanoclawd.errors import NotFound, Refused
from nanoclawd.ids import AgentName, MessageId, TurnId, new_turn_id
from nanoclawd.messages import (
    DeliveryKind,
    Failure,
    Message,
    Place,
    Saying,
    SessionRow,
    Turn,
    message_of,
    notify,
    one_line,
    place_of,
    publish,
    tell,
)
from nanoclawd.queue import bury, end_stopped
from nanoclawd.states import MessageState


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


def backoff_ms(attempt: int) -> int:
    """Return the wait after failed attempt number `attempt` (1-based): about 2, 4, 8 … s, at most 15 min.

    With a tenth of jitter, so that what failed together is not tried together.
    """
    if attempt < 1:
        raise ValueError("attempts are counted from 1")
    wait_s = min(limits.BACKOFF_MAX_S, limits.BACKOFF_FIRST_S * 2.0 ** min(attempt - 1, 30))
    return int(wait_s * 1000 * random.uniform(0.9, 1.1))


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
        tell(tx, "message-leased", session, message.id, turn.id, attempt=turn.attempt)
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
        tell(tx, "message-leased", session, message.id, turn.id, attempt=turn.attempt)
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
        joining.append(message_of(tx, row))
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
        messages=[message_of(tx, row) for row in rows],
        already_sent=[(row["key"], row["body"][: limits.ALREADY_SENT_CHARACTERS]) for row in sent],
        stopping=any(row["stopping"] for row in rows),
    )


def _wire_bytes(text: str) -> int:
    return len(wire.encode({"": text}))


def renew_lease(tx: Transaction, session: SessionRow, turn: TurnId) -> bool:
    """Return whether the turn still has its lease, now until a full lease from now."""
    return bool(tx.all("renew_lease", session=session.id, turn=turn, expires=_lease_end()))


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
        tell(tx, "message-put-back", session, message.id, turn.id)
    if not tx.all("finish_turn", session=session.id, turn=turn.id, state=state, now=now_ms()):
        raise NotFound(f"turn {turn.id} has no lease any more")
    end_stopped(tx, session, "end_stopping")
    seen = turn.messages[: len(turn.messages) - len(unseen)]
    for message in seen:
        tell(
            tx, f"message-{state}", session, message.id, turn.id, attempt=turn.attempt, replies=len(replies)
        )
    known = {message.id: message for message in seen}
    for number, text in enumerate(replies):
        answered = answers[number] if answers else ""
        if answered and answered not in known:
            raise Refused(f"answers[{number}]: the turn has no such message")
        key = f"{turn.message}.reply{number}"
        message = known[MessageId(answered)] if answered else seen[-1]
        publish(tx, session, message, key, DeliveryKind.REPLY, text, None if answered else turn.id)
    if state is MessageState.STOPPED:
        notify(tx, session, seen[-1], turn, "Stopped.")


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
    end_stopped(tx, session, "end_stopping")
    rows = tx.all("leased_messages", session=session.id)
    if not rows:
        return None
    turn = _turn(tx, rows)
    again = [row for row in rows if _may_try_again(row, how, attempts)]
    if dead := [row for row in rows if row not in again]:
        bury(tx, session, dead, reason, turn if len(dead) == len(rows) else None)
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
        notify(tx, session, turn.messages[-1], turn, text, name="delay")
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
    end_stopped(tx, session, "end_stopping")
    for row in tx.all("put_back", session=session.id):
        tell(tx, "message-put-back", session, row["id"], row["turn"])


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
    bury(tx, session, [message], reason)
    return Failure(messages=[message], not_before=None)


def _tell_retry(tx: Transaction, session: SessionRow, row: Row, reason: str, wait_ms: int) -> None:
    counts = {name: row[name] for name in ("attempts", "deferrals")}
    text = f"{reason}, retrying in {wait_ms / 1000:.0f} s"
    tell(tx, "message-failed", session, row["id"], row["turn"], text, journal.warning, **counts)


def _lease_end() -> int:
    return now_ms() + int(limits.LEASE_S * 1000)
