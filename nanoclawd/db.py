"""The router's SQLite database: opened and checked, one writer, writes grouped into durable commits.

Statements of a transaction run on the event loop: they take microseconds, and nothing can step in between.
Only the commit, which waits for the disk, has a thread; and reads, which may be long, have aiosqlite's.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiosqlite

from nanoclawd import files, journal, limits, paths, states
from nanoclawd.errors import ConfigError, Failed, Refused, Unavailable

T = TypeVar("T")
Row = sqlite3.Row

APPLICATION_ID = 0x4E434C57  # "NCLW", in the file's header: sqlite.org/pragma.html#pragma_application_id
FULL = 2  # PRAGMA synchronous
#: Result codes of SQLite (sqlite.org/rescode.html) that say nothing against the file.
_PASSING = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM)
_DISK_HINT = "is the disk full? see 'df -h ~'"
_DAMAGED_HINT = "put a backup (nanoclaw.db.backup-*) in its place; 'sqlite3 FILE .recover' may help"


def now_ms() -> int:
    """Return the time as the database has it."""
    return time.time_ns() // 1_000_000


def read_queries(text: str) -> dict[str, str]:
    """Return the statements of a queries.sql by their names."""
    parts = re.split(r"(?m)^-- (\w+) --$", text)
    return {name: sql.strip() for name, sql in zip(parts[1::2], parts[2::2], strict=True)}


class Transaction:
    """What a write sees: named statements, run at once and in order on the one writing connection."""

    def __init__(self, connection: sqlite3.Connection, queries: dict[str, str]) -> None:
        self._connection = connection
        self._queries = queries

    def all(self, query: str, **parameters: Any) -> list[Row]:
        """Run a statement of queries.sql and return its rows."""
        return self._connection.execute(self._queries[query], parameters).fetchall()

    def one(self, query: str, **parameters: Any) -> Row | None:
        """The same for a statement that gives one row or none."""
        rows = self.all(query, **parameters)
        return rows[0] if rows else None


Operation = Callable[[Transaction], T]


@dataclass(slots=True)
class _Write:
    operation: Operation[Any]
    done: asyncio.Future[Any]


class Database:
    """Opens with open(); run() must run as a task while write() is used."""

    def __init__(
        self, path: Path, writer: sqlite3.Connection, reader: aiosqlite.Connection, lock_fd: int
    ) -> None:
        self._path = path
        self._writer = writer
        self._reader = reader
        self._lock_fd = lock_fd
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._queries = read_queries((paths.SQL / "queries.sql").read_text())
        self._waiting: asyncio.Queue[_Write] = asyncio.Queue(maxsize=4 * limits.WRITES_PER_COMMIT)
        self._stopped = False
        self.commits = 0  #: for benchmarks

    @classmethod
    async def open(cls, path: Path, *, create: bool = False) -> Database:
        """Open the database, migrate it if it is older.

        Raises ConfigError if it is missing beside an existing installation, damaged or too new; Refused if
        another process has it.
        """
        lock_fd = take_lock(path)
        writer: sqlite3.Connection | None = None
        try:
            beside_agents = not create and any(path.parent.glob("agents/*"))
            if beside_agents and not path.exists():
                raise _missing(path)
            # We say BEGIN ourselves; loop and committer take turns.
            writer = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            _migrate(writer, path, beside_agents=beside_agents)
            _prepare(writer, path)
            reader = await aiosqlite.connect(path, isolation_level=None)
            reader.row_factory = sqlite3.Row
            await reader.execute_fetchall("PRAGMA query_only = ON")
            return cls(path, writer, reader, lock_fd)
        except BaseException as exc:
            if writer is not None:
                writer.close()
            os.close(lock_fd)
            if not isinstance(exc, sqlite3.DatabaseError):
                raise
            if getattr(exc, "sqlite_errorcode", 0) & 0xFF in _PASSING:
                raise Unavailable(f"the database '{path}' cannot be opened: {exc}", hint=_DISK_HINT) from exc
            raise ConfigError(
                f"the database '{path}' cannot be opened: {exc}",
                hint=_DAMAGED_HINT,
            ) from exc

    async def close(self) -> None:
        """Close both connections; what waits is not written."""
        await self._reader.close()
        self._committer.shutdown()  # waits for a commit that is under way
        self._writer.close()
        os.close(self._lock_fd)

    async def read(self, query: str, **parameters: Any) -> list[Row]:
        """Run a statement of queries.sql that changes nothing; it sees all that was committed."""
        try:
            return list(await self._reader.execute_fetchall(self._queries[query], parameters))
        except sqlite3.OperationalError as exc:
            raise Unavailable(f"the database cannot be read: {exc}", hint=_DISK_HINT) from exc
        except sqlite3.DatabaseError as exc:
            raise _explain(exc) from exc

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
        await asyncio.to_thread(_copy_file, self._path, file)

    async def run(self) -> None:
        """Write until cancelled. No other task uses the writing connection, so none steps in."""
        batch: list[_Write] = []
        try:
            while True:
                batch = [await self._waiting.get()]
                while len(batch) < limits.WRITES_PER_COMMIT and not self._waiting.empty():
                    batch.append(self._waiting.get_nowait())
                await self._commit(batch)
        finally:
            self._stopped = True
            while not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            for write in batch:  # perhaps on disk, but not acknowledged
                if not write.done.done():
                    write.done.set_exception(Unavailable("the database is closed"))

    async def _commit(self, batch: list[_Write]) -> None:
        outcomes: list[tuple[_Write, Any, BaseException | None]] = []
        transaction = Transaction(self._writer, self._queries)
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            for write in batch:
                self._writer.execute("SAVEPOINT write")
                try:
                    outcomes.append((write, write.operation(transaction), None))
                except sqlite3.OperationalError:
                    raise  # the disk, not this operation
                except Exception as exc:  # handed to whoever asked for it
                    outcomes.append((write, None, exc))
                    self._writer.execute("ROLLBACK TO write")
                self._writer.execute("RELEASE write")
            await asyncio.get_running_loop().run_in_executor(self._committer, self._writer.execute, "COMMIT")
            self.commits += 1
        except sqlite3.OperationalError as exc:
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            journal.error(
                "database-write-failed", f"{exc}; nothing of it was acknowledged", writes=len(batch)
            )
            failure = Unavailable(f"the database cannot be written: {exc}", hint=_DISK_HINT)
            outcomes = [(write, None, failure) for write in batch]
        for write, result, error in outcomes:
            if error is None:
                write.done.set_result(result)
            else:
                write.done.set_exception(error)


def _explain(exc: Exception) -> Exception:
    """Return a damaged file as what it is: nobody's bug, and no restart heals it."""
    if type(exc) is sqlite3.DatabaseError:  # SQLITE_CORRUPT, SQLITE_NOTADB; the others have classes below it
        return ConfigError(f"the database is damaged: {exc}", hint=_DAMAGED_HINT)
    return exc


