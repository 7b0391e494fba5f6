"""A database that is lost or damaged: what is refused, what comes back, and how."""

from __future__ import annotations

import asyncio
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from nanoclawd import recovery
from nanoclawd.db import Database
from nanoclawd.dbfile import copy, decode, migrations, take_lock, upgrade
from nanoclawd.errors import ConfigError, NanoclawError, NotFound, Refused

TABLES = (
    *("agent", "session", "inbox", "outbox", "router", "audit"),
    *("person", "identity", "chat", "wiring", "member", "held", "context"),
    *("receipt", "file", "ask", "destination"),
)
PAGE = 4096
TABLE_LEAF = 0x0D  # a page with rows: sqlite.org/fileformat2.html#b_tree_pages
FLIPS = 200

Contents = dict[str, dict[Any, tuple[Any, ...]]]  #: of each table, by what identifies a row


def connect(path: Path) -> sqlite3.Connection:
    """Open a database, without the triggers that a router's connection has."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL").fetchall()
    return connection


def fill(connection: sqlite3.Connection, messages: int, *, first: bool = False) -> None:
    """Put into an empty database what a router may leave in one: texts from short to many pages long.

    first: it is one of the first version.
    """
    dice = random.Random(1)
    connection.execute("BEGIN")
    for index, agent in enumerate(("berta", "emil")):
        connection.execute("INSERT INTO agent VALUES (?, ?, 0, 1)", (agent, index))
    for chat in range(1, 5):
        connection.execute(
            "INSERT INTO session (id, agent, name, channel, chat, thread, created_at)"
            " VALUES (?, 'berta', ?, 'test', ?, '', 1)",
            (chat, f"test_{chat}", f"chat{chat}"),
        )
    for number in range(0 if first else 8):
        add_people(connection, number)
    for number in range(messages):
        add_message(connection, number, dice)
    for number in range(0 if first else 8):
        add_tools(connection, number)
    connection.execute("COMMIT")


def add_people(connection: sqlite3.Connection, number: int) -> None:
    """Add one row to each of their tables; ids that are numbers are what would fit into other tables,
    too.
    """
    number, person = number + 1, number + 2
    rows: dict[str, tuple[Any, ...]] = {
        "person": (person, f"ada{number}", 1),
        "identity": ("table", str(number), person, "linked"),
        "chat": (number, "chat", str(number), "group", "", "open", 1, 0, 0, 0, 0, "9"),
        "wiring": (number, number, "berta", "every", "", 600, 0, 0, "thread", "strict", 5, 0),
        "member": (person, "", number, "member", 1),
        "held": (number, number, "", str(number), 0, "7", "", "8", "", 0, 0, 1),
        "context": (number, number, "", str(number), 0, "7", "8", 1, 0),
    }
    for table, row in rows.items():
        connection.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)


def add_tools(connection: sqlite3.Connection, number: int) -> None:
    """The same for what agents do beyond answering."""
    key, *_ = connection.execute("SELECT key FROM outbox LIMIT 1 OFFSET ?", (number,)).fetchone()
    rows: dict[str, tuple[Any, ...]] = {
        "receipt": (key, 1, "9", "8"),
        "file": (f"f{number:016x}", "7", 0, "8", "9", 5, "0" * 64, 0, key, *[None] * 5),
        "ask": (key, f"m{number:016x}", 9, None, None, None),
        "destination": ("7", f"d{number}", "8", "9"),
    }
    for table, row in rows.items():
        connection.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)


def add_message(connection: sqlite3.Connection, number: int, dice: random.Random) -> None:
    chat, answered = dice.randint(1, 4), dice.random() < 0.7
    texts = ("short", "ü" * dice.randrange(100), "a" * dice.randrange(900), "long " * dice.randrange(4000))
    (body,) = dice.choices(texts, (10, 10, 10, 1))
    ended_at = number if answered else None
    state = "answered" if answered else "queued"
    connection.execute(
        "INSERT INTO inbox (id, session, channel, chat, thread, event, revision, sender, body, received_at,"
        " state, ended_at) VALUES (?, ?, 'test', ?, '', ?, 0, 'me', ?, 1, ?, ?)",
        (f"m{number:016x}", chat, f"chat{chat}", f"e{number}", body, state, ended_at),
    )
    if answered:
        connection.execute(
            "INSERT INTO outbox (key, message, agent, channel, chat, thread, kind, body, created_at)"
            " VALUES (?, ?, 'berta', 'test', ?, '', 'reply', ?, 1)",
            (f"m{number:016x}.reply0", f"m{number:016x}", f"chat{chat}", body),
        )


def read(path: Path) -> Contents:
    with closing(sqlite3.connect(path)) as connection:
        connection.text_factory = decode
        return {
            table: {
                row[0]: row
                for row in connection.execute(f"SELECT rowid, * FROM {table}")
                if not {"restored", "salvaged"}.intersection(row)  # rows of the trail that say so
            }
            for table in TABLES
        }


def lost(before: Contents, path: Path) -> int:
    """Return how many rows are not as they were."""
    after = read(path)
    return sum(
        after[table].get(key) != row for table, rows in before.items() for key, row in rows.items()
    ) + sum(key not in before[table] for table in TABLES for key in after[table])


def start(path: Path) -> None:
    """Start on the database as a router does, and read all of it."""

    async def run() -> None:
        db = await Database.open(path)
        running = asyncio.create_task(db.run())
        try:
            await db.check()
            for table in TABLES:
                await db._reader.execute_fetchall(f"SELECT * FROM {table}")
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await db.close()

    asyncio.run(run())


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("healthy") / "db"
    with closing(connect(path)) as connection:
        upgrade(connection, 0, len(migrations()))
        fill(connection, 300)
        for number in range(100):
            recovery._note(connection, "created", {"number": number})
    return path


@pytest.fixture
def path(healthy: Path, tmp_path: Path) -> Path:
    """A database of each test's own, in order, closed."""
    (tmp_path / "agents" / "berta").mkdir(parents=True)
    return Path(shutil.copy(healthy, tmp_path / "db"))


