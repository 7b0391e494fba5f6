"""The router's SQLite database: opened and checked, one writer, writes grouped into durable commits.

Statements of a transaction run on the event loop: they take microseconds, and nothing can step in between.
Only the commit, which waits for the disk, has a thread; and reads, which may be long, have aiosqlite's.
"""

from __future__ import annotations

import asyncio
import os
import re
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import aiosqlite

from nanoclawd import journal, limits, paths, states
from nanoclawd.dbfile import (
    INTEGRITY,
    code_of,
    copy,
    decode,
    explain,
    explained,
    is_of_file,
    log_kept,
    migrate,
    missing,
    opened_whole,
    release_lock,
    require_sound,
    take_lock,
)
from nanoclawd.errors import ConfigError, Unavailable
from nanoclawd.sqlitefile import Log

T = TypeVar("T")
Row = sqlite3.Row

FULL = 2  # PRAGMA synchronous


def now_ms() -> int:
    """Return the time as the database has it."""
    return time.time_ns() // 1_000_000


def _clock_ms() -> int:
    """Return by how much the wall clock is ahead of one that nobody sets: its jumps, with some drift."""
    return now_ms() - time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


def read_queries(text: str) -> dict[str, str]:
    """Return the statements of a queries.sql by their names."""
    parts = re.split(r"(?m)^-- (\w+) --$", text)
    return {name: sql.strip() for name, sql in zip(parts[1::2], parts[2::2], strict=True)}


class Transaction:
    """What a write sees: named statements, run at once and in order on the one writing connection."""

    def __init__(self, connection: sqlite3.Connection, queries: dict[str, str]) -> None:
        self._connection = connection
        self._queries = queries
        self.told: list[Callable[[], object]] = []  #: what comes after: lines for the journal, mostly
        #: Where something was published: channel, chat, thread. The adapters there get what is next.
        self.places: list[tuple[str, str, str]] = []

    def tell(self, level: Callable[..., None], event: str, text: str = "", **fields: Any) -> None:
        """Write to the journal, with a function of journal.py, as soon as all this is on disk."""
        self.told.append(partial(level, event, text, **fields))

    def then(self, act: Callable[[], object]) -> None:
        """Have something done as soon as all this is on disk, e.g. wake who has work now."""
        self.told.append(act)

    def all(self, query: str, **parameters: Any) -> list[Row]:
        """Run a statement of queries.sql and return its rows."""
        return self._connection.execute(self._queries[query], parameters).fetchall()

    def one(self, query: str, **parameters: Any) -> Row | None:
        """The same for a statement that gives one row or none."""
        rows = self.all(query, **parameters)
        return rows[0] if rows else None


Operation = Callable[[Transaction], T]
#: Whoever writes one, those who show them to people hear of it.
_TELL_OF_APPROVALS = "".join(
    f"""
    CREATE TEMP TRIGGER approval_{number} AFTER {what} ON main.approval BEGIN SELECT approval_changed(); END;
    """
    for number, what in enumerate(("INSERT", "UPDATE OF state"))
)


@dataclass(slots=True)
class _Write:
    operation: Operation[Any]
    done: asyncio.Future[Any]


def _take_up(tx: Transaction) -> None:
    """While no router ran the clock may have been set back: what waits longer than anything may, waits for
    an ordinary pause instead.
    """
    now = now_ms()
    times = {
        "latest": now + int(limits.RETRY_AFTER_MAX_S * 1000),
        "soon": now + int(limits.BACKOFF_MAX_S * 1000),
    }
    tx.all("hasten_messages", **times)
    tx.all("hasten_deliveries", **times)


