"""Fixtures: a home of its own, a double of the router in it, and nanoclawctl run as a process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.cli.double import RouterDouble

ROOT = Path(__file__).resolve().parents[3]
COMMAND = [sys.executable, "-m", "nanoclawd.cli"]

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home with a short path (man 7 unix), which all processes of the test take for theirs."""
    with tempfile.TemporaryDirectory(prefix="nc-") as name:
        for variable in list(os.environ):
            if variable.startswith("XDG_") or variable in ("NO_COLOR", "JOURNAL_STREAM"):
                monkeypatch.delenv(variable)
        (Path(name) / "run").mkdir(mode=0o700)
        monkeypatch.setenv("HOME", name)
        monkeypatch.setenv("XDG_RUNTIME_DIR", f"{name}/run")
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("LC_ALL", "C.UTF-8")
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        yield Path(name)


@pytest.fixture
def router(home: Path) -> Iterator[RouterDouble]:
    double = RouterDouble()
    yield double
    double.stop()


@pytest.fixture
def run(home: Path) -> Run:
    """Run nanoclawctl to its end, without a terminal."""

    def run_command(*arguments: str, stdin: str | bytes = b"") -> subprocess.CompletedProcess[str]:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        done = subprocess.run(
            [*COMMAND, *arguments], input=data, capture_output=True, timeout=60, check=False, cwd=home
        )
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
        )

    return run_command


@pytest.fixture
def programs(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is first in PATH; fake_program() fills it."""
    directory = home / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return directory


def fake_program(directory: Path, name: str, script: str) -> Path:
    """Put a shell script in the place of a program; return the file into which it may log ($LOG)."""
    log = directory / f"{name}.log"
    file = directory / name
    file.write_text(f'#!/bin/sh\nLOG="{log}"\nprintf "%s\\n" "$*" >> "$LOG"\n{script}\n')
    file.chmod(0o755)
    return log
