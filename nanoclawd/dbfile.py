"""The router's database as a file: whose it is, whether it is sound, its versions and copies."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

from nanoclawd import files, journal, paths
from nanoclawd.errors import ConfigError, Failed, NanoclawError, Refused, Unavailable
from nanoclawd.sqlitefile import Log

APPLICATION_ID = 0x4E434C57  # "NCLW", in the file's header: sqlite.org/pragma.html#pragma_application_id
# Result codes: sqlite.org/rescode.html
_DISK = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM)
_ACCESS = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM)
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
INTEGRITY = "PRAGMA integrity_check(1)"
DAMAGED_HINT = (
    "'nanoclawd --salvage-database' takes what can be read of it,"
    " 'nanoclawd --restore-database FILE' a backup in its place"
)


def take_lock(path: Path) -> tuple[int, bool]:
    """Take the lock beside the database, for as long as the descriptor is open.

    Returns that, and whether the one who had it last called release_lock(), or there was none.
    """
    lock = path.with_name(f"{path.name}.lock")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise Unavailable(
            f"{lock}: cannot be opened: {exc.strerror}", hint=f"see 'df -h ~' and 'namei -l {lock}'"
        ) from None
    owner = os.pread(fd, 32, 0).decode(errors="replace").strip()
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise Refused(
            f"another nanoclawd (pid {owner}) has the database '{path}'",
            hint="there is one for each user: see 'systemctl --user status nanoclaw'",
        ) from None
    with suppress(OSError):  # a full disk; the pid is for people, the lock holds without it
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd, not owner


def release_lock(fd: int) -> None:
    """Say that the database was closed in good order. The lock itself goes with the descriptor."""
    with suppress(OSError):
        os.ftruncate(fd, 0)


def missing(path: Path) -> ConfigError:
    """Return the error that says so."""
    return ConfigError(
        f"the database '{path}' is missing, though there are agents beside it",
        hint="put a backup in its place with 'nanoclawd --restore-database FILE', or accept the loss of all"
        " queued messages with 'nanoclawd --create-database'",
    )


def migrations() -> list[Path]:
    """Return the files of all migrations; the last one's number is the version of the schema."""
    return sorted((paths.SQL / "migrations").glob("[0-9]*.sql"))


def identify(connection: sqlite3.Connection, path: Path) -> int:
    """Return the version of the database's schema, 0 if it is empty.

    Raises ConfigError if it is not ours or too new.
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
            hint=f"install the newer nanoclawd again, or move the database away and run"
            f" 'nanoclawd --restore-database {path}.backup-{newest}'",
        )
    return int(version)


def check(connection: sqlite3.Connection, path: Path) -> None:
    """Raise ConfigError if the database is not a sound one of ours. Reads all of it: 5 to 10 ms a MB."""
    identify(connection, path)
    (found,) = connection.execute(INTEGRITY).fetchone()
    require_sound(found, path)


def require_sound(found: str, path: Path) -> None:
    """Raise ConfigError unless `found`, what INTEGRITY says, is that nothing is wrong."""
    if found != "ok":
        raise ConfigError(f"the database '{path}' is damaged: {' '.join(found.split())}", hint=DAMAGED_HINT)


@contextmanager
def log_kept(path: Path) -> Iterator[None]:
    """Leave the log of the database as it is, also if all who write close their connections in the block.

    SQLite's last connection moves the log into the file; one that may not write is not able to.
    """
    with ExitStack() as last:
        with suppress(sqlite3.DatabaseError):  # gone, or no database any more: others will tell
            connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
            last.enter_context(closing(connection)).execute("SELECT 1 FROM sqlite_schema").fetchone()
        yield


@contextmanager
def opened_whole(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a database and read all of it, log included; nothing is written. Raises as check() does."""
    if Log(path).is_damaged():
        raise ConfigError(f"the log of the database '{path}' is damaged", hint=DAMAGED_HINT)
    with (
        explained(f"the database '{path}' cannot be opened"),
        log_kept(path),
        closing(sqlite3.connect(path)) as opened,
    ):
        check(opened, path)
        yield opened


def migrate(connection: sqlite3.Connection, path: Path, *, beside_agents: bool) -> None:
    """Bring the schema to the newest version, after a check and a backup."""
    version = identify(connection, path)
    if version == 0 and beside_agents:  # an empty file is no better than none
        raise missing(path)
    if 0 < version < len(migrations()):
        check(connection, path)
        backup = path.with_name(f"{path.name}.backup-{version}")
        copy(connection, backup, replace=True)
        journal.info("database-backed-up", file=str(backup))
    newest = len(migrations())
    if version < newest:
        upgrade(connection, version, newest)
        journal.info("database-migrated", version=newest)


def upgrade(connection: sqlite3.Connection, version: int, wanted: int) -> None:
    """Bring the schema from one version to another: each migration and its record in one transaction."""
    # What refers to a table that is made anew refers to the new one; SQLite builds may have other defaults.
    connection.execute("PRAGMA foreign_keys = OFF")
    for number, file in enumerate(migrations()[version:wanted], start=version + 1):
        # executescript() commits what is open first, so the transaction is part of the script.
        connection.executescript(
            f"BEGIN IMMEDIATE;\n{file.read_text()}\n"
            f"PRAGMA application_id = {APPLICATION_ID};\nPRAGMA user_version = {number};\nCOMMIT;"
        )


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


def decode(text: bytes) -> str:
    """Return a text of the database: one with a bit that has flipped must not make its row unreadable."""
    return text.decode(errors="replace")


def code_of(exc: Exception) -> int:
    """Return the primary result code of SQLite, 0 if there is none."""
    return int(getattr(exc, "sqlite_errorcode", 0)) & 0xFF


def is_of_file(exc: Exception) -> bool:
    """Say whether file or disk failed, and not the one statement: the rest of its transaction fails, too."""
    return code_of(exc) in (*_DISK, *_ACCESS, *_DAMAGE, sqlite3.SQLITE_BUSY)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Raise what SQLite says in the block as an error of ours, which begins with `what`."""
    try:
        yield
    except (sqlite3.DatabaseError, UnicodeDecodeError) as exc:  # the latter if its own words are damaged
        raise explain(exc, what) from exc


def explain(exc: Exception, what: str) -> NanoclawError:
    """Return the error that says what happened and what to do: ConfigError if the file must be replaced."""
    code = code_of(exc)
    if code in _DISK:
        return Unavailable(f"{what}: {exc}", hint="is the disk full? see 'df -h ~'")
    if code in _ACCESS:
        return Unavailable(f"{what}: {exc}", hint="is the disk read-only? see 'findmnt -T ~' and 'ls -la'")
    if code == sqlite3.SQLITE_BUSY:
        return Unavailable(f"{what}: {exc}", hint="another program has it open: see 'fuser -v' of the file")
    return ConfigError(f"{what}: {exc}", hint=DAMAGED_HINT)
