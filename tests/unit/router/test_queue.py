"""Messages against a simple model: none is lost, none answered twice, each ends where a person sees it."""

from __future__ import annotations

import asyncio
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
from nanoclawd import limits, queue
from nanoclawd.db import Database, Transaction
from nanoclawd.errors import NotFound
from nanoclawd.ids import AgentName
from nanoclawd.queue import Event, MessageState, SessionRow, Turn

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
        self._real_now = queue.now_ms
        queue.now_ms = lambda: self.now  # type: ignore[assignment]
        self.db = self.loop.run_until_complete(Database.open(self.directory / "db"))
        self.writer = self.loop.create_task(self.db.run())
        self.sessions: dict[str, SessionRow] = {}
        self.waiting: dict[str, list[str]] = {"one": [], "two": []}  #: open messages by chat, oldest first
        self.turns: dict[str, Turn] = {}
        self.attempts: dict[str, int] = {}
        self.not_before: dict[str, int] = {}
        self.ended: dict[str, MessageState] = {}
        self.ids: dict[int, str] = {}
        self.replies = 0

    def teardown(self) -> None:
        self.writer.cancel()
        self.loop.run_until_complete(asyncio.gather(self.writer, return_exceptions=True))
        self.loop.run_until_complete(self.db.close())
        self.loop.close()
        shutil.rmtree(self.directory)
        queue.now_ms = self._real_now

    def write(self, operation: Callable[[Transaction], Awaitable[Any]]) -> Any:
        return self.loop.run_until_complete(self.db.write(operation))

    def rows(self, table: str) -> list[database.Row]:
        sql = f"SELECT * FROM {table} ORDER BY seq"
        return list(self.loop.run_until_complete(self.db._reader.execute_fetchall(sql)))

    def head(self, chat: str) -> str | None:
        return self.waiting[chat][0] if self.waiting[chat] else None

    def end(self, chat: str, state: MessageState) -> None:
        message = self.waiting[chat].pop(0)
        self.ended[message] = state
        self.turns.pop(chat, None)

    @initialize()
    def start(self) -> None:
        for number, chat in enumerate(self.waiting, start=1_000_000):
            message, session = self.write(lambda tx, n=number, c=chat: queue.enqueue(tx, BERTA, event(n, c)))
            self.sessions[chat] = session
            self.waiting[chat].append(message)
            self.attempts[message] = 0

    @rule(number=st.integers(0, 20), chat=st.sampled_from(["one", "two"]))
    def deliver(self, number: int, chat: str) -> None:
        key = number * 2 + (chat == "two")
        message, session = self.write(lambda tx: queue.enqueue(tx, BERTA, event(key, chat)))
        if key in self.ids:
            assert (message, session) == (self.ids[key], None)
        else:
            assert session == self.sessions[chat]
            self.ids[key] = message
            self.waiting[chat].append(message)
            self.attempts[message] = 0

    @rule(chat=st.sampled_from(["one", "two"]))
    def claim(self, chat: str) -> None:
        turn = self.write(lambda tx: queue.claim_turn(tx, self.sessions[chat]))
        head = self.head(chat)
        due = head is not None and chat not in self.turns and self.not_before.get(head, 0) <= self.now
        assert (turn is not None) == due
        if turn is not None:
            assert turn.message == head
            self.attempts[turn.message] += 1
            assert turn.attempt == self.attempts[turn.message]
            self.turns[chat] = turn

    @precondition(lambda self: self.turns)
    @rule(data=st.data(), stopped=st.booleans())
    def finish(self, data: st.DataObject, stopped: bool) -> None:
        chat = data.draw(st.sampled_from(sorted(self.turns)))
        state = MessageState.STOPPED if stopped else MessageState.ANSWERED
        turn = self.turns[chat]
        self.write(lambda tx: queue.finish_turn(tx, self.sessions[chat], turn, state, ["reply"]))
        self.replies += 1
        self.end(chat, state)
        with pytest.raises(NotFound):
            self.write(lambda tx: queue.finish_turn(tx, self.sessions[chat], turn, state, ["reply"]))

    @precondition(lambda self: self.turns)
    @rule(data=st.data(), key=st.sampled_from(["a", "b"]))
    def send(self, data: st.DataObject, key: str) -> None:
        chat = data.draw(st.sampled_from(sorted(self.turns)))
        turn = self.turns[chat]
        self.write(lambda tx: queue.send_message(tx, self.sessions[chat], turn, key, "text"))

    @precondition(lambda self: self.turns)
    @rule(data=st.data(), retryable=st.booleans(), after_ms=st.sampled_from([None, 0, 5000, 10**9]))
    def fail(self, data: st.DataObject, retryable: bool, after_ms: int | None) -> None:
        chat = data.draw(st.sampled_from(sorted(self.turns)))
        turn, session = self.turns[chat], self.sessions[chat]

        def operation(tx: Transaction) -> int | None:
            row = tx.one("leased_message", session=session.id)
            assert row is not None
            return queue.fail_message(
                tx, session, row, reason="it broke", retryable=retryable, retry_after_ms=after_ms
            )

        self._failed(chat, self.write(operation), retryable)
        with pytest.raises(NotFound):  # the turn that failed cannot answer after all
            self.write(lambda tx: queue.finish_turn(tx, session, turn, MessageState.ANSWERED, ["late"]))

    def _failed(self, chat: str, not_before: int | None, retryable: bool) -> None:
        message = self.waiting[chat][0]
        if retryable and self.attempts[message] < limits.ATTEMPTS:
            assert not_before is not None
            assert self.now < not_before <= self.now + 1.1 * 1000 * limits.BACKOFF_MAX_S
            self.not_before[message] = not_before
            self.turns.pop(chat, None)
        else:
            assert not_before is None
            self.end(chat, MessageState.DEAD)

    @rule(chat=st.sampled_from(["one", "two"]))
    def fail_to_start(self, chat: str) -> None:
        if chat in self.turns:
            return
        failed = self.write(lambda tx: queue.fail_start(tx, self.sessions[chat], reason="no container"))
        assert (failed is None) == (self.head(chat) is None)
        if failed is not None:
            self.attempts[self.waiting[chat][0]] += 1
            self._failed(chat, failed[1], True)

    @rule(chat=st.sampled_from(["one", "two"]))
    def stop(self, chat: str) -> None:
        stopped = self.write(lambda tx: queue.stop_session(tx, self.sessions[chat]))
        running = 1 if chat in self.turns else 0
        assert len(stopped) == len(self.waiting[chat]) - running
        while len(self.waiting[chat]) > running:
            self.ended[self.waiting[chat].pop()] = MessageState.STOPPED

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
                leased = any(turn.message == id for turn in self.turns.values())
                expected = MessageState.LEASED if leased else MessageState.QUEUED
            assert (row["state"], row["attempts"]) == (expected, self.attempts[id])
            assert row["attempts"] <= limits.ATTEMPTS
        deliveries = self.rows("outbox")
        assert sum(row["kind"] == "reply" for row in deliveries) == self.replies
        noticed = {row["message"] for row in deliveries if row["kind"] == "notice"}
        assert {id for id, state in self.ended.items() if state == MessageState.DEAD} <= noticed
        assert noticed <= set(self.ended)


TestQueue = Queue.TestCase
TestQueue.settings = settings(
    max_examples=15, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.parametrize("attempt", [1, 2, 3, 10, 1000])
def test_backoff_doubles_up_to_its_limit(attempt: int) -> None:
    expected = min(limits.BACKOFF_MAX_S, limits.BACKOFF_FIRST_S * 2 ** (attempt - 1))

    waits = [queue.backoff_ms(attempt) for _ in range(100)]

    assert all(0.9 * 1000 * expected - 1 <= wait <= 1.1 * 1000 * expected for wait in waits)
    assert len(set(waits)) > 1


def test_backoff_counts_from_one() -> None:
    with pytest.raises(ValueError, match="from 1"):
        queue.backoff_ms(0)