def zero(path: Path, page: int) -> None:
    with path.open("r+b") as file:
        file.seek((page - 1) * PAGE)
        file.write(bytes(PAGE))


# --- restore ----------------------------------------------------------------------------------------


def test_a_backup_is_restored_where_the_database_is_missing(path: Path) -> None:
    before = read(path)
    backup = path.with_name("backup")
    with closing(sqlite3.connect(path)) as connection:
        copy(connection, backup)
    path.unlink()

    words = recovery.restore(backup, path)

    assert words == "2 agents, 4 sessions, 300 messages (86 open), 214 deliveries (214 open)"
    assert path.stat().st_mode & 0o777 == 0o600
    start(path)
    assert lost(before, path) == 0 and backup.exists()
    assert sorted(file.name for file in path.parent.iterdir()) == ["agents", "backup", "db", "db.lock"]


@pytest.mark.parametrize("there", ["db", "db-wal", "db-shm", "db-journal"])
def test_nothing_that_is_there_is_overwritten(path: Path, there: str) -> None:
    backup = path.rename(path.with_name("backup"))
    (path.parent / there).write_text("something")

    with pytest.raises(Refused) as caught:
        recovery.restore(backup, path)

    assert caught.value.hint == f"first: mv {path.parent / there} {path}.old{there[2:]}"
    assert (path.parent / there).read_text() == "something"


def break_header(path: Path) -> None:
    path.write_bytes(b"something else " + path.read_bytes())


def break_page(path: Path) -> None:
    zero(path, 40)


def break_version(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 999")


def break_owner(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA application_id = 1")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_header, "cannot be opened: file is not a database"),
        (break_page, "is damaged"),
        (break_version, "has version 999"),
        (break_owner, "another program"),
    ],
)
def test_a_bad_backup_is_not_restored(path: Path, damage: Callable[[Path], None], words: str) -> None:
    backup = path.rename(path.with_name("backup"))
    damage(backup)

    with pytest.raises(ConfigError, match=words):
        recovery.restore(backup, path)

    assert not path.exists()


def test_nothing_is_done_beside_a_router(path: Path) -> None:
    tasks: list[Callable[[], str]] = [
        lambda: recovery.restore(path, path),
        lambda: recovery.salvage(path, path),
        lambda: recovery.create(path),
    ]
    with open(take_lock(path)[0]):
        for task in tasks:
            with pytest.raises(Refused, match="another nanoclawd") as caught:
                task()
            assert "systemctl --user stop" in caught.value.hint


def test_a_file_that_is_not_there_is_named(path: Path) -> None:
    backup = path.with_name("nothing")
    path.unlink()

    for task in (recovery.restore, recovery.salvage):
        with pytest.raises(NotFound, match=str(backup)):
            task(backup, path)


# --- salvage ----------------------------------------------------------------------------------------


def test_a_database_in_order_is_left_alone(path: Path) -> None:
    before = path.read_bytes()

    with pytest.raises(Refused, match="nothing is wrong"):
        recovery.salvage(path, path)

    assert path.read_bytes() == before


def test_the_damaged_database_is_kept(path: Path) -> None:
    before = read(path)
    pages = [path.read_bytes()[at] for at in range(0, path.stat().st_size, PAGE)]
    page, other = [number for number, kind in enumerate(pages, 1) if number >= 40 and kind == TABLE_LEAF][:2]
    zero(path, page)
    damaged = path.read_bytes()

    words = recovery.salvage(path, path)
    start(path)

    assert words.splitlines()[-1] == f"the damaged database is kept as '{path}.damaged-1'"
    assert path.with_name("db.damaged-1").read_bytes() == damaged
    assert 0 < lost(before, path) < 100  # one page of rows
    zero(path, other)
    assert f"{path}.damaged-2" in recovery.salvage(path, path)


def test_what_cannot_be_read_at_all_is_left_where_it_is(path: Path) -> None:
    path.write_bytes(random.Random(1).randbytes(20 * PAGE))
    before = path.read_bytes()

    with pytest.raises(ConfigError, match="nothing of ours can be read"):
        recovery.salvage(path, path)

    assert path.read_bytes() == before
    assert not path.with_name("db.damaged-1").exists()