def take_lock(path: Path) -> int:
    """Take the lock beside the database, for as long as the descriptor is open."""
    lock = path.with_name(f"{path.name}.lock")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise Unavailable(
            f"{lock}: cannot be opened: {exc.strerror}", hint=f"see 'df -h ~' and 'namei -l {lock}'"
        ) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(fd, 32, 0).decode(errors="replace").strip()
        os.close(fd)
        raise Refused(
            f"another nanoclawd (pid {owner}) has the database '{path}'",
            hint="there is one for each user: see 'systemctl --user status nanoclaw'",
        ) from None
    with suppress(OSError):  # a full disk; the pid is for people, the lock holds without it
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    connection.row_factory = sqlite3.Row
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "busy_timeout = 5000"):
        connection.execute(f"PRAGMA {pragma}")
    # An acknowledged message must survive a power cut; SQLite builds may be compiled with other defaults.
    for pragma, wanted in (("synchronous", FULL), ("journal_mode", "wal"), ("foreign_keys", 1)):
        (value,) = connection.execute(f"PRAGMA {pragma}").fetchone()
        if value != wanted:
            raise ConfigError(f"SQLite took {pragma} = {value!r} for '{path}', not {wanted!r}")
    connection.executescript(states.triggers())


def _missing(path: Path) -> ConfigError:
    return ConfigError(
        f"the database '{path}' is missing, though there are agents beside it",
        hint="put a backup (nanoclaw.db.backup-*) back in its place, or accept the loss of all"
        " queued messages with 'nanoclawd --create-database'",
    )


