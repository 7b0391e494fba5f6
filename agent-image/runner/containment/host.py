"""Attempts at what the host has: its sockets, files and processes."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import stat
import struct
from functools import partial

from .gateway import GATEWAY
from .probe import LIBC, Held, Json, Probe, Untried, check, doing, listed, of_host, walk
from .router import HOST

_OURS = (HOST, GATEWAY, "/run/notify/notify.sock")
#: What an agent may write: its own directories, and mqueue and terminals of its own name spaces.
_WRITABLE = ("/workspace", "/session", "/tmp", "/proc", "/sys", "/dev/mqueue", "/dev/pts")

# --- sockets ---------------------------------------------------------------------------------------------


def connect(key: str, parameters: Json) -> str:
    """Connect to a socket of the host, where the host has it."""
    path = of_host("sockets", key, parameters)
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_UNIX, kind) as sock:
            try:
                sock.connect(path)
            except OSError as exc:
                if exc.errno == errno.EPROTOTYPE:  # the other kind
                    continue
                raise
        return f"connected to {path}"
    raise Untried(f"{path} is neither a stream nor a datagram socket")


def connect_to_any(_: Json) -> str:
    found = []
    for path in walk("/"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
            if stat.S_ISSOCK(os.lstat(path).st_mode) and path not in _OURS:
                sock.connect(path)
                found.append(path)
    return listed(found, "no other can be connected to")


# --- files -----------------------------------------------------------------------------------------------


def read(key: str, parameters: Json) -> str:
    path = of_host("files", key, parameters)
    if os.path.isdir(path):
        return f"{path} has {len(os.listdir(path))} entries"
    with open(path, "rb") as file:
        return f"read {len(file.read(64))} bytes of {path}"


def write(path: str, parameters: Json) -> str:
    """`path` in the container, or a name among the host's files."""
    if not path.startswith("/"):
        path = of_host("files", path, parameters)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    return f"may write to {path}"


def write_elsewhere(_: Json) -> str:
    """Anywhere but in the agent's own directories: an image has some that are open to everybody."""
    found = []
    for directory, directories, _names in os.walk("/"):
        if directory in _WRITABLE:
            directories[:] = []
        elif os.access(directory, os.W_OK):
            found.append(directory)
    return listed(found, "each directory is read-only or another's")


def climb(parameters: Json) -> str:
    """Up by '..' from each mount, by descriptor: from one that was bound it must not lead on to the host."""
    target = parameters["files"]["other workspace"].lstrip("/")
    for start in ("/workspace", "/session", "/run/nanoclaw", "/proc/self/cwd", "/proc/1/root"):
        descriptor = os.open(start, os.O_PATH | os.O_DIRECTORY)
        for name in (target, f"{os.path.basename(os.path.dirname(target))}/workspace"):
            for depth in range(1, 12):
                with contextlib.suppress(OSError):
                    os.close(os.open("../" * depth + name, os.O_RDONLY, dir_fd=descriptor))
                    return f"{start}/{'../' * depth}{name} leads there"
        os.close(descriptor)
    raise Held("every '..' ends at the container's own root")


def through_proc(parameters: Json) -> str:
    sees("pid", parameters)
    with os.scandir(f"/proc/{parameters['pid']}/root") as found:
        return f"saw {len(list(found))} entries of the host's root"


def inherited(_: Json) -> str:
    """A descriptor that was left open in the first process and leads to a directory of the host."""
    found = []
    for name in os.listdir("/proc/1/fd"):
        with contextlib.suppress(OSError):
            path = f"/proc/1/fd/{name}"
            if os.path.isdir(path) and not os.path.samefile(path, "/workspace"):
                found.append(f"{name} is {os.readlink(path)}")
    return listed(found, "none leads out")


def leave_links(parameters: Json) -> str:
    """Links that the host would follow if it opened what we name; selftest looks later whether it has."""
    target = parameters["files"]["bait"]
    for directory in ("/workspace", "/session"):
        for name, source in (("link", target), ("host.sock", target), ("loop", ".")):
            with contextlib.suppress(FileExistsError):
                os.symlink(source, f"{directory}/{name}")
    os.link(HOST, "/workspace/hard", follow_symlinks=False)
    return "made a hard link to what is ours to connect to only"


