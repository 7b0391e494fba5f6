"""The audit trail: its chain, what breaks it, what retention leaves, and what comes from the gateway."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from nanoclawd import gateway_link, limits, recovery
from nanoclawd.audit import NOTHING, Audit, hash_of
from nanoclawd.db import Database, now_ms
from nanoclawd.dbfile import copy, migrations, upgrade
from nanoclawd.errors import Unavailable
from nanoclawd.gateway_link import GatewayLink
from nanoclawd.ids import AgentName
from nanoclawd.wire import Json
from tests.support.router import Place
from tests.support.varlink_peer import eventually
from tests.unit.router.test_gateway_link import GatewayDouble, NoUsage, policy_of, running
from tests.unit.router.test_message_control import operating

DAY_MS = 86_400_000
FORGE = "DROP TRIGGER IF EXISTS audit_stays; DROP TRIGGER IF EXISTS audit_ends;"
BERTA = AgentName("berta")


class Store:
    """A router's database, and somebody else with a connection of their own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.db: Database
        self.audit: Audit

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        self.db = await Database.open(self.path)
        self.audit = Audit(self.db)
        writing = asyncio.create_task(self.db.run())
        try:
            yield
        finally:
            writing.cancel()
            await asyncio.wait([writing])
            await self.db.close()

    def run(self, body: Callable[[], Awaitable[None]]) -> None:
        async def main() -> None:
            async with self.open():
                await body()

        asyncio.run(main())

    def sql(self, script: str) -> None:
        with closing(sqlite3.connect(self.path)) as connection:
            connection.executescript(script)

    def rows(self) -> list[dict[str, Any]]:
        with closing(sqlite3.connect(self.path)) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute("SELECT * FROM audit ORDER BY seq")]

    def events(self) -> list[str]:
        return [row["event"] for row in self.rows()]

    async def note(self, number: int) -> None:
        for n in range(number):
            await self.audit.note("StartAgent", {"n": n}, agent="berta")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "db")


def record(number: int, **more: Any) -> Json:
    blank = dict.fromkeys(("reason", "route", "path", "credential"), "")
    numbers = {"number": number, "at": 1.5, "rule": 0, "status": 200, "count": 1}
    numbers |= {"upBytes": 3, "downBytes": 4}
    who = {"agent": "berta", "session": "s1", "event": "allowed", "method": "GET", "host": "pypi.org:443"}
    return {**blank, **numbers, **who, **more}


def test_each_row_has_the_hash_of_the_one_before(store: Store) -> None:
    async def body() -> None:
        await store.note(3)
        assert (await store.audit.verify()).rows == 3

    store.run(body)

    before = "0" * 64
    for number, row in enumerate(store.rows(), 1):
        # As nanoclawctl(1) tells others to compute it.
        text = f'[{number},{row["at"]},"control","StartAgent","berta","{{\\"n\\":{number - 1}}}","{before}"]'
        assert row["before"] == before
        before = row["hash"]
        assert before == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "statement", ["UPDATE audit SET agent = 'emil' WHERE seq = 1", "DELETE FROM audit WHERE seq = 3"]
)
def test_rows_can_be_added_only(store: Store, statement: str) -> None:
    async def body() -> None:
        await store.note(3)
        with pytest.raises(sqlite3.IntegrityError, match="audit: a row is"):
            store.sql(statement)

    store.run(body)
    assert len(store.rows()) == 3


def rehashed(store: Store, seq: int, **changes: Any) -> None:
    """Change a row, and write the hash that it then has."""
    row = store.rows()[seq - 1] | changes
    values = ", ".join(f"{key} = '{value}'" for key, value in {**changes, "hash": hash_of(row)}.items())
    store.sql(f"{FORGE} UPDATE audit SET {values} WHERE seq = {seq}")


@pytest.mark.parametrize(
    ("forge", "broken", "words"),
    [
        ("UPDATE audit SET detail = '{}' WHERE seq = 4", 4, "was changed"),
        ("UPDATE audit SET at = at + 1 WHERE seq = 9", 9, "was changed"),
        ("UPDATE audit SET seq = 70 WHERE seq = 9", 9, "is missing"),
        ("UPDATE audit SET hash = before WHERE seq = 1", 1, "was changed"),
        ("DELETE FROM audit WHERE seq = 5", 5, "is missing; row 6 comes next"),
        ("DELETE FROM audit WHERE seq <= 5", 1, "is missing; row 6 comes next"),
        ("DELETE FROM audit WHERE seq > 7", 8, "is missing; the last one was row 9"),
        ("DELETE FROM audit", 1, "is missing; the last one was row 9"),
        ("UPDATE audit SET event = 'pruned', kind = 'trail' WHERE seq = 5", 5, "was changed"),
    ],
)
def test_a_row_that_was_tampered_with_is_named(store: Store, forge: str, broken: int, words: str) -> None:
    async def body() -> None:
        await store.note(9)
        assert (await store.audit.verify()).broken is None
        store.sql(f"{FORGE} {forge}")

        verdict = await store.audit.verify()
        assert (verdict.rows, verdict.broken) == (broken - 1, broken)
        assert words in verdict.problem

        await store.note(9)  # what comes after hides nothing
        assert (await store.audit.verify()).broken == broken

    store.run(body)


