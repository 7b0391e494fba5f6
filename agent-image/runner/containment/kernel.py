"""Attempts at the kernel's doors, by system calls."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import struct
import time
from functools import partial
from typing import Any

from .probe import LIBC, Json, Probe, Untried, check, code

REFUSALS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EROFS)
CLONE_NEWUSER = 0x10000000  # man 2 unshare
AT_FDCWD = -100

# fmt: off
#: Numbers of system calls on x86_64 and aarch64.
NUMBERS = {
    "mount": (165, 40), "umount2": (166, 39), "chroot": (161, 51), "unshare": (272, 97), "clone": (56, 220),
    "clone3": (435, 435), "setns": (308, 268), "fsopen": (430, 430), "open_tree": (428, 428),
    "open_by_handle_at": (304, 265), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "keyctl": (250, 219), "add_key": (248, 217),
    "kexec_load": (246, 104), "init_module": (175, 105), "reboot": (169, 142), "swapon": (167, 224),
    "clock_settime": (227, 112), "sethostname": (170, 161), "syslog": (103, 116),
    "fanotify_init": (300, 262),
}
_CLONE3 = struct.pack("=8Q", CLONE_NEWUSER, 0, 0, 0, 17, 0, 0, 0)  # SIGCHLD
_ATTRIBUTES = struct.pack("=IIQQQQQ64x", 1, 112, 0, 0, 0, 0, 0b1100001)  # a software counter, user mode
#: Name, what it tries, system call, arguments. That the kernel looks at it at all counts as through.
_CALLS: tuple[tuple[str, str, str, tuple[Any, ...]], ...] = (
    ("mount", "mount a file system", "mount", (b"none", b"/tmp", b"tmpfs", 0, None)),
    ("remount", "make the root writable", "mount", (None, b"/", None, 0x1020, None)),
    ("unmount", "take a mount away", "umount2", (b"/run/nanoclaw", 2)),
    ("new-mount-api", "mount by fsopen(2)", "fsopen", (b"tmpfs", 0)),
    ("clone-mounts", "copy the tree of mounts", "open_tree", (AT_FDCWD, b"/", 1)),
    ("chroot", "change the root", "chroot", (b"/tmp",)),
    ("user-namespace", "get all capabilities in a new one", "unshare", (CLONE_NEWUSER,)),
    ("clone-namespace", "the same by clone(2)", "clone", (CLONE_NEWUSER | 17, 0, 0, 0, 0)),
    ("clone3-namespace", "the same by clone3(2)", "clone3", (_CLONE3, 64)),
    ("bpf", "load something into the kernel", "bpf", (0, struct.pack("=4I112x", 2, 4, 4, 1), 128)),
    ("perf", "count events of the kernel", "perf_event_open", (_ATTRIBUTES, 0, -1, -1, 0)),
    ("userfaultfd", "hold the kernel in a page fault", "userfaultfd", (1,)),
    ("io_uring", "act past the filter by io_uring", "io_uring_setup", (1, bytes(120))),
    ("keyring", "open the session's keyring", "keyctl", (0, -3, 1)),
    ("add-key", "leave a key in a keyring", "add_key", (b"user", b"x", b"x", 1, -2)),
    ("kexec", "load another kernel", "kexec_load", (0, 0, None, 0)),
    ("module", "load a module", "init_module", (b"", 0, b"")),
    ("reboot", "change what Ctrl-Alt-Del does", "reboot", (0xFEE1DEAD, 672274793, 0, None)),
    ("swap", "swap to a file of its own", "swapon", (b"/workspace/none", 0)),
    ("hostname", "change the host's name", "sethostname", (b"owned", 5)),
    ("kernel-log", "read the kernel's log", "syslog", (3, bytes(4096), 4096)),
    ("fanotify", "watch a whole file system", "fanotify_init", (0x200, 0)),
)
# fmt: on


def system_call(name: str, *arguments: Any) -> int:
    """Make one without the C library's help. Raises OSError, Untried."""
    column = {"x86_64": 0, "aarch64": 1}.get(os.uname().machine)
    if column is None:
        raise Untried(f"numbers of system calls are unknown on {os.uname().machine}")
    line = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return check(LIBC.syscall(ctypes.c_long(NUMBERS[name][column]), *line))


def exists(name: str, _: Json) -> str:
    """Whether this kernel has the call: it refuses these arguments, with ENOSYS if it has not."""
    system_call(name, *[-1] * 5)
    return ""


def call(name: str, arguments: tuple[Any, ...], _: Json) -> str:
    pid = os.getpid()
    try:
        result = system_call(name, *arguments)
    except OSError as exc:
        if exc.errno in REFUSALS:
            raise
        return f"the kernel looked at it: {code(exc)}"
    if os.getpid() != pid or (result == 0 and name.startswith("clone")):
        os._exit(0)  # its child
    return f"it returned {result}"


def join_namespace(_: Json) -> str:
    with open("/proc/1/ns/net") as file:
        return call("setns", (file.fileno(), 0), _)


def open_by_handle(_: Json) -> str:
    """The file system's root by its inode, whatever is mounted: the way out of many a container."""
    directory = os.open("/workspace", os.O_RDONLY)
    return call("open_by_handle_at", (directory, struct.pack("=IiQ", 8, 1, 2), os.O_RDONLY), _)


def set_clock(_: Json) -> str:
    now = time.time_ns()
    return call("clock_settime", (0, struct.pack("=qq", now // 10**9, now % 10**9)), _)


def old_call(_: Json) -> str:
    """getpid() as a 32-bit program makes it: the filter's numbers mean other calls there."""
    machine = bytes.fromhex("53 b8 14 00 00 00 cd 80 5b c3")  # push rbx; mov eax, 20; int 0x80; pop rbx; ret
    if os.uname().machine != "x86_64":
        raise Untried("only on x86_64")
    memory = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(machine)
    result: int = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))()
    if result < 0:
        raise OSError(-result, "int 0x80")
    return f"it returned {result}"


def linger(_: Json) -> str:
    """Whoever closes such a socket waits for as long as the agent says."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 9))
    return "may linger"


PROBES = (
    Probe("namespace", "join another namespace", "seccomp", join_namespace, "setns"),
    Probe("clock", "set the clock", "seccomp", set_clock, "clock_settime"),
    Probe("handle", "open the disk's root by its inode", "seccomp", open_by_handle, "open_by_handle_at"),
    *(Probe(name, tries, "seccomp", partial(call, real, line), real) for name, tries, real, line in _CALLS),
    Probe("old-calls", "system calls of 32-bit programs", "seccomp", old_call, "32-bit"),
    Probe("linger", "make whoever closes its socket wait", "seccomp", linger),
)
