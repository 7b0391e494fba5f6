"""The child that talks to Podman: what it asks, what its caller gets, when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from nanoclawd.errors import ConfigError, Failed, NotFound, Unavailable
from nanoclawd.images import build_image, image_exists, require_image

ID = "c0ffee" * 10


class Podman(socketserver.ThreadingUnixStreamServer):
    """Speaks as much of libpod's REST interface as is asked of it, and remembers what it was asked."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), Handler)
        self.requests: list[str] = []
        self.bodies: dict[str, int] = {}
        self.build: list[dict[str, Any]] = []
        self.hang = False
        self.reached = threading.Event()
        self.broken_off = threading.Event()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Podman

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def reply(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        if "missing" in self.path:
            self.reply(404, b'{"cause": "no such image", "message": "no such image"}')
        elif self.path.endswith("/exists"):
            self.reply(204)
        else:
            self.reply(200, json.dumps({"Id": ID, "Labels": None}).encode())

    def do_POST(self) -> None:
        self.server.requests.append(self.path)
        size = 0
        while length := int(self.rfile.readline(), 16):
            size += len(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        self.server.bodies[self.path.split("?")[0].rsplit("/", 1)[-1]] = size
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in self.server.build:
            line = json.dumps(event).encode() + b"\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        if self.server.hang:
            self.wfile.flush()
            self.server.reached.set()
            with contextlib.suppress(ConnectionResetError):
                assert self.rfile.read(1) == b""
            self.server.broken_off.set()
            return
        self.wfile.write(b"0\r\n\r\n")


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "podman").mkdir()
    return tmp_path


@pytest.fixture
def podman(runtime: Path) -> Iterator[Podman]:
    with Podman(runtime / "podman/podman.sock") as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_an_image_is_there_or_not(podman: Podman) -> None:
    assert asyncio.run(image_exists("localhost/here:1"))
    assert not asyncio.run(image_exists("localhost/missing:1"))
    assert podman.requests[0].endswith("/libpod/images/localhost/here:1/exists")


def test_a_missing_image_comes_with_what_to_do(podman: Podman) -> None:
    with pytest.raises(NotFound, match="nanoclawctl image build --image localhost/missing:1"):
        asyncio.run(require_image("localhost/missing:1"))


@pytest.mark.parametrize("dead", [False, True])
def test_podman_away_is_unavailable_with_a_hint(runtime: Path, dead: bool) -> None:
    if dead:  # a socket that nobody listens on any more
        Podman(runtime / "podman/podman.sock").server_close()

    with pytest.raises(Unavailable, match=r"systemctl --user start podman\.socket"):
        asyncio.run(image_exists("localhost/here:1"))


def build(podman: Podman, events: list[dict[str, Any]], **options: Any) -> tuple[str, list[str]]:
    podman.build = events
    lines: list[str] = []

    async def note(line: str) -> None:
        lines.append(line)

    return asyncio.run(build_image("localhost/new:1", progress=note, **options)), lines


def test_a_build_tells_its_lines_and_its_id(podman: Podman) -> None:
    events = [{"stream": "STEP 1/2: FROM x\nSTEP 2/2: RUN y\n"}, {"stream": f"{ID}\n"}]

    assert build(podman, events, base="localhost/b:1") == (ID, ["STEP 1/2: FROM x", "STEP 2/2: RUN y", ID])

    assert "buildargs=%7B%22BASE%22%3A+%22localhost%2Fb%3A1%22%7D" in podman.requests[0]
    assert podman.bodies["build"] > 10_000


@pytest.mark.parametrize(
    "events",
    [
        [{"stream": "STEP 1/2: FROM x\n"}, {"error": "exit status 7\n"}],
        [{"stream": "STEP 1/2: FROM x\nexit status 7"}],
    ],
)
def test_a_failed_build_shows_its_last_lines(podman: Podman, events: list[dict[str, Any]]) -> None:
    with pytest.raises(Failed, match=r"STEP 1/2: FROM x\nexit status 7"):
        build(podman, events)


def test_a_base_directory_is_imported_and_replaces_the_network(podman: Podman, tmp_path: Path) -> None:
    (tmp_path / "base.tar").write_bytes(b"x" * 3_000_000)
    with pytest.raises(ConfigError, match="wheelhouse"):
        build(podman, [{"stream": f"{ID}\n"}], base_directory=tmp_path)
    (tmp_path / "wheelhouse").mkdir()
    (tmp_path / "wheelhouse/a.whl").write_bytes(b"x" * 2_000_000)

    build(podman, [{"stream": f"{ID}\n"}], base_directory=tmp_path)

    assert podman.bodies["import"] == 3_000_000
    assert podman.bodies["build"] > 2_000_000
    assert "networkmode=none" in podman.requests[-2]


def test_a_cancel_ends_the_build(podman: Podman) -> None:
    podman.hang = True

    async def cancelled() -> None:
        task = asyncio.ensure_future(build_image())
        await asyncio.to_thread(wait, podman.reached.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())

    wait(podman.broken_off.wait)


def wait(event: Callable[[float], bool]) -> None:
    assert event(10)
