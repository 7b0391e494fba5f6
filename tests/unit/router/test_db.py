"""The router's database: what opens and what does not, commits that many share, a disk that is full."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from nanoclawd import db as db_module
from nanoclawd import limits, paths, recovery
from nanoclawd.db import FULL, Database, Row, Transaction, now_ms, read_queries
from nanoclawd.dbfile import APPLICATION_ID
from nanoclawd.errors import ConfigError, Failed, Refused, Unavailable
from tests.support.commits import HeldCommits
from tests.support.varlink_peer import eventually


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Database]:
    db = await Database.open(path)
    running = asyncio.create_task(db.run())
    try:
        yield db
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await db.close()


def add(tx: Transaction, name: str) -> Row:
    (row,) = tx.all("add_agent", name=name, now=now_ms())
    return row


async def names(db: Database) -> list[str]:
    return [row["name"] for row in await db.read("list_agents")]


# --- opening ----------------------------------------------------------------------------------------


def test_commits_are_durable_and_the_file_is_ours(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path / "db") as db:
            pragmas = ("synchronous", "journal_mode", "foreign_keys", "application_id", "user_version")
            values = [db._writer.execute(f"PRAGMA {pragma}").fetchone()[0] for pragma in pragmas]

            assert values == [FULL, "wal", 1, APPLICATION_ID, migrations]

    migrations = len(list((paths.SQL / "migrations").glob("*.sql")))
    asyncio.run(run())


def test_commits_that_would_not_be_durable_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db_module, "FULL", 3)

    with pytest.raises(ConfigError, match="SQLite took synchronous = 2"):
        asyncio.run(make(tmp_path / "db"))


def test_second_opener_is_refused_and_told_the_pid(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path / "db"):
            with pytest.raises(Refused, match=rf"another nanoclawd \(pid {os.getpid()}\)"):
                await Database.open(tmp_path / "db")
        async with opened(tmp_path / "db") as again:
            assert await names(again) == []

    asyncio.run(run())


def test_migrations_are_applied_in_order_after_a_backup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sql = tmp_path / "sql"
    shutil.copytree(paths.SQL, sql)
    monkeypatch.setattr(paths, "SQL", sql)

    async def run(expected: list[str]) -> None:
        async with opened(tmp_path / "db") as db:
            assert await names(db) == expected
            await db.write(lambda tx: add(tx, f"agent{len(expected)}"))

    asyncio.run(run([]))
    newest = len(list((sql / "migrations").glob("*.sql")))
    number = newest + 1
    (sql / "migrations" / f"{number:04}_more.sql").write_text("CREATE TABLE more (x INTEGER) STRICT;")
    asyncio.run(run(["agent0"]))

    with sqlite3.connect(tmp_path / f"db.backup-{newest}") as backup:
        assert backup.execute("SELECT name FROM agent").fetchall() == [("agent0",)]
        assert backup.execute("PRAGMA user_version").fetchone() == (newest,)
    backup.close()

    (sql / "migrations" / f"{number + 1:04}_broken.sql").write_text(
        "CREATE TABLE more2 (x); CREATE TABLE more (x);"
    )
    with pytest.raises(ConfigError, match="already exists"):
        asyncio.run(run([]))
    with sqlite3.connect(tmp_path / "db") as left:
        assert left.execute("PRAGMA user_version").fetchone() == (number,)
        assert left.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'more2'").fetchone() == (0,)
    left.close()


def test_every_statement_of_queries_sql_can_be_prepared(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path / "db") as db:
            for name, statement in read_queries((paths.SQL / "queries.sql").read_text()).items():
                parameters = dict.fromkeys(re.findall(r":([a-z_0-9]+)", statement))
                try:
                    await db._reader.execute_fetchall(f"EXPLAIN {statement}", parameters)
                except sqlite3.Error as exc:
                    raise AssertionError(name) from exc

    asyncio.run(run())


def damage_missing(path: Path) -> None:
    (path.parent / "agents" / "berta").mkdir(parents=True)


def damage_empty(path: Path) -> None:
    damage_missing(path)
    path.touch()


def damage_lost_wal(path: Path) -> None:
    damage_missing(path)
    with sqlite3.connect(path) as made:
        made.execute("PRAGMA journal_mode = WAL")
    made.close()


def damage_text(path: Path) -> None:
    path.write_bytes(b"this is no database, but a note to myself\n" * 500)


def damage_header(path: Path) -> None:
    asyncio.run(make(path))
    data = bytearray(path.read_bytes())
    data[200:] = b"\xa5" * (len(data) - 200)
    path.write_bytes(data)


def damage_newer(path: Path) -> None:
    asyncio.run(make(path))
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 999")
    db.close()


def damage_foreign(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE recipes (name TEXT)")
    db.close()


def damage_foreign_versioned(path: Path) -> None:
    damage_foreign(path)
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 1")
    db.close()


async def make(path: Path) -> None:
    await (await Database.open(path)).close()


DAMAGES = [
    (damage_missing, "is missing", "--create-database"),
    (damage_empty, "is missing", "--create-database"),
    (damage_lost_wal, "is missing", "--create-database"),
    (damage_text, "cannot be opened", "backup"),
    (damage_header, "cannot be opened", "backup"),
    (damage_newer, "has version 999", "newer nanoclawd"),
    (damage_foreign, "another program", "move it away"),
    (damage_foreign_versioned, "another program", "move it away"),
]


@pytest.mark.parametrize(("damage", "message", "hint"), DAMAGES)
def test_damaged_file_is_an_error_with_a_way_out(
    tmp_path: Path, damage: object, message: str, hint: str
) -> None:
    path = tmp_path / "state" / "db"
    path.parent.mkdir()
    assert callable(damage)
    damage(path)
    before = path.read_bytes() if path.is_file() else None

    for _ in range(2):  # the first try makes no difference to the second
        with pytest.raises(ConfigError) as caught:
            asyncio.run(make(path))

        assert message in caught.value.message and hint in caught.value.hint
    assert (path.read_bytes() if path.is_file() else None) == before


def test_missing_database_is_made_when_the_person_says_so(tmp_path: Path) -> None:
    damage_missing(tmp_path / "db")

    async def run() -> None:
        await (await Database.open(tmp_path / "db", create=True)).close()
        await make(tmp_path / "db")

    asyncio.run(run())


def test_program_ends_when_the_database_cannot_be_opened(tmp_path: Path) -> None:
    damage_newer(tmp_path / "db")
    program = """\