def migrations() -> list[Path]:
    """Return the files of all migrations; the last one's number is the version of the schema."""
    return sorted((paths.SQL / "migrations").glob("[0-9]*.sql"))


def check(connection: sqlite3.Connection, path: Path) -> int:
    """Return the version of the database's schema, 0 if it is empty.

    Raises ConfigError if it is not ours, too new or damaged. Reads all of it: 10 ms for each MB.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if application != APPLICATION_ID and (version or application or tables):
        raise ConfigError(f"'{path}' is a database of another program", hint="move it away")
    newest = len(migrations())
    if version > newest:
        raise ConfigError(
            f"the database '{path}' has version {version}, and this nanoclawd knows {newest}",
            hint=f"install the newer nanoclawd again, or put '{path}.backup-{newest}' back",
        )
    (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if found != "ok":
        raise ConfigError(f"the database '{path}' is damaged: {' '.join(found.split())}", hint=_DAMAGED_HINT)
    return int(version)


def _migrate(connection: sqlite3.Connection, path: Path, *, beside_agents: bool) -> None:
    """Bring the schema to the newest version: each migration and its record in one transaction."""
    version = check(connection, path)
    if version == 0 and beside_agents:  # an empty file is no better than none
        raise _missing(path)
    if 0 < version < len(migrations()):
        backup = path.with_name(f"{path.name}.backup-{version}")
        copy(connection, backup, replace=True)
        journal.info("database-backed-up", file=str(backup))
    for number, file in enumerate(migrations()[version:], start=version + 1):
        # executescript() commits what is open first, so the transaction is part of the script.
        connection.executescript(
            f"BEGIN IMMEDIATE;\n{file.read_text()}\n"
            f"PRAGMA application_id = {APPLICATION_ID};\nPRAGMA user_version = {number};\nCOMMIT;"
        )
        journal.info("database-migrated", version=number)


def _copy_file(path: Path, target: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        copy(connection, target)
    journal.info("database-backed-up", file=str(target))


def copy(connection: sqlite3.Connection, target: Path, *, replace: bool = False) -> None:
    """Write a consistent copy of the database to `target`: one file, mode 0600, durable when this returns.

    Raises Refused if there is such a file already, unless it is to be replaced; Failed.
    """
    temporary = target.with_name(f".{target.name}.new")
    try:
        temporary.unlink(missing_ok=True)  # of one who was killed
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Unlike the online backup it rewrites every row and index, and gives a file that needs no log.
            connection.execute("VACUUM INTO ?", (str(temporary),))
            os.fsync(fd)
            if replace:
                temporary.replace(target)
            else:
                os.link(temporary, target)  # unlike rename(2) it replaces nothing
        finally:
            os.close(fd)
            temporary.unlink(missing_ok=True)
        files.sync_directory(target.parent)
    except FileExistsError:
        raise Refused(f"there is a file '{target}' already", hint="choose another name") from None
    except sqlite3.OperationalError as exc:  # the disk is full
        raise Failed(f"{target}: cannot be written: {exc}", hint=f"see 'df -h {target.parent}'") from exc
    except OSError as exc:
        raise files.failed(target, "cannot be written", exc) from None
