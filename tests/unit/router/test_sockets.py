"""Listening sockets: where they are, who may connect, and what is left of those that could not be made."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from pathlib import Path

import pytest

from nanoclawd import sockets, varlink
from nanoclawd.errors import Unavailable
from nanoclawd.sockets import bind_listener


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_listener_replaces_a_stale_one_below_a_long_path(tmp_path: Path) -> None:
    directory = tmp_path / ("x" * 150)
    directory.mkdir()
    for _ in range(2):
        listener = bind_listener(directory / "host.sock")
        mode = (directory / "host.sock").stat().st_mode
        assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o666
        assert not os.get_inheritable(listener.fileno()) and not listener.getblocking()
        listener.close()


@pytest.mark.parametrize("name", ["y" * 200, "missing/host.sock"])
def test_listener_that_cannot_be_made_leaves_nothing_open(tmp_path: Path, name: str) -> None:
    before = open_fds()

    with pytest.raises(Unavailable, match="cannot listen"):
        bind_listener(tmp_path / name)

    assert open_fds() == before


def test_nobody_can_send_a_descriptor_to_a_listener(tmp_path: Path) -> None:
    """Neither a connection nor one that nobody accepts hangs at its end, see bind_listener()."""
    if tuple(map(int, os.uname().release.split(".")[:2])) < (6, 16):
        pytest.skip("SO_PASSRIGHTS is of Linux 6.16")
    with bind_listener(tmp_path / "host.sock") as listener, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(tmp_path / "host.sock"))
        with pytest.raises(PermissionError):
            socket.send_fds(sock, [b"x"], [0])
        accepted, _ = listener.accept()
        with accepted, pytest.raises(PermissionError):
            socket.send_fds(sock, [b"x"], [0])


def test_cancelled_connect_leaves_nothing_open(tmp_path: Path) -> None:
    async def run() -> None:
        with socket.socket(socket.AF_UNIX) as full:
            full.bind(str(tmp_path / "socket"))
            full.listen(0)
            first = await varlink.connect(tmp_path / "socket")
            before = open_fds()
            waiting = asyncio.create_task(varlink.connect(tmp_path / "socket"))
            await asyncio.sleep(0)
            waiting.cancel()
            result = (await asyncio.gather(waiting, return_exceptions=True))[0]
            assert isinstance(result, (asyncio.CancelledError, Unavailable)), result
            assert open_fds() == before
            first.close()

    asyncio.run(run())


def test_listener_is_made_with_the_label_that_containers_may_connect_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel without SELinux has none of these files: these stand in for them."""
    enforce, attribute = tmp_path / "enforce", tmp_path / "sockcreate"
    enforce.write_text("1")
    monkeypatch.setattr(sockets, "_SELINUX", enforce)
    monkeypatch.setattr(sockets, "_ATTRIBUTE", attribute)
    labels = []

    class Noting(socket.socket):
        def __init__(self, *arguments: int) -> None:
            labels.append(attribute.read_text())
            super().__init__(*arguments)

    monkeypatch.setattr(socket, "socket", Noting)
    bind_listener(tmp_path / "host.sock").close()

    assert labels == ["unconfined_u:unconfined_r:spc_t:s0"]
    assert attribute.read_text() == ""  # no other socket gets it


def test_listener_is_made_where_the_label_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "enforce").write_text("0")
    monkeypatch.setattr(sockets, "_SELINUX", tmp_path / "enforce")
    monkeypatch.setattr(sockets, "_ATTRIBUTE", tmp_path / "missing/sockcreate")

    bind_listener(tmp_path / "host.sock").close()

    assert "selinux-label-refused" in capfd.readouterr().err