import asyncio, pathlib, sys
from nanoclawd.db import Database
from nanoclawd.errors import ConfigError
try:
    asyncio.run(Database.open(pathlib.Path(sys.argv[1])))
except ConfigError as exc:
    kept = exc
    sys.exit(78)
"""

    done = subprocess.run([sys.executable, "-c", program, tmp_path / "db"], timeout=60, check=False)

    assert done.returncode == 78


# --- the way back from an upgrade -------------------------------------------------------------------


def test_an_older_program_takes_the_backup_that_the_newer_one_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, newer = tmp_path / "db", tmp_path / "sql"
    shutil.copytree(paths.SQL, newer)
    version = len(list((newer / "migrations").glob("*.sql")))
    (newer / "migrations" / f"{version + 1:04}_more.sql").write_text("DROP TABLE agent;")

    async def add_one(name: str) -> list[str]:
        async with opened(path) as db:
            await db.write(lambda tx: add(tx, name))
            return await names(db)

    asyncio.run(add_one("before"))
    with monkeypatch.context() as upgraded:
        upgraded.setattr(paths, "SQL", newer)
        asyncio.run(make(path))
    with pytest.raises(ConfigError, match=f"has version {version + 1}") as caught:
        asyncio.run(make(path))
    (backup,) = re.findall("--restore-database ([^']+)'", caught.value.hint)
    with pytest.raises(Refused) as refused:
        recovery.restore(Path(backup), path)

    subprocess.run(["sh", "-c", refused.value.hint.removeprefix("first: ")], check=True)
    recovery.restore(Path(backup), path)

    assert asyncio.run(add_one("after")) == ["after", "before"]


# --- backups ----------------------------------------------------------------------------------------


def test_a_backup_is_consistent_while_the_router_writes(tmp_path: Path) -> None:
    backup = tmp_path / "backup"

    async def run() -> None:
        async with opened(tmp_path / "db") as db:
            for number in range(200):
                await db.write(lambda tx, n=number: add(tx, f"{n:06}" * 1000))
            writing = asyncio.create_task(write_on(db))
            before = len(await names(db))
            await db.backup(backup)
            writing.cancel()
            await asyncio.wait((writing,))
            after = len(await names(db))
            with pytest.raises(Refused, match="already"):
                await db.backup(backup)
            with pytest.raises(Failed, match="No such file"):
                await db.backup(tmp_path / "nowhere" / "backup")
        with closing(sqlite3.connect(backup)) as copied:
            assert copied.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            saved = [name for (name,) in copied.execute("SELECT name FROM agent ORDER BY name")]
        assert before <= len(saved) <= after
        assert saved == [f"{n:06}" * 1000 for n in range(len(saved))]

    async def write_on(db: Database) -> None:
        for number in range(200, 100_000):
            await db.write(lambda tx, n=number: add(tx, f"{n:06}" * 1000))
            await asyncio.sleep(0)  # where it may be cancelled

    asyncio.run(run())
    assert backup.stat().st_mode & 0o777 == 0o600
    assert not list(tmp_path.glob(".*"))


# --- writing ----------------------------------------------------------------------------------------


def test_many_writers_share_commits(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path / "db") as db:
            await asyncio.gather(*(db.write(lambda tx, n=n: add(tx, f"a{n}")) for n in range(300)))

            assert len(await names(db)) == 300
            assert db.commits <= 300 // limits.WRITES_PER_COMMIT + 2

    asyncio.run(run())


def test_failing_write_is_rolled_back_alone_and_gets_its_own_exception(tmp_path: Path) -> None:
    def fail(tx: Transaction) -> None:
        add(tx, "half")
        raise Refused("no")

    def twice(tx: Transaction) -> None:
        add(tx, "twice")
        add(tx, "twice")

    async def run() -> None:
        async with opened(tmp_path / "db") as db:
            results = await asyncio.gather(
                db.write(lambda tx: add(tx, "first")),
                db.write(fail),
                db.write(twice),
                db.write(lambda tx: add(tx, "last")),
                return_exceptions=True,
            )

            assert [type(result) for result in results] == [Row, Refused, sqlite3.IntegrityError, Row]
            assert await names(db) == ["first", "last"]
            assert db.commits == 1

    asyncio.run(run())


def test_nobody_is_answered_before_the_commit(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path / "db") as db:
            commits = HeldCommits(db)
            write = asyncio.create_task(db.write(lambda tx: add(tx, "first")))
            await commits.entered.wait()

            assert await names(db) == [] and not write.done()
            commits.release()
            await write
            assert await names(db) == ["first"]

    asyncio.run(run())


def test_cancelled_caller_gets_its_result_and_is_cancelled_after(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path / "db") as db:
            commits = HeldCommits(db)
            effects: list[str] = []

            def slow(tx: Transaction) -> str:
                add(tx, "slow")
                return "written"

            async def caller() -> None:
                effects.append(await db.write(slow))
                await asyncio.sleep(0)
                effects.append("not cancelled")

            task = asyncio.create_task(caller())
            await commits.entered.wait()
            for _ in range(3):
                task.cancel()
                await asyncio.sleep(0)
            commits.release()
            with pytest.raises(asyncio.CancelledError):
                await task

            assert effects == ["written"] and await names(db) == ["slow"]
            assert task.cancelling() == 3

    asyncio.run(run())


def test_deadline_around_a_write_still_ends_in_timeout(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path / "db") as db:
            commits = HeldCommits(db)

            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    asyncio.get_running_loop().call_later(0.05, commits.release)
                    await db.write(lambda tx: add(tx, "slow"))
                    await asyncio.sleep(3600)

    asyncio.run(run())


def test_end_of_the_writer_is_told_to_all_who_wait(tmp_path: Path) -> None:
    async def run() -> None:
        db = await Database.open(tmp_path / "db")
        commits = HeldCommits(db)

        def nothing(tx: Transaction) -> None:
            pass

        running = asyncio.create_task(db.run())
        writes = [asyncio.create_task(db.write(nothing)) for _ in range(8 * limits.WRITES_PER_COMMIT)]
        await commits.entered.wait()
        running.cancel()

        results = await asyncio.wait_for(asyncio.gather(*writes, return_exceptions=True), 20)

        assert {type(result) for result in results} == {Unavailable}
        with pytest.raises(Unavailable):
            await db.write(nothing)
        commits.release()
        await db.close()
        await make(tmp_path / "db")

    asyncio.run(run())


# --- a full disk ------------------------------------------------------------------------------------


def test_full_database_refuses_and_recovers_without_a_restart(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async def run() -> None:
        async with opened(tmp_path / "db") as db:
            ((pages,),) = db._writer.execute("PRAGMA page_count").fetchall()
            db._writer.execute(f"PRAGMA max_page_count = {pages}").fetchall()
            big = "x" * 100_000

            results = await asyncio.gather(
                db.write(lambda tx: add(tx, "small")),
                db.write(lambda tx: add(tx, big)),
                return_exceptions=True,
            )

            assert [type(result) for result in results] == [Unavailable, Unavailable]
            assert "disk full" in str(results[0])
            assert await names(db) == []
            db._writer.execute("PRAGMA max_page_count = 1000000").fetchall()
            await db.write(lambda tx: add(tx, big))
            assert await names(db) == [big]

    asyncio.run(run())
    assert "database-write-failed" in capfd.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_full_disk_refuses_and_recovers_without_a_restart(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=False).returncode:
        pytest.skip("no file system may be mounted here")

    async def run() -> None:
        async with opened(disk / "db") as db:
            await db.write(lambda tx: add(tx, "before"))
            ballast = disk / "ballast"
            with pytest.raises(OSError, match="No space"), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 4096)

            failed = 0
            for number in range(50):  # what is left of the last page of the log may still take some
                try:
                    await db.write(lambda tx, number=number: add(tx, f"{number:01000}"))
                except Unavailable:
                    failed += 1
            assert failed
            acknowledged = 50 - failed
            ballast.unlink()
            await db.write(lambda tx: add(tx, "after"))
            assert len(await names(db)) == acknowledged + 2
        async with opened(disk / "db") as db:
            assert len(await names(db)) == acknowledged + 2

    try:
        asyncio.run(run())
    finally:
        subprocess.run(["umount", disk], check=True)
    assert "database-write-failed" in capfd.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")
def test_a_read_only_disk_is_told(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", disk], check=False).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        asyncio.run(make(disk / "db"))
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)

        with pytest.raises(Unavailable, match="Read-only file system"):
            asyncio.run(make(disk / "db"))
    finally:
        subprocess.run(["umount", disk], check=True)


# --- a file that others touch -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["read", "write", "backup"])
def test_damage_that_shows_while_running_ends_the_writer(tmp_path: Path, how: str) -> None:
    path = tmp_path / "db"

    async def prepare() -> None:
        async with opened(path) as db:
            for number in range(200):
                await db.write(lambda tx, n=number: add(tx, f"{n:06}" * 1000))

    async def run() -> None:
        db = await Database.open(path)
        running = asyncio.create_task(db.run())
        with path.open("r+b") as file:
            file.seek(200 * 4096)
            file.write(b"\xa5" * 100 * 4096)
        attempts: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
            "read": lambda: names(db),
            "write": lambda: db.write(lambda tx: tx.all("list_agents")),
            "backup": lambda: db.backup(tmp_path / "backup"),
        }

        with pytest.raises((ConfigError, Unavailable)):
            await attempts[how]()

        with pytest.raises(ConfigError, match="malformed") as caught:
            await asyncio.wait_for(running, 20)
        assert "--salvage-database" in caught.value.hint
        await db.close()

    asyncio.run(prepare())
    asyncio.run(run())


def test_a_lock_of_another_program_is_waited_for_without_blocking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with opened(tmp_path / "db") as db:
            with closing(sqlite3.connect(tmp_path / "db", isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                write = asyncio.create_task(db.write(lambda tx: add(tx, "first")))
                for _ in range(3):
                    assert await names(db) == []  # and the loop goes on
                    await asyncio.sleep(limits.DATABASE_POLL_S)
                assert not write.done()
                other.execute("COMMIT")
                await write

                monkeypatch.setattr(limits, "DATABASE_BUSY_S", 0.1)
                other.execute("BEGIN IMMEDIATE")
                with pytest.raises(Unavailable, match="database is locked") as caught:
                    await db.write(lambda tx: add(tx, "second"))
                assert "fuser" in caught.value.hint
                other.execute("COMMIT")
            await db.write(lambda tx: add(tx, "third"))
            assert await names(db) == ["first", "third"]

    asyncio.run(run())


def test_a_start_beside_a_lock_of_another_program_is_told(tmp_path: Path) -> None:
    path = tmp_path / "db"
    asyncio.run(make(path))
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")

        with pytest.raises(Unavailable, match="cannot be opened: database is locked") as caught:
            asyncio.run(make(path))

        assert "fuser" in caught.value.hint
        other.execute("COMMIT")
    asyncio.run(make(path))


def make_damaged(path: Path) -> bytes:
    """Make a database that was closed in good order, with damage that no ordinary statement meets.

    A row of an agent is there, but its index does not know it. Returns the file's bytes.
    """

    async def prepare() -> None:
        async with opened(path) as db:
            await db.write(lambda tx: add(tx, "berta"))
            await db.check()

    asyncio.run(prepare())
    data = bytearray(path.read_bytes())
    at = data.rindex(b"berta", 0, data.rindex(b"berta"))  # the one of two that has the lower page
    data[at : at + 5] = b"bertb"
    path.write_bytes(data)
    return bytes(data)


@pytest.mark.parametrize("agents", [(), ("emil", "fritz")])
def test_damage_is_told_after_the_start_before_anything_is_written_into_the_file(
    tmp_path: Path, agents: Sequence[str]
) -> None:
    path = tmp_path / "db"
    damaged = make_damaged(path)

    async def run() -> None:
        async with opened(path) as db:
            for name in agents:
                await db.write(lambda tx, n=name: add(tx, n))

            with pytest.raises(ConfigError, match="is damaged") as caught:
                await db.check()

            assert "--salvage-database" in caught.value.hint

    asyncio.run(run())
    assert path.read_bytes() == damaged

    with pytest.raises(ConfigError, match="is damaged"):  # before anything: there was no clean end
        asyncio.run(make(path))
    assert path.read_bytes() == damaged
    recovery.salvage(path, path)

    async def look() -> None:
        async with opened(path) as db:
            await db.check()
            assert {*agents} < {*await names(db)}

    asyncio.run(look())


@pytest.mark.parametrize("how", ["overwritten", "removed"])
def test_a_file_that_is_no_database_any_more_can_be_closed(tmp_path: Path, how: str) -> None:
    async def run() -> None:
        async with opened(tmp_path / "db") as db:
            await db.write(lambda tx: add(tx, "berta"))
            if how == "removed":
                (tmp_path / "db").unlink()
                return
            (tmp_path / "db").write_bytes(b"a note to myself\n" * 5000)

            with pytest.raises(ConfigError):
                await db.check()

    asyncio.run(run())


def test_a_check_ends_with_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = "WITH RECURSIVE n AS (SELECT 1 AS x UNION ALL SELECT x FROM n) SELECT x FROM n WHERE x = 2"
    path = tmp_path / "db"

    async def run() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(db_module, "INTEGRITY", endless)
            async with opened(path) as db:
                check = asyncio.create_task(db.check())
                await db.write(lambda tx: add(tx, "berta"))
                assert not check.done()
                check.cancel()
        async with opened(path) as db:
            assert await names(db) == ["berta"]

    asyncio.run(run())


# --- a clock that is set ----------------------------------------------------------------------------


class Clock:
    """The wall clock, which a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead_s = 0.0
        real = time.time_ns
        monkeypatch.setattr(time, "time_ns", lambda: real() + int(self.ahead_s * 1e9))