# --- processes -------------------------------------------------------------------------------------------


def sees(key: str, parameters: Json) -> str:
    """Any two processes may have the same number; whose it is, is in its command line."""
    with open(f"/proc/{parameters[key]}/cmdline", "rb") as file:
        line = file.read(300)
    if parameters["words"][key].encode() not in line:
        raise Held("the process with that number is another, of our own")
    return f"{parameters[key]} is {line[:60]!r}"


def trace(parameters: Json) -> str:
    sees("pid", parameters)
    check(LIBC.ptrace(0x4206, parameters["pid"], None, None))  # PTRACE_SEIZE
    return f"traces {parameters['pid']}"


def read_memory(parameters: Json) -> str:
    sees("pid", parameters)
    local = ctypes.create_string_buffer(16)
    pieces = struct.pack("=QQ", ctypes.addressof(local), 16)
    try:
        check(LIBC.process_vm_readv(parameters["pid"], pieces, 1, struct.pack("=QQ", 4096, 16), 1, 0))
    except OSError as exc:
        if exc.errno != errno.EFAULT:
            raise
    return "it may read"


def share_memory(parameters: Json) -> str:
    check(LIBC.shmget(parameters["shm"], 0, 0))
    return "found the host's segment"


# fmt: off
PROBES = (
    Probe("podman", "reach podman.sock", "mount", partial(connect, "podman")),
    Probe("session-bus", "reach the session's D-Bus", "mount", partial(connect, "session bus")),
    Probe("system-bus", "reach the system's D-Bus", "mount", partial(connect, "system bus")),
    Probe("systemd", "reach systemd --user itself", "mount", partial(connect, "systemd")),
    Probe("journal", "write to the journal's socket", "mount", partial(connect, "journal")),
    Probe("control", "reach the person's socket of the router", "mount", partial(connect, "control")),
    Probe("channel", "reach the adapters' socket of the router", "mount", partial(connect, "channel")),
    Probe("attach", "reach the router's socket of the gateway", "mount", partial(connect, "attach")),
    Probe("other-host", "be another session at the router", "mount", partial(connect, "other host.sock")),
    Probe("other-gateway", "the same at the gateway", "mount", partial(connect, "other gateway.sock")),
    Probe("any-socket", "connect to whatever socket there is", "mount", connect_to_any),
    Probe("unlink-socket", "put a socket in host.sock's place", "mount", doing(os.unlink, HOST)),
    Probe("home", "read the person's home", "mount", partial(read, "home")),
    Probe("other-files", "read another agent's workspace", "mount", partial(read, "other workspace")),
    Probe("database", "read the router's database, all queues", "mount", partial(read, "database")),
    Probe("credentials", "read the stored credentials", "mount", partial(read, "credentials")),
    Probe("private", "read a private file of the person", "uid", partial(read, "private")),
    Probe("instructions", "rewrite its own instructions", "mount", partial(write, "instructions")),
    Probe("configuration", "rewrite its own configuration", "mount", partial(write, "configuration")),
    Probe("unit", "rewrite its own unit", "mount", partial(write, "unit")),
    Probe("timer", "leave a timer for systemd", "mount", partial(write, "timer")),
    Probe("program", "rewrite its own runner", "uid", partial(write, "/opt/nanoclaw/nanoclaw-runner")),
    Probe("system", "write to /etc", "uid", partial(write, "/etc/passwd")),
    Probe("elsewhere", "write anywhere but in its directories", "mount", write_elsewhere),
    Probe("climb", "leave a mount by '..' and descriptors", "mount", climb),
    Probe("proc-root", "the host's root by /proc/PID/root", "namespace", through_proc),
    Probe("inherited", "the host's files by inherited descriptors", "podman", inherited),
    Probe("links", "hard links to what is not its own", "mount", leave_links),
    Probe("processes", "see the person's processes", "namespace", partial(sees, "pid")),
    Probe("other-processes", "see another agent's processes", "namespace", partial(sees, "other")),
    Probe("ptrace", "trace a process of the host", "namespace", trace),
    Probe("foreign-memory", "read the memory of one", "namespace", read_memory),
    Probe("shared-memory", "attach the host's shared memory", "namespace", share_memory, "shm"),
)
# fmt: on