def test_a_row_with_a_hash_that_was_made_for_it_is_named_by_the_next_one(store: Store) -> None:
    async def body() -> None:
        await store.note(9)
        rehashed(store, 4, agent="emil")

        verdict = await store.audit.verify()
        assert (verdict.broken, verdict.problem) == (4, "it is not the row that row 5 was written after")

        rehashed(store, 9, agent="emil")  # the newest of all: only the journal knows
        rehashed(store, 4, agent="berta")
        assert (await store.audit.verify()).broken is None

    store.run(body)


def test_a_trail_is_longer_than_what_is_read_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "AUDIT_AT_ONCE", 4)

    async def body() -> None:
        await store.note(9)
        verdict = await store.audit.verify()
        assert (verdict.rows, verdict.broken, verdict.head) == (9, None, store.rows()[-1]["hash"])

    store.run(body)


def test_an_empty_trail_is_in_order(store: Store) -> None:
    async def body() -> None:
        verdict = await store.audit.verify()
        assert (verdict.rows, verdict.broken, verdict.head) == (0, None, NOTHING)

    store.run(body)


def test_what_retention_leaves_is_still_a_chain(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "AUDIT_AT_ONCE", 4)

    async def body() -> None:
        await store.note(9)
        await asyncio.sleep(0.002)
        middle = now_ms()
        await store.note(3)

        for _ in range(2):  # a second time there is nothing to do
            await store.audit.prune(before=middle)
            assert store.events() == ["StartAgent"] * 3 + ["pruned"] * 3
            assert [row["seq"] for row in store.rows()] == [*range(10, 16)]
            assert (await store.audit.verify()).broken is None

        await store.audit.prune(before=now_ms() + 1 - DAY_MS)
        with pytest.raises(sqlite3.IntegrityError):
            store.sql("DELETE FROM audit WHERE seq = 10")
        store.sql(f"{FORGE} DELETE FROM audit WHERE seq = 10")
        assert (await store.audit.verify()).broken == 10

    store.run(body)


def test_a_long_detail_is_told_by_its_hash(store: Store) -> None:
    async def body() -> None:
        await store.audit.note("SetAgent", {"description": "x" * 100_000}, agent="y" * 1000)
        (row,) = store.rows()
        assert json.loads(row["detail"]).keys() == {"sha256", "characters"}
        assert len(row["agent"]) == limits.NAME_BYTES
        assert (await store.audit.verify()).broken is None

    store.run(body)


@pytest.mark.parametrize("version", [2, len(migrations())])
def test_a_restored_trail_says_so(store: Store, tmp_path: Path, version: int) -> None:
    with closing(sqlite3.connect(store.path, isolation_level=None)) as old:
        upgrade(old, 0, version)
        copy(old, tmp_path / "backup")
    store.path.unlink()
    recovery.restore(tmp_path / "backup", store.path)

    async def body() -> None:
        await store.note(1)
        assert store.events() == ["restored", "StartAgent"]
        assert (await store.audit.verify()).broken is None

    store.run(body)


# --- from the gateway -------------------------------------------------------------------------------


def test_each_record_of_the_gateway_is_stored_once(store: Store) -> None:
    async def body() -> None:
        await store.audit.take_over("a", [record(1, at=1e308), record(2)])
        await store.audit.take_over("a", [record(2), record(3, event="denied", reason="no-rule")])
        await store.audit.take_over("a", [record(3)])
        assert store.events() == ["gateway_started", "allowed", "allowed", "denied"]

    store.run(body)
    assert store.rows()[1]["at"] <= now_ms()
    row = store.rows()[-1]
    assert (row["at"], row["kind"], row["agent"]) == (1500, "request", "berta")
    assert json.loads(row["detail"]) == {
        "session": "s1",
        "method": "GET",
        "host": "pypi.org:443",
        "status": 200,
        "reason": "no-rule",
        "upBytes": 3,
        "downBytes": 4,
        "count": 1,
    }