def add_waiting(tx: Transaction, *, wait_s: float) -> None:
    """Add a message and a delivery that wait for their next attempt, and one of each that do not."""
    tx.all("add_session", agent="berta", prefix="p", channel="c", chat="chat", thread="", now=now_ms())
    place = {"channel": "c", "chat": "chat", "thread": ""}
    for name in ("waits", "due"):
        event = {"event": name, "revision": 0, "sender": "s", "body": "b", "context": "", "command": ""}
        tx.all("enqueue", id=name, session=1, now=0, hops=0, **event, **place)
        more = {"agent": "berta", "kind": "reply", "body": "b", "in_reply_to": None, "now": 0, "turn": None}
        tx.all("publish", key=name, message=None, **more, **place)
    later = now_ms() + int(wait_s * 1000)
    for table, key in (("inbox", "id"), ("outbox", "key")):
        tx._connection.execute(f"UPDATE {table} SET not_before = ? WHERE {key} = 'waits'", (later,))


async def waits_s(db: Database) -> list[float]:
    """Return how long message and delivery still wait; those that are due have no time."""
    await db.read("list_agents")  # whatever is read
    rows = await db._reader.execute_fetchall(
        "SELECT id, not_before FROM inbox UNION ALL SELECT key, not_before FROM outbox"
    )
    assert {row["not_before"] for row in rows if row["id"] == "due"} == {0}
    return [(row["not_before"] - now_ms()) / 1000 for row in rows if row["id"] == "waits"]


