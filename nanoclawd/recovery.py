"""What a person can do about a database that is lost or damaged, while no router runs."""

from __future__ import annotations

import itertools
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from nanoclawd import paths
from nanoclawd.audit import Kind, append
from nanoclawd.db import Transaction, open_writer, read_queries
from nanoclawd.dbfile import check, copy, identify, migrations, opened_whole, take_lock, upgrade
from nanoclawd.errors import ConfigError, NotFound, Refused
from nanoclawd.files import sync_directory
from nanoclawd.sqlitefile import Value, read_pages, read_rows
from nanoclawd.wire import Json

LOGS = ("-wal", "-shm", "-journal")  #: what SQLite keeps beside a database
USER_VERSION = slice(60, 64)  #: in page 1: sqlite.org/fileformat2.html
UNKNOWN_AGENT = "?"  #: no agent has this name, so its chats are told that it is gone


def create(path: Path) -> str:
    """Make an empty database where one is missing, whatever is beside it. Raises as Database.open() does."""
    with _locked(path):
        with closing(open_writer(path, create=True, whole=True)) as made:
            _note(made, "created", {})
        return f"created: '{path}'"


def restore(file: Path, path: Path) -> str:
    """Put a copy of the backup `file` where the database `path` is missing, and return what it holds.

    Raises Refused if there is a database, or a router runs; ConfigError if `file` is not a sound one;
    NotFound, Failed, Unavailable.
    """
    with _locked(path):
        _require_vacant(path)
        _require_file(file)
        try:
            with opened_whole(file) as backup:
                words = _describe(backup)
                with _staged(backup, path, file, "restored"):
                    pass
        except ConfigError as exc:
            hint = f"take another one; 'nanoclawd --salvage-database {file}' takes what can be read of it"
            raise ConfigError(exc.message, hint=hint) from exc
        return words


def salvage(file: Path, path: Path) -> str:
    """Put what can be read of the damaged database `file` in place of `path`, and return what that is.

    If they are the same, the damaged one is kept beside it. Raises, and then all is as it was: Refused if
    there is another database, or nothing is wrong with `file`; ConfigError if nothing can be read; NotFound.
    """
    with _locked(path):
        _require_file(file)
        if in_place := file.resolve() == path.resolve():
            _require_damaged(file)
        else:
            _require_vacant(path)
        with closing(sqlite3.connect(":memory:", isolation_level=None)) as new:
            lost = _fill(new, file)
            lines = [f"saved: {_describe(new)}", *lost]
            with _staged(new, path, file, "salvaged"):
                if in_place:
                    lines.append(f"the damaged database is kept as '{_set_aside(path)}'")
        return "\n".join(lines)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        fd, _ = take_lock(path)
    except Refused as exc:
        raise Refused(exc.message, hint="stop it first: 'systemctl --user stop nanoclaw.service'") from None
    try:
        yield
    finally:
        os.close(fd)


def _require_file(file: Path) -> None:
    if not file.is_file():
        raise NotFound(f"{file}: there is no such file")


def _require_vacant(path: Path) -> None:
    """Raise Refused if there is a database, or the log of one: SQLite would take it for the new one's."""
    moves = [
        f"mv {path}{suffix} {path}.old{suffix}" for suffix in ("", *LOGS) if Path(f"{path}{suffix}").exists()
    ]
    if moves:
        raise Refused(f"there is a database '{path}' already", hint=f"first: {'; '.join(moves)}")


def _require_damaged(file: Path) -> None:
    try:
        with opened_whole(file):
            pass
    except ConfigError:
        return
    raise Refused(f"nothing is wrong with the database '{file}'", hint="it stays as it is")


@contextmanager
def _staged(connection: sqlite3.Connection, path: Path, source: Path, event: str) -> Iterator[None]:
    """Write and check a copy of what `source` has, and after the block put it in place of `path`.

    Its audit trail says so, for which it is brought to the newest version.
    """
    staged = path.with_name(f"{path.name}.new")
    copy(connection, staged, replace=True)
    try:
        with closing(sqlite3.connect(staged, isolation_level=None)) as written:
            check(written, source)
            upgrade(written, identify(written, source), len(migrations()))
            _note(written, event, {"file": str(source)})
        yield
        staged.rename(path)
        sync_directory(path.parent)
    finally:
        staged.unlink(missing_ok=True)


def _note(connection: sqlite3.Connection, event: str, detail: Json) -> None:
    connection.row_factory = sqlite3.Row
    queries = read_queries((paths.SQL / "queries.sql").read_text())
    append(Transaction(connection, queries), Kind.CONTROL, event, detail)


def _set_aside(path: Path) -> Path:
    """Rename a database and its logs. It goes first: it must not be taken for one without a log."""
    kept = next(
        kept for n in itertools.count(1) if not (kept := path.with_name(f"{path.name}.damaged-{n}")).exists()
    )
    for suffix in ("", *LOGS):
        if (file := Path(f"{path}{suffix}")).exists():
            file.rename(f"{kept}{suffix}")
    sync_directory(path.parent)
    return kept


# --- what can be read -------------------------------------------------------------------------------


