"""What a person can do about a database that is lost or damaged, while no router runs."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from nanoclawd.db import check, copy, take_lock
from nanoclawd.errors import ConfigError, NotFound, Refused


def restore(file: Path, path: Path) -> str:
    """Put a copy of the backup `file` where the database `path` is missing, and return what it holds.

    Raises Refused if there is a database, or a router runs; ConfigError if `file` is not a sound one;
    NotFound, Failed, Unavailable.
    """
    lock_fd = take_lock(path)
    try:
        require_vacant(path)
        if not file.is_file():
            raise NotFound(f"{file}: there is no such file")
        try:
            with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as backup:
                check(backup, file)
                copy(backup, path)
                return describe(backup)
        except sqlite3.DatabaseError as exc:
            raise ConfigError(f"the backup '{file}' cannot be read: {exc}", hint="take another one") from exc
    finally:
        os.close(lock_fd)


def require_vacant(path: Path) -> None:
    """Raise Refused if there is a database, or the log of one: SQLite would take it for the new one's."""
    there = [path.with_name(path.name + suffix) for suffix in ("", "-wal", "-shm", "-journal")]
    moves = [f"mv {file} {path}.old{file.name.removeprefix(path.name)}" for file in there if file.exists()]
    if moves:
        raise Refused(f"there is a database '{path}' already", hint=f"first: {'; '.join(moves)}")


def describe(connection: sqlite3.Connection) -> str:
    """Say in a line what a database holds."""
    counts = [
        connection.execute(sql).fetchone()[0]
        for sql in (
            "SELECT count(*) FROM agent",
            "SELECT count(*) FROM session",
            "SELECT count(*) FROM inbox",
            "SELECT count(*) FROM inbox WHERE state IN ('queued', 'leased')",
            "SELECT count(*) FROM outbox",
            "SELECT count(*) FROM outbox WHERE state IN ('pending', 'leased')",
        )
    ]
    return "{} agents, {} sessions, {} messages ({} open), {} deliveries ({} open)".format(*counts)