@pytest.mark.parametrize("jump_s", [86_400, -86_400, 3, -3])
def test_the_schedule_follows_a_clock_that_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    clock = Clock(monkeypatch)

    async def run() -> None:
        async with opened(tmp_path / "db") as db:
            await db.write(lambda tx: add_waiting(tx, wait_s=100))

            for times in range(1, 3):
                clock.ahead_s += jump_s
                assert await waits_s(db) == pytest.approx([100, 100], abs=1.5), times

            commits = db.commits
            clock.ahead_s += 1  # as much as a clock may drift until it is set right
            assert await waits_s(db) == pytest.approx([99, 99], abs=1.5)
            assert db.commits == commits

    asyncio.run(run())


@pytest.mark.parametrize(
    ("wait_s", "jump_s", "waits_then_s"),
    [
        (100, -86_400, limits.BACKOFF_MAX_S),
        (100, -3600, 3700),
        (limits.RETRY_AFTER_MAX_S, 0, limits.RETRY_AFTER_MAX_S),
        (limits.RETRY_AFTER_MAX_S, -3600, limits.BACKOFF_MAX_S),
    ],
)
def test_a_restart_keeps_each_wait_unless_the_clock_made_it_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_s: float, jump_s: float, waits_then_s: float
) -> None:
    clock = Clock(monkeypatch)

    async def run() -> None:
        async with opened(tmp_path / "db") as db:
            await db.write(lambda tx: add_waiting(tx, wait_s=wait_s))
        clock.ahead_s = jump_s
        async with opened(tmp_path / "db") as db:
            assert await waits_s(db) == pytest.approx([waits_then_s] * 2, abs=5)

    asyncio.run(run())


