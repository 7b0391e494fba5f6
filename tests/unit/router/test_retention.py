"""What is old goes, what is needed stays; a little at a time, and once a day."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from nanoclawd import limits, paths, retention
from nanoclawd.audit import Audit
from nanoclawd.budget import NO_LIMITS
from nanoclawd.db import Database, now_ms
from nanoclawd.errors import Unavailable
from nanoclawd.filestore import FileStore
from nanoclawd.ids import AgentName
from nanoclawd.settings import parse_settings
from nanoclawd.usage import Usage
from tests.support.router import Place
from tests.support.varlink_peer import eventually

DAY_MS = retention.DAY_S * 1000
OLD, NEW = 31, 29  #: days


def usage(store: Store) -> Usage:
    return Usage(store.database, lambda agent: NO_LIMITS)


class Store:
    """A database with rows of any age and state, which a connection of its own writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.database: Database
        self._numbers = iter(range(1 << 30))

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Database]:
        self.database = await Database.open(self.path)
        running = asyncio.create_task(self.database.run())
        self.sql("INSERT INTO agent VALUES ('berta', 0, 0, 0)")
        self.sql("INSERT INTO session VALUES (1, 'berta', 's_1', 'c', 'chat', '', 0, NULL, 0)")
        self.sql("INSERT INTO session VALUES (2, 'gone', 's_2', 'c', 'chat', '', 0, NULL, 0)")
        try:
            yield self.database
        finally:
            running.cancel()
            await asyncio.wait([running])
            await self.database.close()

    def sql(self, statement: str, *values: Any) -> list[Any]:
        with closing(sqlite3.connect(self.path)) as connection, connection:
            connection.execute("PRAGMA foreign_keys = ON")
            return connection.execute(statement, values).fetchall()

    def _insert(self, table: str, values: dict[str, Any]) -> None:
        marks = ", ".join("?" * len(values))
        self.sql(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({marks})", *values.values())

    def message(self, id: str, state: str, days: int, **more: Any) -> None:
        then = now_ms() - days * DAY_MS
        place = {"session": 1, "channel": "c", "chat": "chat", "thread": "", "event": id, "revision": 0}
        content = {"id": id, "sender": "s", "body": "text", "received_at": then, "turn": "t", "state": state}
        if state == "leased":
            content["lease_expires_at"] = then
        elif state != "queued":
            content["ended_at"] = then
        self._insert("inbox", {**place, **content, **more})

    def delivery(self, message: str | None, state: str, days: int, **more: Any) -> None:
        then = now_ms() - days * DAY_MS
        place = {"agent": "berta", "channel": "c", "chat": "chat", "thread": ""}
        content = {"key": f"{message}.{next(self._numbers)}", "message": message, "state": state}
        content |= {"kind": "reply", "body": "text", "created_at": then}
        if state in ("sent", "dead"):
            content["ended_at"] = then
        self._insert("outbox", {**place, **content, **more})

    def ids(self) -> set[str]:
        return {id for (id,) in self.sql("SELECT id FROM inbox")}

    async def prune(self) -> None:
        await retention.prune(self.database, before=now_ms() - 30 * DAY_MS)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "db")


