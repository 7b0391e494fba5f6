"""What the adapter does not forget."""

from __future__ import annotations

import sqlite3
import stat
from pathlib import Path

import pytest

from nanoclaw_matrix import store as module
from nanoclaw_matrix.store import Store


def test_it_is_still_there_after_a_restart_and_for_its_owner_alone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("position", "s1")
    store.put_event("$1", "!r", "message", detail="@ada:x")
    store.put_own("$2", "!r", "berta", "nc-1")
    store.close()

    store = Store(tmp_path)

    assert (store.get("position"), store.sent("nc-1"), store.sent("nc-2")) == ("s1", "$2", None)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
    store.close()


def test_edits_are_numbered_and_keep_their_number(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for event in ("$a", "$b", "$a"):
        store.put_event(event, "!r", "edit", target="$1", revision=store.revision("$1"))

    numbers = {event: row["revision"] for event in ("$a", "$b") if (row := store.event(event)) is not None}
    assert numbers == {"$a": 1, "$b": 2}
    store.close()


def test_who_sent_it_is_filled_in_when_it_is_known(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put_own("$1", "!r", "", "nc-1")  # came back by the sync first
    store.put_own("$1", "!r", "berta", "nc-1")

    row = store.event("$1")
    assert row is not None and row["detail"] == "berta"
    assert (store.agents_in("!r", "berta"), store.agents_in("!r", "carl")) == (1, 2)
    store.close()


def test_what_waits_for_a_key_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEP_WAITING", 3)
    store = Store(tmp_path)
    for number in range(5):
        store.put_undecrypted(f"${number}", "!r", "s", "{}")

    assert [row["event"] for row in store.undecrypted()] == ["$2", "$3", "$4"]
    store.drop_undecrypted("$3")
    assert [row["event"] for row in store.undecrypted("s")] == ["$2", "$4"]
    assert store.undecrypted("t") == []
    store.close()


def test_a_file_that_is_damaged_is_no_fresh_start(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"not a database, but long enough to be taken for one" * 50)
    with pytest.raises(sqlite3.DatabaseError):
        Store(tmp_path)
