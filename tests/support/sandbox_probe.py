"""Runs in an agent's container in place of the runner: tries what must not work, writes down what came."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

CLONE_NEWUSER = 0x10000000  # man 2 unshare
FAMILIES = (
    socket.AF_UNIX,
    socket.AF_INET,
    socket.AF_INET6,
    socket.AF_VSOCK,
    socket.AF_ALG,
    socket.AF_PACKET,
)


def attempt(action: Callable[[], Any]) -> str:
    """Return "ok", or the name of the error."""
    try:
        action()
    except OSError as exc:
        return errno.errorcode.get(exc.errno or 0, repr(exc))
    return "ok"


def write_in(directory: str) -> str:
    def write() -> None:
        with open(f"{directory}/made-by-agent", "w") as file:
            file.write("x")

    return attempt(write)


def connect(family: int, address: Any) -> str:
    with socket.socket(family) as sock:
        sock.settimeout(3)
        return attempt(lambda: sock.connect(address))


def libc(name: str, *arguments: Any) -> int:
    """Call a function of the C library. Raises OSError."""
    library = ctypes.CDLL(None, use_errno=True)
    if (result := getattr(library, name)(*arguments)) < 0:
        raise OSError(ctypes.get_errno(), name)
    return int(result)


def open_socket(family: int) -> None:
    socket.socket(family).close()


def unshare() -> None:
    libc("unshare", CLONE_NEWUSER)


def mount() -> None:
    libc("mount", b"none", b"/tmp", b"tmpfs", 0, None)


def clone() -> None:
    """Make a child in a user namespace of its own, without the C library's help."""
    number = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
    if libc("syscall", number, CLONE_NEWUSER | signal.SIGCHLD, 0, 0, 0, 0) == 0:
        os._exit(0)


def set_option(level: int, option: int, value: int | bytes) -> None:
    with socket.socket() as sock:
        sock.setsockopt(level, option, value)


def linger() -> None:
    set_option(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))


def linger_disguised() -> None:
    """The kernel ignores the upper half of such an argument."""
    high = 1 << 32
    with socket.socket() as sock:
        value = struct.pack("ii", 1, 60)
        number = {"x86_64": 54, "aarch64": 208}[os.uname().machine]
        arguments = (number, sock.fileno(), high + socket.SOL_SOCKET, high + socket.SO_LINGER, value, 8)
        libc("syscall", *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))


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


def threaded() -> bool:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    return True


def read(path: str) -> str:
    with open(path) as file:
        return file.read()


def facts() -> dict[str, Any]:
    status = dict(line.split(":\t", 1) for line in read("/proc/self/status").splitlines() if ":\t" in line)
    places = "/ /etc /usr /run /run/nanoclaw /dev /dev/shm /opt/nanoclaw /home /mnt/shown"
    places += " /tmp /workspace /session"
    return {
        "ids": [os.getuid(), os.getgid(), os.getgroups()],
        "status": {
            key: status[key]
            for key in ("CapEff", "CapBnd", "CapPrm", "CapInh", "CapAmb", "NoNewPrivs", "Seccomp")
        },
        "interfaces": sorted(os.listdir("/sys/class/net")),
        "write": {place: write_in(place) for place in places.split()},
        "connect": {
            "internet": connect(socket.AF_INET, ("192.0.2.1", 443)),
            "internet6": connect(socket.AF_INET6, ("2001:db8::1", 443)),
            "abstract": connect(socket.AF_UNIX, "\0nanoclaw-test"),
            "host.sock": connect(socket.AF_UNIX, "/run/nanoclaw/host.sock"),
        },
        "unlink host.sock": attempt(lambda: os.unlink("/run/nanoclaw/host.sock")),
        "read private": attempt(lambda: read("/workspace/private")),
        "read shown": attempt(lambda: read("/mnt/shown/file")),
        "read masked": len(read("/proc/cpuinfo")),
        "unshare": attempt(unshare),
        "mount": attempt(mount),
        "clone": attempt(clone),
        "options": [attempt(partial(set_option, *option, 0)) for option in OPTIONS],
        "linger": [attempt(linger), attempt(linger_disguised)],
        "families": {family.name: attempt(partial(open_socket, family)) for family in FAMILIES},
        "thread": threaded(),
        "child": subprocess.run(["/bin/true"], check=True).returncode,
        "limits": [resource.getrlimit(resource.RLIMIT_CORE), resource.getrlimit(resource.RLIMIT_NOFILE)],
        "environment": sorted(os.environ),
        "hostname": socket.gethostname(),
        "pid": os.getpid(),
        "processes": sum(name.isdigit() for name in os.listdir("/proc")),
        "mounts": {line.split()[4]: line.split()[5] for line in read("/proc/self/mountinfo").splitlines()},
    }


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    with open("/session/facts.json", "w") as file:
        json.dump(facts(), file)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
