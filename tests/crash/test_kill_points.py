"""The router dies at every kind of point, and nothing is lost, repeated, out of order or left behind."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.crash import adapter
from tests.crash.points import Kind

POINTS = 200
FIRST, STEP = 4, 9  #: which points of an adapter; tests/crash/run --adapter has them all
ROOT = Path(__file__).resolve().parents[2]


def test_router_that_dies_anywhere_loses_nothing_and_repeats_nothing(tmp_path: Path) -> None:
    memory = Path("/dev/shm")  # kill -9 takes nothing from a file, wherever that is
    env = {**os.environ, "TMPDIR": str(memory if memory.is_dir() else tmp_path)}
    command = [sys.executable, "-m", "tests.crash", "--points", str(POINTS), "--seed", "1"]

    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    for kind in Kind:
        assert re.search(rf"(?m)^{kind} +[1-9]", done.stdout), f"nothing died {kind}"


def test_adapter_that_dies_anywhere_loses_nothing_and_repeats_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with tempfile.TemporaryDirectory(prefix="nc-") as root:  # short enough for a socket
        table, faults = asyncio.run(adapter.run(Path(root), monkeypatch, FIRST, STEP))

    assert faults == []
    assert table.points >= 10
    print(table.render())


def test_action_that_is_held_is_done_once_wherever_the_router_dies() -> None:
    command = [sys.executable, "-m", "tests.crash.approvals", "allowed by two", "cannot be done"]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    for kind in (Kind.BEFORE_COMMIT, Kind.AFTER_COMMIT):
        assert re.search(rf"(?m)^{kind} +[1-9]", done.stdout), f"nothing died {kind}"
