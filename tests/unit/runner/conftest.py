"""A real runner process beside a test double of the router."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.runner.router_double import WAIT_S, RouterDouble

AGENT_IMAGE = Path(__file__).parents[3] / "agent-image"


class Runner:
    """A place for a runner: its directories and sockets, and the processes that ran there."""

    def __init__(self, place: Path, **settings: Any) -> None:
        self.place = place
        self.workspace = place / "workspace"
        self.session = place / "session"
        self.workspace.mkdir()
        self.session.mkdir()
        self.router = RouterDouble(place / "host.sock", **settings)
        self.process: subprocess.Popen[bytes] | None = None
        self._notifications = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notifications.bind(str(place / "notify.sock"))
        self._notifications.settimeout(WAIT_S)

    def start(self) -> None:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.workspace),
            "PYTHONPATH": str(AGENT_IMAGE),
            "NOTIFY_SOCKET": str(self.place / "notify.sock"),
            "NANOCLAW_HOST_SOCKET": str(self.place / "host.sock"),
            "NANOCLAW_GATEWAY_SOCKET": str(self.place / "gateway.sock"),
            "NANOCLAW_PROXY": "",
            "NANOCLAW_SESSION": str(self.session),
            "NANOCLAW_WORKSPACE": str(self.workspace),
        }
        self.process = subprocess.Popen([sys.executable, "-m", "runner"], env=environment, cwd=self.place)

    def wait_exit(self) -> int:
        assert self.process is not None
        return self.process.wait(WAIT_S)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def notification(self) -> str:
        return self._notifications.recv(4096).decode()

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()
        self._notifications.close()
        self.router.close()


@pytest.fixture
def place() -> Iterator[Path]:
    # Not tmp_path: its name is too long for a Unix socket (man 7 unix: 108 bytes).
    with tempfile.TemporaryDirectory(prefix="runner-") as directory:
        yield Path(directory)


@pytest.fixture
def make_runner(place: Path) -> Iterator[Callable[..., Runner]]:
    made: list[Runner] = []

    def make(**settings: Any) -> Runner:
        made.append(Runner(place, **settings))
        made[-1].start()
        return made[-1]

    yield make
    for runner in made:
        runner.close()