def test_what_the_gateway_had_no_room_for_is_counted(store: Store) -> None:
    async def body() -> None:
        await store.audit.take_over("a", [record(1), record(5)])
        await store.audit.take_over("b", [record(3)])

    store.run(body)
    first = ["gateway_started", "allowed", "lost", "allowed"]
    assert store.events() == [*first, "gateway_started", "lost", "allowed"]
    assert [json.loads(r["detail"])["records"] for r in store.rows() if r["event"] == "lost"] == [3, 2]


def test_records_wait_for_the_router_and_come_once(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The router is away, then its disk is full, then it ends between storing and saying so."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(limits, "STORE_AGAIN_S", 0.001)
    monkeypatch.setattr(gateway_link, "_RETRY_S", 0.001)

    async def body() -> None:
        gateway, attempts = GatewayDouble(), iter(range(100))

        async def take_over(life: str, records: Sequence[Json]) -> None:
            attempt = next(attempts)
            if attempt < 2:
                raise Unavailable("the disk is full")
            await store.audit.take_over(life, records)
            if attempt == 2:
                await asyncio.Event().wait()

        def link() -> GatewayLink:
            return GatewayLink(policy_of, take_over, NoUsage())

        async with gateway.served():
            gateway.put(1)
            gateway.put(2)
            async with running(link(), left=True):
                await eventually(lambda: len(store.rows()) == 3)
            gateway.put(3)
            async with running(link(), left=True):
                await eventually(lambda: len(store.rows()) == 4)
                gateway.put(4)
                await eventually(lambda: len(store.rows()) == 5)
                await eventually(lambda: not gateway.trail._waiting)  # and it need not keep them any more
        assert store.events() == ["gateway_started", *["allowed"] * 4]
        assert [json.loads(row["detail"])["status"] for row in store.rows()[1:]] == [1, 2, 3, 4]

    store.run(body)


# --- what a person has done -------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


def test_what_a_person_has_done_is_listed_and_what_they_only_look_at_is_not(place: Place) -> None:
    async def body() -> None:
        async with place.router() as router, operating(place, router) as person:

            async def rows(**wanted: Any) -> list[Json]:
                return [r["row"] for r in await person.stream("ListAudit", **wanted) if r["row"]]

            assert await rows() == []
            await person.call("ListAgents")
            await person.call("StopAll")
            await person.call("StartAll")
            await person.refused("DropDeadLetter", "NotFound", id="m0")
            await person.call("NoteSecret", secret="anthropic", event="secret_set")
            await person.refused("RestartAgent", "NotFound", name="emil")
            await router.audit.take_over("a", [record(1)])

            found = await rows()
            assert [(row["event"], row["agent"], json.loads(row["detail"])) for row in found[:-2]] == [
                ("StopAll", "", {}),
                ("StartAll", "", {}),
                ("DropDeadLetter", "", {"id": "m0"}),
                ("DropDeadLetter", "", {"id": "m0", "failed": "not-found"}),
                ("secret_set", "", {"credential": "anthropic"}),
                ("RestartAgent", "emil", {}),
                ("RestartAgent", "emil", {"failed": "not-found"}),
            ]
            assert [row["seq"] for row in await rows(limit=2)] == [8, 9]
            assert [row["seq"] for row in await rows(agent="emil")] == [6, 7]
            assert [row["seq"] for row in await rows(agent="emil", limit=1)] == [7]
            assert [row["event"] for row in await rows(kind="request")] == ["allowed"]
            assert len(await rows(kind="control", since=found[0]["at"])) == 7
            assert await rows(since=now_ms() / 1000 + 9) == []
            await person.refused("ListAudit", "Refused", limit=0)
            verdict = await person.call("VerifyAudit")
            assert (verdict["rows"], verdict["broken"], verdict["head"]) == (9, None, found[-1]["hash"])

    place.run(body)


def test_a_full_disk_keeps_from_changes_but_not_from_stops(
    place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    async def body() -> None:
        async with place.router() as router, operating(place, router) as person:

            async def note(*_: object, **__: object) -> None:
                raise Unavailable("the disk is full", hint="make room")

            monkeypatch.setattr(router.audit, "note", note)
            await person.refused("StartAll", "Unavailable")
            await person.call("StopAll")
            assert router.sessions.held

    place.run(body)
    assert "audit-failed: the disk is full (make room); the audit trail has no row" in capfd.readouterr().err
