"""What the adapter must not forget: its login, how far it has read, what it knows of rooms and events.

One SQLite file, in which each call is a transaction that is on disk when it returns. The keys of encryption
are in files of their own, see homeserver.py.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KEEP_DAYS = 180  #: events that are older are forgotten: an edit of one is then a new message
KEEP_WAITING = 1000  #: messages that could not be decrypted and wait for their key

SCHEMA = """
CREATE TABLE IF NOT EXISTS setting (
    name TEXT PRIMARY KEY, -- "position", "login", "cross-signing"
    value TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS room (
    room TEXT PRIMARY KEY,
    state TEXT NOT NULL CHECK (state IN ('invited', 'joined')),
    inviter TEXT NOT NULL DEFAULT '',
    inviter_name TEXT NOT NULL DEFAULT '',
    direct INTEGER NOT NULL DEFAULT 0,
    title TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE TABLE IF NOT EXISTS event (
    event TEXT PRIMARY KEY,
    room TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('message', 'edit', 'reaction', 'own')),
    thread TEXT NOT NULL DEFAULT '',
    target TEXT NOT NULL DEFAULT '', -- of edit and reaction: the event that it is about
    revision INTEGER NOT NULL DEFAULT 0, -- of an edit: 1, 2, ...
    detail TEXT NOT NULL DEFAULT '', -- of a reaction: the emoji; of what is our own: the agent
    txn TEXT UNIQUE, -- of what is our own: the transaction id under which it was sent
    at INTEGER NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS own ON event (room, detail) WHERE kind = 'own';
CREATE INDEX IF NOT EXISTS edits ON event (target) WHERE kind = 'edit';
CREATE TABLE IF NOT EXISTS upload (
    txn TEXT PRIMARY KEY,
    content TEXT NOT NULL, -- JSON: what the event says of the file
    at INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS undecrypted (
    event TEXT PRIMARY KEY,
    room TEXT NOT NULL,
    session TEXT NOT NULL, -- the Megolm session whose key is missing
    source TEXT NOT NULL, -- JSON
    at INTEGER NOT NULL
) STRICT;
"""


class Store:
    """The file; used from one thread."""

    def __init__(self, directory: Path) -> None:
        path = directory / "state.db"
        os.close(os.open(path, os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.executescript(SCHEMA)
        horizon = int(time.time()) - KEEP_DAYS * 86400
        for table in ("event", "upload", "undecrypted"):
            self._db.execute(f"DELETE FROM {table} WHERE at < ?", (horizon,))

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make several calls one transaction; no await in it."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def get(self, name: str) -> str | None:
        row = self._db.execute("SELECT value FROM setting WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row["value"])

    def put(self, name: str, value: str | None) -> None:
        """Keep a value, or forget it."""
        if value is None:
            self._db.execute("DELETE FROM setting WHERE name = ?", (name,))
        else:
            self._db.execute("INSERT OR REPLACE INTO setting VALUES (?, ?)", (name, value))

    # Rooms

    def put_invitation(
        self, room: str, *, inviter: str, inviter_name: str, direct: bool, title: str
    ) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO room VALUES (?, 'invited', ?, ?, ?, ?)",
            (room, inviter, inviter_name, direct, title),
        )

    def put_joined(self, room: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO room (room, state) VALUES (?, 'joined')", (room,))

    def drop_room(self, room: str) -> None:
        self._db.execute("DELETE FROM room WHERE room = ?", (room,))

    def room_state(self, room: str) -> str | None:
        row = self._db.execute("SELECT state FROM room WHERE room = ?", (room,)).fetchone()
        return None if row is None else str(row["state"])

    def invitations(self) -> list[sqlite3.Row]:
        return self._db.execute("SELECT * FROM room WHERE state = 'invited'").fetchall()

    # Events

    def put_event(self, event: str, room: str, kind: str, **more: Any) -> None:
        """Note an event; one that is known stays as it is."""
        columns = {"event": event, "room": room, "kind": kind, "at": int(time.time()), **more}
        names, marks = ", ".join(columns), ", ".join(f":{name}" for name in columns)
        self._db.execute(f"INSERT OR IGNORE INTO event ({names}) VALUES ({marks})", columns)

    def put_own(self, event: str, room: str, agent: str, txn: str, thread: str = "") -> None:
        """Note what the account itself has sent; who learns more of it later says so."""
        self._db.execute(
            "INSERT INTO event (event, room, kind, thread, detail, txn, at) VALUES (?, ?, 'own', ?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET thread = excluded.thread, detail = excluded.detail"
            " WHERE detail = ''",
            (event, room, thread, agent, txn, int(time.time())),
        )

    def event(self, event: str) -> sqlite3.Row | None:
        row: sqlite3.Row | None = self._db.execute(
            "SELECT * FROM event WHERE event = ?", (event,)
        ).fetchone()
        return row

    def sent(self, txn: str) -> str | None:
        """Return the event that was made of a transaction of ours, if it is known."""
        row = self._db.execute("SELECT event FROM event WHERE txn = ?", (txn,)).fetchone()
        return None if row is None else str(row["event"])

    def revision(self, target: str) -> int:
        """Return the number of the next edit of `target`."""
        (count,) = self._db.execute(
            "SELECT coalesce(max(revision), 0) FROM event WHERE target = ? AND kind = 'edit'", (target,)
        ).fetchone()
        return int(count) + 1

    def agents_in(self, room: str, agent: str) -> int:
        """Return how many agents have written into a room, `agent` among them."""
        (others,) = self._db.execute(
            "SELECT count(DISTINCT detail) FROM event"
            " WHERE room = ? AND kind = 'own' AND detail NOT IN ('', ?)",
            (room, agent),
        ).fetchone()
        return 1 + int(others)

    # Uploads

    def put_upload(self, txn: str, content: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO upload VALUES (?, ?, ?)", (txn, content, int(time.time())))

    def upload(self, txn: str) -> str | None:
        row = self._db.execute("SELECT content FROM upload WHERE txn = ?", (txn,)).fetchone()
        return None if row is None else str(row["content"])

    # What could not be decrypted

    def put_undecrypted(self, event: str, room: str, session: str, source: str) -> None:
        values = (event, room, session, source, int(time.time()))
        self._db.execute("INSERT OR IGNORE INTO undecrypted VALUES (?, ?, ?, ?, ?)", values)
        self._db.execute(
            "DELETE FROM undecrypted WHERE rowid <= (SELECT max(rowid) FROM undecrypted) - ?",
            (KEEP_WAITING,),
        )

    def undecrypted(self, session: str | None = None) -> list[sqlite3.Row]:
        """Return what waits for a key (default: any), oldest first."""
        return self._db.execute(
            "SELECT * FROM undecrypted WHERE session = coalesce(?, session) ORDER BY rowid", (session,)
        ).fetchall()

    def drop_undecrypted(self, event: str) -> None:
        self._db.execute("DELETE FROM undecrypted WHERE event = ?", (event,))
