"""Messages against a simple model: none is lost, none answered twice, each ends where a person sees it."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nanoclawd import db as database
from nanoclawd import leases, limits, messages, queue
from nanoclawd.db import Database, Transaction
from nanoclawd.errors import NotFound
from nanoclawd.ids import AgentName
from nanoclawd.leases import Treatment
from nanoclawd.messages import Event, Saying, SessionRow, Turn
from nanoclawd.states import MessageState

BERTA = AgentName("berta")


def event(number: int, chat: str = "chat", revision: int = 0) -> Event:
    return Event(
        channel="test",
        chat=chat,
        thread="",
        event=f"e{number}",
        revision=revision,
        sender="someone",
        text=f"text {number}",
    )


class Queue(RuleBasedStateMachine):
    """Two chats, one agent; the clock is the machine's."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.directory = Path(tempfile.mkdtemp(prefix="queue-"))
        self.now = 1_000_000_000_000
        self._patch = pytest.MonkeyPatch()
        for module in (queue, leases, messages):
            self._patch.setattr(module, "now_ms", lambda: self.now)
        self.db = self.loop.run_until_complete(Database.open(self.directory / "db"))
        self.writer = self.loop.create_task(self.db.run())
        self.sessions: dict[str, SessionRow] = {}
        self.waiting: dict[str, list[str]] = {"one": [], "two": []}  #: open messages by chat, oldest first
        self.turns: dict[str, Turn] = {}
        self.attempts: dict[str, int] = {}
        self.deferrals: dict[str, int] = {}
        self.first_turns: dict[str, str] = {}
        self.not_before: dict[str, int] = {}
        self.ended: dict[str, MessageState] = {}
        self.ids: dict[int, str] = {}
        self.stopping: set[str] = set()  #: what a turn had when the person said stop
        self.replies = 0

    def teardown(self) -> None:
        self.writer.cancel()
        self.loop.run_until_complete(asyncio.gather(self.writer, return_exceptions=True))
        self.loop.run_until_complete(self.db.close())
        self.loop.close()
        shutil.rmtree(self.directory)
        self._patch.undo()

    def write(self, operation: Callable[[Transaction], Awaitable[Any]]) -> Any:
        return self.loop.run_until_complete(self.db.write(operation))

    def rows(self, table: str) -> list[database.Row]:
        sql = f"SELECT * FROM {table} ORDER BY seq"
        return list(self.loop.run_until_complete(self.db._reader.execute_fetchall(sql)))

    def head(self, chat: str) -> str | None:
        return self.waiting[chat][0] if self.waiting[chat] else None

    def end(self, chat: str, ended: list[str], state: MessageState) -> None:
        self.waiting[chat] = [id for id in self.waiting[chat] if id not in ended]
        self.ended |= dict.fromkeys(ended, state)

    def add(self, chat: str, message: str) -> None:
        self.waiting[chat].append(message)
        self.attempts[message] = self.deferrals[message] = 0

    def joining(self, chat: str, behind: int, room: int, first_turn: str | None) -> list[str]:
        """What may share a turn with the first `behind` messages: what began with them."""
        like = itertools.takewhile(
            lambda id: self.first_turns.get(id) == first_turn, self.waiting[chat][behind:]
        )
        return list(like)[:room]

    def join_model(self, turn: Turn, ids: list[str]) -> None:
        for id in ids:
            self.attempts[id] += 1
            self.first_turns.setdefault(id, turn.id)

    @initialize()
    def start(self) -> None:
        for number, chat in enumerate(self.waiting, start=1_000_000):
            message, session = self.write(lambda tx, n=number, c=chat: queue.enqueue(tx, BERTA, event(n, c)))
            self.sessions[chat] = session
            self.add(chat, message)

    @rule(number=st.integers(0, 20), chat=st.sampled_from(["one", "two"]))
    def deliver(self, number: int, chat: str) -> None:
        key = number * 2 + (chat == "two")
        message, session = self.write(lambda tx: queue.enqueue(tx, BERTA, event(key, chat)))
        if key in self.ids:
            assert (message, session) == (self.ids[key], None)
        else:
            assert session == self.sessions[chat]
            self.ids[key] = message
            self.add(chat, message)

    @rule(chat=st.sampled_from(["one", "two"]))
    def claim(self, chat: str) -> None:
        turn = self.write(lambda tx: leases.claim_turn(tx, self.sessions[chat], attempts=limits.ATTEMPTS))
        head = self.head(chat)
        due = head is not None and chat not in self.turns and self.not_before.get(head, 0) <= self.now
        assert (turn is not None) == due
        if turn is not None:
            self.attempts[head] += 1
            assert turn.attempt == self.attempts[head] + self.deferrals[head]
            joined = []
            if self.attempts[head] <= limits.SHARED_ATTEMPTS:
                joined = self.joining(chat, 1, limits.TURN_MESSAGES - 1, self.first_turns.get(head))
            assert [message.id for message in turn.messages] == [head, *joined]
            self.first_turns.setdefault(head, turn.id)
            self.join_model(turn, joined)
            self.turns[chat] = turn

    @precondition(lambda self: self.turns)
    @rule(data=st.data())
    def join(self, data: st.DataObject) -> None:
        chat = data.draw(st.sampled_from(sorted(self.turns)))
        turn = self.turns[chat]
        room = limits.TURN_MESSAGES - len(turn.messages)
        joining = self.joining(chat, len(turn.messages), room, None) if turn.first == turn.id else []
        joined = self.write(lambda tx: leases.join_turn(tx, self.sessions[chat], turn))
        assert [message.id for message in joined] == joining
        turn.messages += joined
        self.join_model(turn, joining)

    @precondition(lambda self: self.turns)
    @rule(data=st.data(), stopped=st.booleans())
    def finish(self, data: st.DataObject, stopped: bool) -> None:
        chat = data.draw(st.sampled_from(sorted(self.turns)))
        state = MessageState.STOPPED if stopped else MessageState.ANSWERED
        turn = self.turns.pop(chat)
        self.write(lambda tx: leases.finish_turn(tx, self.sessions[chat], turn, state, ["reply"]))
        self.replies += 1
        self.end(chat, [message.id for message in turn.messages], state)
        with pytest.raises(NotFound):
            self.write(lambda tx: leases.finish_turn(tx, self.sessions[chat], turn, state, ["reply"]))

    @precondition(lambda self: self.turns)
    @rule(data=st.data(), key=st.sampled_from(["a", "b"]))
    def send(self, data: st.DataObject, key: str) -> None:
        chat = data.draw(st.sampled_from(sorted(self.turns)))
        turn = self.turns[chat]
        self.write(
            lambda tx: leases.send(tx, self.sessions[chat], turn, turn.full_key(key), Saying(text="text"))
        )

    @precondition(lambda self: self.turns)
    @rule(data=st.data(), how=st.sampled_from(Treatment), after_ms=st.sampled_from([0, 5000, 10**9]))
    def fail(self, data: st.DataObject, how: Treatment, after_ms: int) -> None:
        chat = data.draw(st.sampled_from(sorted(self.turns)))
        turn, session = self.turns.pop(chat), self.sessions[chat]
        ids = self.end_stopping(chat, turn)
        failure = self.write(
            lambda tx: leases.fail_turn(
                tx, session, reason="it broke", how=how, attempts=limits.ATTEMPTS, retry_after_ms=after_ms
            )
        )
        assert [row["id"] for row in failure.messages] == ids if ids else failure is None
        if not ids:
            return
        again = {
            Treatment.BURY: [],
            Treatment.RETRY: [id for id in ids if self.attempts[id] < limits.ATTEMPTS],
            Treatment.SPLIT: [id for id in ids if self.attempts[id] < limits.ATTEMPTS],
            Treatment.DEFER: [id for id in ids if self.deferrals[id] < limits.DEFERRALS],
        }[how]
        if how is Treatment.SPLIT:
            self.attempts |= {id: max(limits.SHARED_ATTEMPTS, self.attempts[id]) for id in again}
        if how is Treatment.DEFER:
            for id in again:
                self.attempts[id] -= 1
                self.deferrals[id] += 1
        assert (failure.not_before is not None) == bool(again)
        if again:
            most_s = max(1.1 * limits.BACKOFF_MAX_S, min(after_ms / 1000, limits.RETRY_AFTER_MAX_S))
            assert self.now <= failure.not_before <= self.now + 1000 * most_s
            self.not_before |= dict.fromkeys(again, failure.not_before)
        self.end(chat, [id for id in ids if id not in again], MessageState.DEAD)
        with pytest.raises(NotFound):  # the turn that failed cannot answer after all
            self.write(lambda tx: leases.finish_turn(tx, session, turn, MessageState.ANSWERED, ["late"]))

    @precondition(lambda self: self.turns)
    @rule(data=st.data())
    def put_back(self, data: st.DataObject) -> None:
        chat = data.draw(st.sampled_from(sorted(self.turns)))
        turn = self.turns.pop(chat)
        self.write(lambda tx: leases.put_back(tx, self.sessions[chat]))
        for id in self.end_stopping(chat, turn):
            self.attempts[id] -= 1
            self.not_before[id] = 0

    def end_stopping(self, chat: str, turn: Turn) -> list[str]:
        """End what the person said stop to; return the other messages of the turn."""
        ids = [message.id for message in turn.messages]
        self.end(chat, [id for id in ids if id in self.stopping], MessageState.STOPPED)
        return [id for id in ids if id not in self.stopping]

    @rule(chat=st.sampled_from(["one", "two"]), final=st.booleans())
    def fail_to_start(self, chat: str, final: bool) -> None:
        if chat in self.turns:
            return
        failure = self.write(
            lambda tx: leases.fail_start(
                tx, self.sessions[chat], reason="no container", final=final, attempts=limits.ATTEMPTS
            )
        )
        head = self.head(chat)
        assert (failure is None) == (head is None)
        if failure is not None:
            self.attempts[head] += 1
            if final or self.attempts[head] >= limits.ATTEMPTS:
                assert failure.not_before is None
                self.end(chat, [head], MessageState.DEAD)
            else:
                assert failure.not_before > self.now
                self.not_before[head] = failure.not_before

    @rule(chat=st.sampled_from(["one", "two"]))
    def bury(self, chat: str) -> None:
        """The agent is removed."""
        open_messages = self.waiting[chat]
        buried = self.write(lambda tx: queue.bury_session(tx, self.sessions[chat], "it was removed"))
        assert len(buried) == len(open_messages)
        self.end(chat, open_messages, MessageState.DEAD)
        self.turns.pop(chat, None)

    @rule(chat=st.sampled_from(["one", "two"]))
    def stop(self, chat: str) -> None:
        stopped, runs = self.write(
            lambda tx: queue.stop_session(tx, self.sessions[chat], self.sessions[chat].place)
        )
        running = len(self.turns[chat].messages) if chat in self.turns else 0
        waiting = self.waiting[chat][running:]
        assert (len(stopped), runs) == (len(waiting), running > 0)
        self.stopping |= {*self.waiting[chat][:running]}
        self.end(chat, waiting, MessageState.STOPPED)

    @rule(seconds=st.sampled_from([1, 10, 1000]))
    def wait(self, seconds: int) -> None:
        self.now += seconds * 1000

    @rule()
    def restart(self) -> None:
        """Open the database anew, as after kill -9 between two commits."""
        self.teardown_database()
        self.db = self.loop.run_until_complete(Database.open(self.directory / "db"))
        self.writer = self.loop.create_task(self.db.run())

    def teardown_database(self) -> None:
        self.writer.cancel()
        self.loop.run_until_complete(asyncio.gather(self.writer, return_exceptions=True))
        self.loop.run_until_complete(self.db.close())

    @invariant()
    def nothing_is_lost_or_said_twice(self) -> None:
        messages = {row["id"]: row for row in self.rows("inbox")}
        assert set(messages) == set(self.attempts)
        for id, row in messages.items():
            expected = self.ended.get(id)
            if expected is None:
                leased = any(message.id == id for turn in self.turns.values() for message in turn.messages)
                expected = MessageState.LEASED if leased else MessageState.QUEUED
            tries = (row["attempts"], row["deferrals"])
            assert (row["state"], *tries) == (expected, self.attempts[id], self.deferrals[id])
            assert row["attempts"] <= limits.ATTEMPTS and row["deferrals"] <= limits.DEFERRALS
        deliveries = self.rows("outbox")
        assert sum(row["kind"] == "reply" for row in deliveries) == self.replies
        notices = [row for row in deliveries if row["kind"] == "notice" and ".delay" not in row["key"]]
        noticed = {row["message"] for row in notices}
        turns = {row["turn"] for row in notices} - {None}
        for id, state in self.ended.items():
            if state != MessageState.ANSWERED:
                assert id in noticed or messages[id]["turn"] in turns
        assert noticed <= set(self.ended)


TestQueue = Queue.TestCase
TestQueue.settings = settings(
    max_examples=15, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.parametrize("attempt", [1, 2, 3, 10, 1000])
def test_backoff_doubles_up_to_its_limit(attempt: int) -> None:
    expected = min(limits.BACKOFF_MAX_S, limits.BACKOFF_FIRST_S * 2 ** (attempt - 1))

    waits = [leases.backoff_ms(attempt) for _ in range(100)]

    assert all(0.9 * 1000 * expected - 1 <= wait <= 1.1 * 1000 * expected for wait in waits)
    assert len(set(waits)) > 1


def test_backoff_counts_from_one() -> None:
    with pytest.raises(ValueError, match="from 1"):
        leases.backoff_ms(0)