def test_a_damaged_backup_is_salvaged_where_the_database_is_missing(path: Path) -> None:
    backup = path.rename(path.with_name("backup"))
    zero(backup, 40)
    damaged = backup.read_bytes()

    recovery.salvage(backup, path)

    start(path)
    assert backup.read_bytes() == damaged
    with pytest.raises(Refused, match="there is a database"):
        recovery.salvage(backup, path)


def test_lost_tables_do_not_take_the_messages_with_them(path: Path) -> None:
    before = read(path)
    with closing(sqlite3.connect(path)) as connection:
        roots = dict(connection.execute("SELECT name, rootpage FROM sqlite_schema WHERE type = 'table'"))
    zero(path, roots["session"])
    zero(path, roots["router"])

    words = recovery.salvage(path, path)
    start(path)

    after = read(path)
    assert "made anew: 4 sessions whose messages there are" in words
    assert after["inbox"] == before["inbox"] and after["outbox"] == before["outbox"]
    assert {row[2:7] for row in after["session"].values()} == {
        row[2:7] for row in before["session"].values()
    }
    assert len(after["router"]) == 1  # there is always one


def test_an_older_database_is_salvaged_as_one(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with closing(connect(path)) as connection:
        upgrade(connection, 0, 1)
        fill(connection, 50, first=True)
    zero(path, 1)  # not even the version can be read; but rows end before what they do not have

    recovery.salvage(path, path)
    start(path)

    assert len(read(path)["inbox"]) == 50


# --- property-like: whatever is damaged -----------------------------------------------------------------


def flip(file: Path, dice: random.Random) -> int:
    """Flip a bit somewhere; returns where."""
    at = dice.randrange(file.stat().st_size)
    with file.open("r+b") as opened:
        opened.seek(at)
        (byte,) = opened.read(1)
        opened.seek(at)
        opened.write(bytes([byte ^ 1 << dice.randrange(8)]))
    return at


def take_up(path: Path, what: object) -> bool:
    """Start on a database that may be damaged, as a person would; returns whether it was refused."""
    try:
        start(path)
    except NanoclawError as exc:
        assert isinstance(exc, ConfigError), what
        recovery.salvage(path, path)
        start(path)
        return True
    return False


def test_a_flipped_bit_is_told_or_harms_one_row(healthy: Path, tmp_path: Path) -> None:
    before = read(healthy)
    refused = 0
    for seed in range(FLIPS):
        path = Path(shutil.copy(healthy, tmp_path / "db"))
        at = flip(path, random.Random(seed))

        refused += take_up(path, seed)

        # A page's first bytes may take its rows along; a message, the delivery that names it.
        assert lost(before, path) <= (40 if at % PAGE < 8 else 3), (seed, at)
    assert refused > FLIPS / 20


@pytest.mark.parametrize("damage", ["zeros", "garbage", "of another page", "cut off"])
def test_damaged_pages_are_told_and_the_others_saved(healthy: Path, tmp_path: Path, damage: str) -> None:
    before = read(healthy)
    pages = healthy.stat().st_size // PAGE
    for seed in range(FLIPS // 10):
        dice = random.Random(seed)
        path = Path(shutil.copy(healthy, tmp_path / "db"))
        page, other = dice.sample(range(pages), 2)
        with path.open("r+b") as file:
            file.seek(other * PAGE)
            data = {
                "zeros": bytes(PAGE),
                "garbage": dice.randbytes(PAGE),
                "of another page": file.read(PAGE),
            }
            if damage == "cut off":
                page = max(page, pages * 3 // 4)
                file.truncate(page * PAGE + dice.randrange(PAGE))
            else:
                file.seek(page * PAGE)
                file.write(data[damage])

        # Text that runs over several pages may be anything.
        overflow = healthy.read_bytes()[page * PAGE] == 0
        same = path.read_bytes() == healthy.read_bytes()  # e.g. pages of two tables without a row
        assert take_up(path, seed) or overflow or same, seed

        share = len(before["inbox"]) if damage == "cut off" else 60
        assert lost(before, path) <= share, (seed, page)


def test_a_flipped_bit_in_the_log_is_told_or_harms_the_last_commit(healthy: Path, tmp_path: Path) -> None:
    live = Path(shutil.copy(healthy, tmp_path / "live"))
    with closing(connect(live)) as writer:
        for number in range(300, 340):
            before = read(live)
            writer.execute("BEGIN")
            add_message(writer, number, random.Random(number))
            writer.execute("COMMIT")
        after = read(live)
        for seed in range(FLIPS // 5):
            path = Path(shutil.copy(live, tmp_path / "db"))
            at = flip(Path(shutil.copy(f"{live}-wal", f"{path}-wal")), random.Random(seed))

            refused = take_up(path, seed)

            # Of a transaction that was the last, nobody can tell whether it was ever whole.
            assert lost(after, path) <= (3 if refused else 0) or read(path) == before, (seed, at)