def fill_disk(tx: Transaction) -> None:
    failure = sqlite3.OperationalError("database or disk is full")
    failure.sqlite_errorcode = sqlite3.SQLITE_FULL
    raise failure


def test_a_clock_that_is_set_while_the_disk_is_full_is_followed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)

    async def run() -> None:
        async with opened(tmp_path / "db") as db:
            await db.write(lambda tx: add_waiting(tx, wait_s=100))
            clock.ahead_s = 86_400
            with pytest.raises(Unavailable):
                await db.write(fill_disk)
            assert await waits_s(db) == pytest.approx([100, 100], abs=5)

    asyncio.run(run())


def test_killed_while_writing_loses_nothing_that_was_answered(tmp_path: Path) -> None:
    program = """\
import asyncio, pathlib, sys
from nanoclawd.db import Database, now_ms
async def main():
    db = await Database.open(pathlib.Path(sys.argv[1]))
    running = asyncio.create_task(db.run())
    async def one(n):
        await db.write(lambda tx: tx.all("add_agent", name=f"a{n}", now=now_ms()))
        print(f"a{n}", flush=True)
    for start in range(0, 100000, 8):
        await asyncio.gather(*(one(n) for n in range(start, start + 8)))
asyncio.run(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "db"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        answered = [process.stdout.readline().strip() for _ in range(200)]
        process.kill()
        answered += [line.strip() for line in process.stdout if line.endswith("\n")]

    async def run() -> None:
        async with opened(tmp_path / "db") as db:
            assert set(answered) <= set(await names(db))

    asyncio.run(run())


def test_reader_waits_for_nobody(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path / "db") as db:
            commits = HeldCommits(db)
            writing = asyncio.create_task(db.write(lambda tx: add(tx, "slow")))
            await commits.entered.wait()
            assert await names(db) == []
            commits.release()
            await writing
            await eventually(lambda: db.commits == 1)

    asyncio.run(run())
