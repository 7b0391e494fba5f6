"""The transitions in states.py are the only ones: the database refuses every other."""

from __future__ import annotations

import itertools
import re
import sqlite3
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

import pytest

from nanoclawd import paths, states
from nanoclawd.states import (
    APPROVAL_TRANSITIONS,
    DELIVERY_TRANSITIONS,
    MESSAGE_TRANSITIONS,
    ApprovalState,
    DeliveryState,
    MessageState,
)

ARCHITECTURE = Path(__file__).parents[3] / "ARCHITECTURE.md"
TABLES: dict[str, tuple[type[StrEnum], dict[tuple[StrEnum, StrEnum], str]]] = {
    "inbox": (MessageState, dict(MESSAGE_TRANSITIONS)),
    "outbox": (DeliveryState, dict(DELIVERY_TRANSITIONS)),
    "approval": (ApprovalState, dict(APPROVAL_TRANSITIONS)),
}
PAIRS = [
    (table, source, target)
    for table, (kinds, _) in TABLES.items()
    for source, target in itertools.permutations(kinds, 2)
]


@pytest.fixture
def db() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    for migration in sorted((paths.SQL / "migrations").glob("*.sql")):
        connection.executescript(migration.read_text())
    connection.execute("INSERT INTO session VALUES (1, 'berta', 's1', 'test', 'chat', '', 0, NULL, 0)")
    connection.execute(
        "INSERT INTO inbox (id, session, channel, chat, thread, event, revision, sender, body, received_at)"
        " VALUES ('m1', 1, 'test', 'chat', '', 'e1', 0, 'me', 'text', 0)"
    )
    connection.execute(
        "INSERT INTO outbox (key, agent, channel, chat, thread, kind, body, created_at)"
        " VALUES ('k1', 'berta', 'test', 'chat', '', 'reply', 'text', 0)"
    )
    connection.execute(
        "INSERT INTO approval"
        " (id, kind, agent, session, channel, chat, thread, payload, sha256, asked_at, expires_at) VALUES"
        " ('a1', 'request', 'berta', 's1', 'test', 'chat', '', '{}', hex(zeroblob(32)), 0, 1)"
    )
    yield connection
    connection.close()


def put(db: sqlite3.Connection, table: str, state: str, *, dropped: bool = False) -> None:
    ended = 1 if state in ("answered", "stopped", "dead", "sent") else None
    db.execute(f"UPDATE {table} SET state = ?, ended_at = ?, dropped = ?", (state, ended, dropped))
    assert db.execute(f"SELECT state FROM {table}").fetchone() == (state,)


def prepare_inbox(db: sqlite3.Connection, state: str) -> None:
    leased = 1 if state == "leased" else None
    db.execute(
        "UPDATE inbox SET state = ?, turn = 't1', lease_expires_at = ?, ended_at = ?",
        (state, leased, None if state in ("queued", "leased") else 1),
    )


def prepare_approval(db: sqlite3.Connection, state: str) -> None:
    answered = state in ("allowed", "denied", "used")
    values = ("once", 1, "ada") if answered else (None, None, None)
    db.execute("UPDATE approval SET state = ?, scope = ?, decided_at = ?, decided_by = ?", (state, *values))


def prepare_outbox(db: sqlite3.Connection, state: str) -> None:
    put(db, "outbox", state)


PREPARE = {"inbox": prepare_inbox, "outbox": prepare_outbox, "approval": prepare_approval}


@pytest.mark.parametrize(("table", "source", "target"), PAIRS)
def test_only_what_the_table_has_is_possible(
    db: sqlite3.Connection, table: str, source: StrEnum, target: StrEnum
) -> None:
    move = PREPARE[table]
    move(db, source)
    db.executescript(states.triggers())

    if (source, target) in TABLES[table][1]:
        move(db, target)
    else:
        with pytest.raises(sqlite3.IntegrityError, match="no such transition"):
            move(db, target)


@pytest.mark.parametrize("table", TABLES)
def test_row_begins_in_its_first_state(db: sqlite3.Connection, table: str) -> None:
    db.executescript(states.triggers())
    key = "key" if table == "outbox" else "id"
    columns = [name for _, name, *_ in db.execute(f"PRAGMA table_info({table})") if name not in ("seq",)]
    chosen = {key: "'new'", "event": "'new'", "state": "'dead'", "ended_at": "1"}
    if table == "approval":
        chosen |= {"agent": "'emil'", "state": "'expired'"}
    values = ", ".join(chosen.get(name, name) for name in columns)

    with pytest.raises(sqlite3.IntegrityError, match="begins as"):
        db.execute(f"INSERT INTO {table} ({', '.join(columns)}) SELECT {values} FROM {table}")


@pytest.mark.parametrize(("table", "state"), [(t, s) for t, (kinds, _) in TABLES.items() for s in kinds])
@pytest.mark.parametrize("dropped", [False, True])
def test_only_what_has_ended_can_be_deleted(
    db: sqlite3.Connection, table: str, state: StrEnum, dropped: bool
) -> None:
    PREPARE[table](db, state)
    if table != "approval":
        db.execute(f"UPDATE {table} SET dropped = ?", (dropped,))
    elif state == "allowed" and dropped:
        db.execute("UPDATE approval SET scope = 'always'")
    db.executescript(states.triggers())

    ends = ("answered", "stopped", "sent", "denied", "used", "expired")
    if state in ends or (state in ("dead", "allowed") and dropped):
        db.execute(f"DELETE FROM {table}")
    else:
        with pytest.raises(sqlite3.IntegrityError, match="is needed"):
            db.execute(f"DELETE FROM {table}")


@pytest.mark.parametrize(
    ("title", "transitions"),
    [
        ("message", MESSAGE_TRANSITIONS),
        ("delivery", DELIVERY_TRANSITIONS),
        ("approval", APPROVAL_TRANSITIONS),
    ],
)
def test_architecture_has_the_same_table(
    title: str, transitions: dict[tuple[StrEnum, StrEnum], str]
) -> None:
    section = ARCHITECTURE.read_text().partition(f"| {title} | ")[2].partition("\n\n")[0]

    rows = re.findall(r"^\| (\w+) → (\w+) \| (.*) \|$", section, re.MULTILINE)

    assert rows == [(str(source), str(target), cause) for (source, target), cause in transitions.items()]
