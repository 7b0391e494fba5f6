"""What the program of a selftest may find on the host, should it get out."""

from __future__ import annotations

import ctypes
import mmap
import secrets
import select
import socket
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Event, Thread

from nanoclawd import paths
from nanoclawd.ids import AgentName, SessionName
from nanoclawd.wire import Json

AGENT, OTHER = AgentName("selftest"), AgentName("selftest_other")
SILENCE_S = 0.3  #: after which a request to a listener of ours is at its end
IPC_CREAT, IPC_RMID = 0o1000, 0  # man 2 shmget, shmctl


def directory() -> Path:
    """Return a directory of ours that links may lead to."""
    return paths.state() / "selftest"


def write(path: Path, text: str) -> None:
    """Write a file that is the person's alone."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.write_text(text)
    path.chmod(0o600)


def listen(stack: ExitStack, token: str) -> Json:
    """Answer with the token on loopback and on an abstract socket, and share memory, until `stack` ends.

    Returns where, and as "absent" what this host has none of.
    """
    name, key = token[:8], secrets.randbelow(1 << 30) + 1
    made = [
        socket.create_server(("127.0.0.1", 0)),
        socket.create_server(("127.0.0.1", 0)),
        socket.socket(type=socket.SOCK_DGRAM),
        socket.socket(socket.AF_UNIX),
    ]
    made[2].bind(("127.0.0.1", 0))
    made[3].bind(f"\0{name}")
    made[3].listen()
    tcp, allowed, udp = (sock.getsockname()[1] for sock in made[:3])
    found: Json = {"token": token, "abstract": name, "tcp": tcp, "allowed": allowed, "udp": udp}
    found |= {"absent": {}, "tcp6": 0, "shm": key}
    try:
        made.append(socket.create_server(("::1", 0), family=socket.AF_INET6))
        found["tcp6"] = made[4].getsockname()[1]
    except OSError:
        found["absent"]["ipv6"] = "this host has no IPv6"
    libc = ctypes.CDLL(None)
    segment = libc.shmget(key, mmap.PAGESIZE, IPC_CREAT | 0o666)
    if segment < 0:
        found["absent"]["shm"] = "this host has no shared memory"
    else:
        stack.callback(libc.shmctl, segment, IPC_RMID, None)
    ended = Event()
    thread = Thread(target=_answer, args=(made, token.encode(), ended))
    for listener in made:
        stack.callback(listener.close)
    stack.callback(thread.join)
    stack.callback(ended.set)
    thread.start()
    return found


def _answer(listeners: list[socket.socket], token: bytes, ended: Event) -> None:
    while not ended.is_set():
        for sock in select.select(listeners, [], [], 0.1)[0]:
            with suppress(OSError):
                if sock.type == socket.SOCK_DGRAM:
                    sock.sendto(token, sock.recvfrom(64)[1])
                else:
                    with sock.accept()[0] as peer:
                        _read_request(peer)
                        peer.sendall(
                            b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(token), token)
                        )


def _read_request(peer: socket.socket) -> None:
    """Read all of it: what is not read takes the answer with it, man 7 unix."""
    data = b""
    peer.settimeout(SILENCE_S)
    with suppress(TimeoutError):
        while not data.endswith((b"{}", b"\r\n0\r\n\r\n")) and (piece := peer.recv(1 << 16)):
            data += piece


def network() -> Json:
    """Return this host's own address and name server, "" if it has none."""
    address = nameserver = ""
    with suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.connect(("192.0.2.1", 53))  # sends nothing
        address = sock.getsockname()[0]
    with suppress(OSError):
        lines = [line.split() for line in Path("/etc/resolv.conf").read_text().splitlines()]
        nameserver = next((line[1] for line in lines if len(line) > 1 and line[0] == "nameserver"), "")
    return {"address": address, "nameserver": nameserver}


def sockets(other: SessionName) -> dict[str, str]:
    home, theirs = paths.runtime_home(), paths.session_runtime(OTHER, other)
    candidates = {
        "podman": paths.podman_socket(),
        "session bus": home / "bus",
        "system bus": Path("/run/dbus/system_bus_socket"),
        "systemd": home / "systemd/private",
        "journal": Path("/run/systemd/journal/socket"),
        "control": paths.control_socket(),
        "channel": paths.terminal_socket(),
        "attach": paths.gateway_socket(),
        "other host.sock": theirs / "host.sock",
        "other gateway.sock": theirs / "gateway.sock",
    }
    return {name: str(path) for name, path in candidates.items() if path.is_socket()}


def files() -> dict[str, str]:
    found = {
        "home": Path.home(),
        "other workspace": paths.workspace(OTHER),
        "database": paths.state() / "nanoclaw.db",
        "credentials": paths.credentials(),
        "instructions": paths.agents() / f"{AGENT}.md",
        "configuration": paths.agents() / f"{AGENT}.toml",
        "unit": paths.quadlets() / "nanoclaw-owned.volume",
        "timer": paths.config_home() / "systemd/user/nanoclaw-owned.timer",
        "bait": directory(),
    }
    # What could not be made on the host either tells nothing.
    there = {name: str(path) for name, path in found.items() if path.parent.is_dir()}
    return there | {"private": "/workspace/private"}