class Database:
    """Opens with open(); run() must run as a task while write() is used."""

    def __init__(
        self,
        path: Path,
        writer: sqlite3.Connection,
        reader: aiosqlite.Connection,
        checker: aiosqlite.Connection | None,
        lock_fd: int,
        queries: dict[str, str],
    ) -> None:
        self._path = path
        self._writer = writer
        self._reader = reader
        self._checker = checker  #: sees the file as it was opened, until that is known to be sound
        self._lock_fd = lock_fd
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._queries = queries
        self._waiting: asyncio.Queue[_Write] = asyncio.Queue(maxsize=4 * limits.WRITES_PER_COMMIT)
        self._stopped = False
        self._damaged = False
        self._clock_ms = _clock_ms()
        self.commits = 0  #: for benchmarks
        self._transaction = Transaction(writer, queries)  #: the newest
        writer.create_function("approval_changed", 0, lambda: self._transaction.then(self.on_approval))
        writer.executescript(_TELL_OF_APPROVALS)
        self.on_approval: Callable[[], None] = lambda: None  #: after a commit in which there is another one

    @classmethod
    async def open(cls, path: Path, *, create: bool = False) -> Database:
        """Open the database, migrate it if it is older. Reads all of it after a bad end; else check() does.

        Raises ConfigError if it is missing beside an existing installation, damaged or too new; Refused if
        another process has it.
        """
        with explained(f"the database '{path}' cannot be opened"):
            async with AsyncExitStack() as undo:
                lock_fd, ended_well = take_lock(path)
                undo.callback(os.close, lock_fd)
                whole = not (ended_well and Log(path).is_empty())
                writer = undo.enter_context(closing(open_writer(path, create=create, whole=whole)))
                queries = read_queries((paths.SQL / "queries.sql").read_text())
                _take_up(Transaction(writer, queries))
                # What a crash broke off must be gone from the log when the next one comes: see
                # Log.is_damaged().
                writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                reader, checker = await _connect_reader(path, undo), None
                if not whole:
                    checker = await _connect_reader(path, undo)
                    await checker.execute_fetchall("BEGIN")
                    await checker.execute_fetchall("SELECT 1 FROM sqlite_schema")  # from now on
                undo.pop_all()
                return cls(path, writer, reader, checker, lock_fd, queries)

    async def close(self) -> None:
        """Close all connections; what waits is not written."""
        with ExitStack() as last:
            last.callback(os.close, self._lock_fd)
            if self._checker is None and not self._damaged:
                last.callback(release_lock, self._lock_fd)
            if self._checker is not None:
                last.enter_context(log_kept(self._path))
                await self._checker.interrupt()
                await self._checker.close()
            await self._reader.close()
            self._committer.shutdown()  # waits for a commit that is under way
            self._writer.close()

    async def check(self) -> None:
        """Read all of the file, as it was when it was opened, unless that has been done.

        As long as this has not ended well nothing is written into the file: what is new is in the log only,
        since SQLite moves nothing of it while somebody sees the file without. Raises ConfigError if it is
        damaged. 5 to 10 ms for each MB, in a thread.
        """
        if self._checker is None:
            return
        with explained(f"the database '{self._path}' cannot be read"):
            ((found,),) = await self._checker.execute_fetchall(INTEGRITY)
        require_sound(found, self._path)
        checker, self._checker = self._checker, None
        await checker.close()

    async def read(self, query: str, **parameters: Any) -> list[Row]:
        """Run a statement of queries.sql that changes nothing; it sees all that was committed."""
        if self._clock_jumped():
            with suppress(Unavailable):  # the disk is full; reading goes on
                await self.write(lambda tx: None)
        try:
            return list(await self._reader.execute_fetchall(self._queries[query], parameters))
        except sqlite3.DatabaseError as exc:
            if not is_of_file(exc):
                raise
            raise await self._fail(exc) from exc

    async def _fail(self, exc: sqlite3.DatabaseError) -> Exception:
        """Return what to raise for a read that failed; if the file is damaged, run() ends with it."""
        error = explain(exc, "the database cannot be read")
        if isinstance(error, ConfigError):

            def end(tx: Transaction) -> None:
                raise exc

            with suppress(Unavailable):
                await self.write(end)
        return error

    async def write(self, operation: Operation[T]) -> T:
        """Run `operation` in a transaction and return its result once that is on disk.

        Several operations may share a commit; each is rolled back alone if it raises, and gets its own
        exception. Raises Unavailable if the disk is full or failing.

        A caller that is cancelled meanwhile gets the result all the same, and CancelledError at its next
        await: what it does at once with the result belongs to the write.
        """
        if self._stopped:
            raise Unavailable("the database is closed")
        write = _Write(operation, asyncio.get_running_loop().create_future())
        await self._waiting.put(write)
        if self._stopped:  # while we waited for a place
            raise Unavailable("the database is closed")
        cancelled = False
        while not write.done.done():
            try:
                await asyncio.wait((write.done,))
            except asyncio.CancelledError:
                cancelled = True
        if cancelled and (task := asyncio.current_task()) is not None:
            task.uncancel()  # counts: asyncio.timeout() looks whether a cancel was its own
            task.cancel()
        return write.done.result()  # type: ignore[no-any-return]  # the future's type is that of the operation

    async def backup(self, file: Path) -> None:
        """Write what is committed now to `file`: one database file, mode 0600, durable when this returns.

        Reading and writing go on meanwhile. The router's sandbox lets it write below paths.state() only.
        Raises Refused if there is such a file already, Failed.
        """
        try:
            await asyncio.to_thread(_copy_file, self._path, file)
        except sqlite3.DatabaseError as exc:
            raise await self._fail(exc) from exc

    async def run(self) -> None:
        """Write until cancelled. No other task uses the writing connection, so none steps in.

        Raises ConfigError if the file turns out to be damaged: nobody's bug, and no restart heals it.
        """
        batch: list[_Write] = []
        try:
            while True:
                batch = [await self._waiting.get()]
                while len(batch) < limits.WRITES_PER_COMMIT and not self._waiting.empty():
                    batch.append(self._waiting.get_nowait())
                await self._commit(batch)
        except ConfigError:
            self._damaged = True
            raise
        finally:
            self._stopped = True
            while not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            for write in batch:  # perhaps on disk, but not acknowledged
                if not write.done.done():
                    write.done.set_exception(Unavailable("the database is closed"))

    async def _commit(self, batch: list[_Write]) -> None:
        outcomes: list[tuple[_Write, Any, BaseException | None]] = []
        transaction = self._transaction = Transaction(self._writer, self._queries)
        told: list[Callable[[], object]] = []
        try:
            await self._begin()
            clock_ms = self._follow_clock(transaction)
            for write in batch:
                self._writer.execute("SAVEPOINT write")
                transaction.told, transaction.places = [], []
                try:
                    outcomes.append((write, write.operation(transaction), None))
                    told += transaction.told
                except Exception as exc:
                    if is_of_file(exc):
                        raise
                    outcomes.append((write, None, exc))  # handed to whoever asked for it
                    self._writer.execute("ROLLBACK TO write")
                self._writer.execute("RELEASE write")
            await asyncio.get_running_loop().run_in_executor(self._committer, self._writer.execute, "COMMIT")
            self.commits += 1
            self._clock_ms = clock_ms
        except sqlite3.DatabaseError as exc:
            if not is_of_file(exc):
                raise
            failure = explain(exc, "the database cannot be written")
            if isinstance(failure, ConfigError):
                raise failure from exc
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            journal.error(
                "database-write-failed", f"{exc}; nothing of it was acknowledged", writes=len(batch)
            )
            outcomes = [(write, None, failure) for write in batch]
            told = []
        for tell in told:
            tell()
        for write, result, error in outcomes:
            if error is None:
                write.done.set_result(result)
            else:
                write.done.set_exception(error)

    async def _begin(self) -> None:
        """Begin a transaction; while another program has the database locked, the loop goes on."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limits.DATABASE_BUSY_S
        while True:
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as exc:
                if code_of(exc) != sqlite3.SQLITE_BUSY or loop.time() > deadline:
                    raise
            await asyncio.sleep(limits.DATABASE_POLL_S)

    # --- the clock ---------------------------------------------------------------------------------

    def _clock_jumped(self) -> bool:
        return abs(_clock_ms() - self._clock_ms) > limits.CLOCK_JUMP_S * 1000

    def _follow_clock(self, tx: Transaction) -> int:
        """If somebody has set the clock, move what is scheduled along with it: its pauses stay as they are.

        Returns what _clock_ms is when this is committed.
        """
        if not self._clock_jumped():
            return self._clock_ms
        clock_ms = _clock_ms()
        by = clock_ms - self._clock_ms
        tx.all("shift_messages", by=by)
        tx.all("shift_deliveries", by=by)
        journal.info("clock-set", f"by {by / 1000:+.0f} s, moving what waits along with it")
        return clock_ms


def open_writer(path: Path, *, create: bool, whole: bool) -> sqlite3.Connection:
    """Open the database, which this process has locked, and migrate it if it is older.

    `whole`: first read all of it.

    Raises ConfigError if it is missing beside an existing installation, damaged or too new; Unavailable.
    """
    beside_agents = not create and any(path.parent.glob("agents/*"))
    if beside_agents and not path.exists():
        raise missing(path)
    if whole and path.exists():
        with opened_whole(path):
            pass
    # We say BEGIN ourselves; loop and committer take turns.
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        with explained(f"the database '{path}' cannot be opened"):
            migrate(connection, path, beside_agents=beside_agents)
            _prepare(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


async def _connect_reader(path: Path, undo: AsyncExitStack) -> aiosqlite.Connection:
    reader = await undo.enter_async_context(aiosqlite.connect(path, isolation_level=None))
    reader.row_factory, reader.text_factory = Row, decode
    await reader.execute_fetchall("PRAGMA query_only = ON")
    return reader


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    connection.row_factory, connection.text_factory = sqlite3.Row, decode
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}").fetchall()
    # An acknowledged message must survive a power cut; SQLite builds may be compiled with other defaults.
    for pragma, wanted in (("synchronous", FULL), ("journal_mode", "wal"), ("foreign_keys", 1)):
        (value,) = connection.execute(f"PRAGMA {pragma}").fetchone()
        if value != wanted:
            raise ConfigError(f"SQLite took {pragma} = {value!r} for '{path}', not {wanted!r}")
    connection.executescript(states.triggers())
    connection.execute("PRAGMA busy_timeout = 0")  # the event loop cannot wait in there


def _copy_file(path: Path, target: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        copy(connection, target)
    journal.info("database-backed-up", file=str(target))
