"""Self-test of a unit's sandbox: on some systems systemd's options silently do nothing."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nanoclawd import journal


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line of the sandbox, tried."""

    name: str
    active: bool
    detail: str  #: what was tried and what came back


def check_common() -> list[Check]:
    """Try what every host unit of ours has."""
    return [
        _status("no-new-privileges", "NoNewPrivs", "1"),
        _status("seccomp", "Seccomp", "2"),
        _status("capabilities", "CapBnd", "0000000000000000"),
        _user_namespace(),
        refuses_write("home-read-only", Path.home()),
        refuses_write("system-read-only", Path("/var/tmp/..")),
        _refuses_socket("packet-sockets", socket.AF_PACKET, socket.SOCK_RAW),
        _refuses_socket("netlink", socket.AF_NETLINK, socket.SOCK_RAW),
        refuses("namespaces", "unshare(CLONE_NEWNET)", _unshare),
    ]


def check_router() -> list[Check]:
    """Try what the router's unit has beyond that: no network at all."""
    return [
        *check_common(),
        _refuses_socket("internet", socket.AF_INET, socket.SOCK_STREAM),
        _only_loopback(),
    ]


def report(checks: list[Check]) -> None:
    """Warn in the journal of each line that is not active."""
    for check in checks:
        if not check.active:
            journal.warning("sandbox-inactive", f"{check.detail}, going on without it", check=check.name)


def refuses(name: str, tried: str, action: Callable[[], None]) -> Check:
    """Return whether `action` fails with an OSError, as it must."""
    try:
        action()
    except OSError as exc:
        return Check(name=name, active=True, detail=f"{tried}: {exc.strerror}")
    return Check(name=name, active=False, detail=f"{tried}: worked")


def refuses_write(name: str, directory: Path) -> Check:
    """Return whether a file cannot be made in `directory`."""
    probe = directory / f".nanoclaw-sandbox-{os.getpid()}"

    def write() -> None:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        probe.unlink()

    return refuses(name, f"creating a file in '{directory}'", write)


def _refuses_socket(name: str, family: socket.AddressFamily, kind: socket.SocketKind) -> Check:
    return refuses(name, f"socket({family.name})", lambda: socket.socket(family, kind).close())


def _unshare() -> None:
    # CLONE_NEWNET alone would fail for want of privilege; with CLONE_NEWUSER it works where nothing forbids
    # it. In a child, since what is unshared cannot be taken back. os.unshare() came with Python 3.12.
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    pid = os.fork()
    if pid == 0:
        os._exit(min(255, ctypes.get_errno()) if libc.unshare(0x10000000 | 0x40000000) else 0)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        raise OSError(code, os.strerror(code))


def _status(name: str, key: str, wanted: str) -> Check:
    value = ""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            value = line.partition(":")[2].strip()
    return Check(
        name=name, active=value == wanted, detail=f"{key} in /proc/self/status is {value or 'missing'}"
    )


def _user_namespace() -> Check:
    mapping = " ".join(Path("/proc/self/uid_map").read_text().split())
    own = mapping != "0 0 4294967295"
    return Check(name="user-namespace", active=own, detail=f"/proc/self/uid_map is '{mapping}'")


def _only_loopback() -> Check:
    # Not socket.if_nameindex(): it needs the socket that the unit must not have.
    lines = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    names = [line.partition(":")[0].strip() for line in lines]
    return Check(name="private-network", active=names == ["lo"], detail=f"interfaces: {', '.join(names)}")
