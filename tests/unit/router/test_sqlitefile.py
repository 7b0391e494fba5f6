"""Rows read without SQLite are those that SQLite reads: of all types and sizes, with the log and without."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from nanoclawd.sqlitefile import Log, read_pages, read_rows

INTEGERS = [0, *(n for bits in (7, 15, 23, 31, 47, 63) for n in ((1 << bits) - 1, -(1 << bits)))]
SIZES = [0, 1, 127, 128, 1000, 4050, 4061, 4062, 4096, 8150, 20_000]  #: around those where a row runs over


@pytest.mark.parametrize("page_bytes", [512, 4096])
@pytest.mark.parametrize("seed", range(3))
def test_all_that_sqlite_reads_is_read(tmp_path: Path, seed: int, page_bytes: int) -> None:
    path, dice = tmp_path / "db", random.Random(seed)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA page_size = {page_bytes}")
        connection.execute("PRAGMA journal_mode = WAL").fetchall()
        connection.execute(
            "CREATE TABLE t (i INTEGER PRIMARY KEY, n INTEGER, s TEXT, r REAL, b BLOB) STRICT"
        )
        for step in range(300):
            if step == 200:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            values = (
                dice.choice([None, *INTEGERS]),
                dice.choice(["x", "ü"]) * dice.choice(SIZES),
                dice.choice([None, 1.5, -1e300]),
                dice.randbytes(dice.choice(SIZES)),
            )
            rowid = dice.randrange(-(1 << 63), 1 << 63)
            connection.execute("INSERT INTO t VALUES (?, ?, ?, ?, ?)", (rowid, *values))
            if step % 10 == 0:
                connection.execute("DELETE FROM t WHERE i % 7 = ?", (dice.randrange(7),))
                connection.execute("UPDATE t SET s = 'shorter' WHERE i % 7 = ?", (dice.randrange(7),))
        wanted = set(connection.execute("SELECT * FROM t"))

        rows = list(read_rows(read_pages(path)))

        assert None not in rows
        assert {(row[0], *row[1][1:]) for row in rows if row and row[1][0] is None} == wanted
        assert path.with_name("db-wal").stat().st_size > 0 and not Log(path).is_damaged()