def _fill(new: sqlite3.Connection, file: Path) -> list[str]:
    """Fill an empty database with what can be read of `file`; return what was lost, in lines."""
    pages = read_pages(file)
    version, newest = int.from_bytes(pages.get(1, b"")[USER_VERSION], "big"), len(migrations())
    # Its own version, as migrations may change rows: it is migrated when it is opened.
    upgrade(new, 0, version if 0 < version <= newest else newest)
    names = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
    tables = [table for (table,) in new.execute(names)]
    columns = {table: [c[1] for c in new.execute(f"PRAGMA table_info({table})")] for table in tables}
    presets = {table: new.execute(f"SELECT * FROM {table}").fetchall() for table in tables}
    new.execute("PRAGMA foreign_keys = OFF")
    new.execute("BEGIN")
    for table in tables:
        new.execute(f"DELETE FROM {table}")
    lost = sum(row is None or not _insert(new, columns, *row) for row in read_rows(pages))
    for table, rows in presets.items():
        if rows and not new.execute(f"SELECT 1 FROM {table}").fetchone():
            for row in rows:
                _insert_into(new, table, columns[table], row)
    lines = [f"lost: {lost} rows or pages of rows that could not be read"] if lost else []
    lines += _mend_references(new)
    new.execute("COMMIT")
    if not any(new.execute(f"SELECT 1 FROM {table}").fetchone() for table in tables if not presets[table]):
        raise ConfigError(f"nothing of ours can be read in '{file}'", hint="restore a backup")
    return lines


def _insert(
    new: sqlite3.Connection, columns: Mapping[str, Sequence[str]], rowid: int, values: Sequence[Value]
) -> bool:
    """Insert a row into the table that takes it: STRICT and CHECK know it. Returns whether there was one."""
    if len(values) in (5, 2) and values[0] in ("table", "index", "trigger", *columns):
        return True  # of sqlite_schema or sqlite_sequence
    if values and values[0] is None:
        values = [rowid, *values[1:]]  # INTEGER PRIMARY KEY
    # A row that is older than a column ends before it.
    return any(
        _insert_into(new, table, columns[table][: len(values)], values)
        for table in columns
        if len(values) <= len(columns[table])
    )


def _insert_into(
    new: sqlite3.Connection, table: str, columns: Sequence[str], values: Sequence[Value]
) -> bool:
    marks = ", ".join("?" for _ in values)
    try:
        new.execute(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", values)
    except sqlite3.IntegrityError:
        return False
    return True


def _mend_references(new: sqlite3.Connection) -> list[str]:
    """Give messages whose session is lost another one, and deliveries whose message is lost none."""
    sessions = new.execute(
        "SELECT DISTINCT session, channel, chat, thread FROM inbox"
        " WHERE session NOT IN (SELECT id FROM session)"
    ).fetchall()
    for session, *place in sessions:
        (agent,) = new.execute(
            "SELECT coalesce((SELECT agent FROM outbox WHERE (channel, chat, thread) = (?, ?, ?)),"
            " (SELECT name FROM agent WHERE 1 = (SELECT count(*) FROM agent)), ?)",
            (*place, UNKNOWN_AGENT),
        ).fetchone()
        # As enqueue() names it: the agent finds its transcripts again.
        name = f"{re.sub('[^a-z0-9]', '_', place[0].lower())[:32]}_{session}"
        for owner in (agent, UNKNOWN_AGENT):  # the second if another session has the name
            new.execute(
                "INSERT OR IGNORE INTO session (id, agent, name, channel, chat, thread, created_at)"
                " VALUES (?, ?, ?, ?, ?, ?, 0)",
                (session, owner, name, *place),
            )
            where = "(agent, channel, chat, thread) = (?, ?, ?, ?)"
            if row := new.execute(f"SELECT id FROM session WHERE {where}", (owner, *place)).fetchone():
                new.execute("UPDATE inbox SET session = ? WHERE session = ?", (*row, session))
                break
    new.execute("UPDATE outbox SET message = NULL WHERE message NOT IN (SELECT id FROM inbox)")
    _remove_orphans(new)
    return [f"made anew: {len(sessions)} sessions whose messages there are"] if sessions else []


def _remove_orphans(new: sqlite3.Connection) -> None:
    """Remove what is about people, chats or agents in chats that are lost: nobody gets a right by a loss."""
    while orphans := new.execute("PRAGMA foreign_key_check").fetchall():
        for table, rowid, *_ in orphans:
            new.execute(f"DELETE FROM {table} WHERE rowid = ?", (rowid,))


def _describe(connection: sqlite3.Connection) -> str:
    """Say in a line what a database holds."""
    counts = [
        connection.execute(f"SELECT count(*) FROM {rows}").fetchone()[0]
        for rows in (
            "agent",
            "session",
            "inbox",
            "inbox WHERE state IN ('queued', 'leased')",
            "outbox",
            "outbox WHERE state IN ('pending', 'leased')",
        )
    ]
    return "{} agents, {} sessions, {} messages ({} open), {} deliveries ({} open)".format(*counts)