def run(store: Store, body: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with store.open():
            await body()

    asyncio.run(main())


def test_what_ended_long_ago_goes_with_its_deliveries(store: Store) -> None:
    async def body() -> None:
        for id, state, days in (
            ("answered", "answered", OLD),
            ("stopped", "stopped", OLD),
            ("answered-new", "answered", NEW),
            ("queued", "queued", OLD),
            ("leased", "leased", OLD),
            ("dead", "dead", OLD),
        ):
            store.message(id, state, days)
            store.delivery(id, "sent", days)
        store.message("dropped", "dead", OLD, dropped=1)
        store.delivery("dropped", "dead", OLD, dropped=1)

        await store.prune()

        assert store.ids() == {"answered-new", "queued", "leased", "dead"}
        assert {message for (message,) in store.sql("SELECT message FROM outbox")} == store.ids()

    run(store, body)


@pytest.mark.parametrize(
    ("state", "days"), [("pending", OLD), ("leased", OLD), ("dead", OLD), ("sent", NEW)]
)
def test_a_delivery_that_is_needed_keeps_its_message_and_all_with_it(
    store: Store, state: str, days: int
) -> None:
    async def body() -> None:
        store.message("m", "answered", OLD)
        store.delivery("m", "sent", OLD)
        store.delivery("m", state, days)

        await store.prune()

        assert store.sql("SELECT count(*) FROM outbox") == [(2,)]
        assert store.ids() == {"m"}

    run(store, body)


@pytest.mark.parametrize(("state", "kept"), [("dead", True), ("queued", True), ("answered", False)])
def test_what_a_message_must_be_told_when_it_is_tried_again_is_kept(
    store: Store, state: str, kept: bool
) -> None:
    async def body() -> None:
        store.message("first", "answered", OLD, turn="t9", first_turn="t1")
        store.delivery("first", "sent", OLD, kind="message", turn="t1")
        store.message("second", state, OLD, turn="t8", first_turn="t1")

        await store.prune()

        assert ("first" in store.ids()) == kept

    run(store, body)


def test_deliveries_whose_message_is_gone_go_by_themselves(store: Store) -> None:
    async def body() -> None:
        store.message("open", "queued", OLD, first_turn="t1")
        kept = (
            ("pending", OLD, {}),
            ("dead", OLD, {}),
            ("sent", NEW, {}),
            ("sent", OLD, {"kind": "message", "turn": "t1"}),
        )
        for state, days, more in kept:
            store.delivery(None, state, days, **more)
        before = store.sql("SELECT seq FROM outbox")
        for _ in range(limits.PRUNED_AT_ONCE + 1):
            store.delivery(None, "sent", OLD)
        store.delivery(None, "sent", OLD, kind="message", turn="t2")
        store.delivery(None, "dead", OLD, dropped=1)

        await store.prune()

        assert store.sql("SELECT seq FROM outbox") == before

    run(store, body)


def test_sessions_go_with_the_last_message_of_an_agent_that_was_removed(store: Store) -> None:
    async def body() -> None:
        store.message("gone", "answered", OLD, session=2)
        store.message("gone-new", "answered", NEW, session=2)

        await store.prune()
        assert store.sql("SELECT id FROM session") == [(1,), (2,)]
        store.sql("UPDATE inbox SET ended_at = 0")
        await store.prune()

        assert store.sql("SELECT id FROM session") == [(1,)]

    run(store, body)


def test_each_transaction_is_short(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        for number in range(2 * limits.PRUNED_AT_ONCE + 1):
            store.message(f"m{number}", "answered", OLD)
        left = []

        def delete(tx: Any, ids: list[str]) -> None:
            real(tx, ids)
            left.append(len(tx.all("find_old", before=now_ms(), limit=1000)))

        real = retention._delete
        monkeypatch.setattr(retention, "_delete", delete)

        await store.prune()

        assert left == [limits.PRUNED_AT_ONCE + 1, 1, 0]

    run(store, body)


def test_what_becomes_free_is_used_again(store: Store) -> None:
    async def body() -> None:
        await store.database.check()  # until then nothing is moved from the log into the file
        sizes = []
        for number in range(4):
            store.message(f"m{number}", "answered", OLD, body="x" * 1_000_000)
            store.sql("PRAGMA wal_checkpoint(TRUNCATE)")
            sizes.append(store.path.stat().st_size)
            await store.prune()

        assert sizes[0] > 1_000_000
        assert sizes[3] < 1.1 * sizes[0]

    run(store, body)


@pytest.mark.parametrize(("days", "kept"), [(0, True), (30, False), (40, True)])
def test_it_is_done_at_start_and_once_a_day_unless_all_is_kept(
    store: Store, monkeypatch: pytest.MonkeyPatch, days: int, kept: bool
) -> None:
    async def body() -> None:
        slept: list[float] = []
        settings = parse_settings(f"retention_days = {days}")
        store.message("m0", "answered", OLD)

        async def sleep(seconds: float) -> None:
            assert (f"m{len(slept)}" in store.ids()) == kept
            slept.append(seconds)
            if len(slept) == 3:
                raise asyncio.CancelledError
            store.message(f"m{len(slept)}", "answered", OLD)

        monkeypatch.setattr(retention.asyncio, "sleep", sleep)
        with pytest.raises(asyncio.CancelledError):
            await retention.run(
                store.database,
                Audit(store.database),
                usage(store),
                FileStore(store.database),
                lambda: settings,
                _close_none,
            )

        assert slept == [86_400] * 3

    run(store, body)


def test_a_full_disk_is_met_again_the_next_day(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        store.message("m", "answered", OLD)
        days = iter((1, 2))

        async def write(operation: object) -> None:
            raise Unavailable("the disk is full")

        async def sleep(seconds: float) -> None:
            if next(days) == 2:
                raise asyncio.CancelledError

        monkeypatch.setattr(store.database, "write", write)
        monkeypatch.setattr(retention.asyncio, "sleep", sleep)
        with pytest.raises(asyncio.CancelledError):
            await retention.run(
                store.database,
                Audit(store.database),
                usage(store),
                FileStore(store.database),
                lambda: parse_settings(""),
                _close_none,
            )

        assert store.ids() == {"m"}

    run(store, body)


async def _close_none(before: int) -> None:
    raise AssertionError("nothing says that sessions are closed")


def test_sessions_that_nobody_uses_are_closed_and_what_waits_is_not(place: Place) -> None:
    async def body() -> None:
        async with place.router() as router:
            for chat in ("old", "new", "waits"):
                await router.deliver("hello", chat=chat)
            await router.settled()
            place.registry.held.add("berta")
            await place.systemd.end_all()
            await eventually(lambda: not list(router.sessions.live()))
            await router.deliver("hello?", chat="waits")
            old = "UPDATE session SET used_at = 1000 WHERE chat != 'new'"
            await router.db.write(lambda tx: tx._connection.execute(old))
            rows = {row["chat"]: row for row in await router.db.read("list_sessions", agent="berta")}
            kept = paths.session_state(AgentName("berta"), rows["old"]["name"])
            kept.mkdir(parents=True, exist_ok=True)

            await router.sessions.close_unused(2000)

            rows = {row["chat"]: row for row in await router.db.read("list_sessions", agent="berta")}
            assert [bool(rows[chat]["closed_at"]) for chat in ("old", "new", "waits")] == [
                True,
                False,
                False,
            ]
            assert not kept.exists()
            await router.deliver("again", chat="old")
            (row,) = await router.db.read(
                "find_session", agent="berta", channel="test", chat="old", thread=""
            )
            assert (row["closed_at"], row["used_at"] > 2000) == (None, True)

    place.run(body)
