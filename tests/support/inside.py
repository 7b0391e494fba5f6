"""What a process in an agent's container finds and what it can do: prints one JSON document.

Run in the container by tests/e2e/test_sandbox.py; needs the standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import socket
import stat
import struct
from collections.abc import Callable
from typing import Any

TIMEOUT_S = 2.0
SOCKETS = "/run/nanoclaw"
#: Of sockets, that programs set.
OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_REUSEADDR),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    (socket.SOL_SOCKET, socket.SO_REUSEPORT),
    (socket.SOL_SOCKET, socket.SO_PASSCRED),
    (socket.SOL_SOCKET, 46),  # SO_BUSY_POLL, needs no privilege to be 0
    (socket.SOL_SOCKET, 69),  # SO_PREFER_BUSY_POLL
    (socket.IPPROTO_TCP, socket.TCP_NODELAY),
    (socket.IPPROTO_IP, socket.IP_TOS),
)


def outcome(action: Callable[[], object]) -> str:
    """Return "worked", or the name of the errno with which it failed."""
    try:
        action()
    except TimeoutError:
        return "ETIMEDOUT"
    except OSError as exc:
        return errno.errorcode.get(exc.errno or 0, str(exc))
    return "worked"


def connect(family: int, kind: int, address: Any) -> None:
    with socket.socket(family, kind) as sock:
        sock.settimeout(TIMEOUT_S)
        sock.connect(address)
        if kind == socket.SOCK_DGRAM:
            sock.send(b"x")


def create(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    os.unlink(path)


def bind(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)


def status(pid: str) -> dict[str, str]:
    with open(f"/proc/{pid}/status", encoding="utf-8") as file:
        return {name: " ".join(value.split()) for name, _, value in (line.partition(":") for line in file)}


def environment(pid: str) -> dict[str, str]:
    with open(f"/proc/{pid}/environ", encoding="utf-8") as file:
        return dict(item.split("=", 1) for item in file.read().split("\0") if item)


def mounts() -> dict[str, list[str]]:
    """Return type and options of each mount, by where it is."""
    found = {}
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        for line in file:
            head, _, tail = line.partition(" - ")
            fields = head.split()
            found[fields[4]] = [tail.split()[0], *fields[5].split(",")]
    return found


def content(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(4096)
    except OSError as exc:
        return errno.errorcode[exc.errno or 0]


def files() -> dict[str, list[str]]:
    """Look at every file of the container, but /proc and /sys."""
    found: dict[str, list[str]] = {"sockets": [], "devices": [], "privileged": [], "writable": []}
    for top, directories, names in os.walk("/"):
        if top in ("/proc", "/sys"):
            directories[:] = []
            continue
        if os.access(top, os.W_OK):
            found["writable"].append(top)
        for name in directories + names:
            path = os.path.join(top, name)
            mode = os.lstat(path).st_mode
            if stat.S_ISSOCK(mode):
                found["sockets"].append(path)
            elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
                found["devices"].append(path)
            elif stat.S_ISREG(mode):
                if mode & (stat.S_ISUID | stat.S_ISGID) or "security.capability" in os.listxattr(path):
                    found["privileged"].append(path)
                if os.access(path, os.W_OK):
                    found["writable"].append(path)
    return {kind: sorted(paths) for kind, paths in found.items()}


def connects() -> dict[str, str]:
    stream, datagram = socket.SOCK_STREAM, socket.SOCK_DGRAM
    wanted: dict[str, tuple[int, int, Any]] = {
        "tcp": (socket.AF_INET, stream, ("192.0.2.1", 443)),
        "tcp of the host": (socket.AF_INET, stream, ("127.0.0.1", 8079)),  # the test listens there
        "tcp6": (socket.AF_INET6, stream, ("2001:db8::1", 443)),
        "udp": (socket.AF_INET, datagram, ("192.0.2.1", 53)),
        "udp6": (socket.AF_INET6, datagram, ("2001:db8::1", 53)),
        "link-local": (socket.AF_INET, stream, ("169.254.1.2", 80)),
        "abstract socket of the host": (socket.AF_UNIX, stream, "\0nanoclaw-test"),  # the test listens there
        "control": (socket.AF_UNIX, stream, "/run/user/1000/nanoclaw/control/io.nanoclaw.Control"),
        "D-Bus": (socket.AF_UNIX, stream, "/run/user/1000/bus"),
        "Podman": (socket.AF_UNIX, stream, "/run/user/1000/podman/podman.sock"),
        "journal": (socket.AF_UNIX, datagram, "/run/systemd/journal/socket"),
        "vsock": (socket.AF_VSOCK, stream, (2, 9)),
        "host.sock": (socket.AF_UNIX, stream, f"{SOCKETS}/host.sock"),
        "gateway.sock": (socket.AF_UNIX, stream, f"{SOCKETS}/gateway.sock"),
    }
    return {name: outcome(lambda line=line: connect(*line)) for name, line in wanted.items()}  # type: ignore[misc]


def tries() -> dict[str, str]:
    return {
        "list the sockets": outcome(lambda: os.listdir(SOCKETS)),
        "list above the sockets": outcome(lambda: os.listdir(f"{SOCKETS}/../nanoclaw")),
        "unlink host.sock": outcome(lambda: os.unlink(f"{SOCKETS}/host.sock")),
        "replace host.sock": outcome(lambda: os.rename("/tmp", f"{SOCKETS}/host.sock")),
        "chmod gateway.sock": outcome(lambda: os.chmod(f"{SOCKETS}/gateway.sock", 0o777)),
        "bind beside the sockets": outcome(lambda: bind(f"{SOCKETS}/more.sock")),
        "create in /": outcome(lambda: create("/x")),
        "create in /etc": outcome(lambda: create("/etc/x")),
        "create in /opt/nanoclaw": outcome(lambda: create("/opt/nanoclaw/x")),
        "create in /run": outcome(lambda: create("/run/x")),
        "create in /var/tmp": outcome(lambda: create("/var/tmp/x")),
        "create in /dev/shm": outcome(lambda: create("/dev/shm/x")),
    }


def linger(disguise: int) -> None:
    """Have whoever of us closes the socket wait. The kernel ignores the upper half of such an argument."""
    value = struct.pack("ii", 1, 60)
    number = {"x86_64": 54, "aarch64": 208}[os.uname().machine]  # setsockopt(2)
    with socket.socket() as sock:
        numbers = (number, sock.fileno(), disguise | socket.SOL_SOCKET, disguise | socket.SO_LINGER)
        if ctypes.CDLL(None, use_errno=True).syscall(*map(ctypes.c_long, numbers), value, len(value)) < 0:
            raise OSError(ctypes.get_errno(), "setsockopt")


def set_option(level: int, option: int) -> None:
    with socket.socket() as sock:
        sock.setsockopt(level, option, 0)


def main() -> None:
    report = {
        "interfaces": os.listdir("/sys/class/net"),
        "routes": content("/proc/net/route").splitlines()[1:] + content("/proc/net/ipv6_route").splitlines(),
        "hostname": socket.gethostname(),
        "pids": sorted(int(name) for name in os.listdir("/proc") if name.isdigit()),
        "first": status("1"),
        "self": status("self"),
        "environment": environment("1"),
        "limits": {
            name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}")) for name in ("NOFILE", "CORE")
        },
        "masked": {
            path: content(path)
            for path in ("/proc/cpuinfo", "/proc/keys", "/proc/timer_list", "/proc/kcore")
        },
        "firmware": os.listdir("/sys/firmware"),
        "mounts": mounts(),
        "connects": connects(),
        "linger": [outcome(lambda: linger(0)), outcome(lambda: linger(1 << 32))],
        "options": [outcome(lambda option=option: set_option(*option)) for option in OPTIONS],  # type: ignore[misc]
        "tries": tries(),
        **files(),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
