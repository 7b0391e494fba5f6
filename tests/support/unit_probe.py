"""Runs as a unit of the user's manager: tries what each sandbox line of units/ forbids, prints what came.

    unit_probe.py HOME TMP_FILE NAMESPACES

HOME is the person's, TMP_FILE one that is in /tmp outside, NAMESPACES those outside by kind, as JSON.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import socket
import sys
from collections.abc import Callable

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWUSER = 0x10000000  # man 2 unshare
ADDR_NO_RANDOMIZE = 0x40000  # man 2 personality
PTRACE_TRACEME, PR_GET_NO_NEW_PRIVS = 0, 39


def libc(name: str, *arguments: int) -> None:
    if getattr(LIBC, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)


def create(directory: str) -> None:
    path = f"{directory}/unit-probe-{os.getpid()}"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    os.unlink(path)


def make_cgroup() -> None:
    with open("/proc/self/cgroup") as file:
        own = "/sys/fs/cgroup" + file.read().splitlines()[-1].split(":", 2)[2]
    os.mkdir(f"{own}/probe")
    os.rmdir(f"{own}/probe")


def set_setuid() -> None:
    with open(f"/dev/shm/unit-probe-{os.getpid()}", "w") as file:
        os.unlink(file.name)
        os.fchmod(file.fileno(), 0o4700)


def writable(path: str) -> None:
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        raise OSError(errno.EROFS, path)


def unmapped() -> None:
    with open("/proc/self/uid_map") as file:
        if file.read().split() != ["0", "0", "4294967295"]:
            raise OSError(errno.EPERM, "uid_map")


def can_gain_privileges() -> None:
    if LIBC.prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0):
        raise OSError(errno.EPERM, "prctl")


def shares(kind: str, others: dict[str, str]) -> None:
    if os.readlink(f"/proc/self/ns/{kind}") != others[kind]:
        raise OSError(errno.EXDEV, kind)


def old_call() -> None:
    memory = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(bytes.fromhex("53 b8 14 00 00 00 cd 80 5b c3"))  # getpid() by int 0x80
    ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))()


def attempts(home: str, tmp_file: str, others: dict[str, str]) -> dict[str, Callable[[], object]]:
    """Return by line what works without it, for an ordinary user."""
    executable = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    return {
        "LockPersonality=yes": lambda: libc("personality", ADDR_NO_RANDOMIZE),
        "MemoryDenyWriteExecute=yes": lambda: mmap.mmap(-1, mmap.PAGESIZE, prot=executable).close(),
        "NoNewPrivileges=yes": can_gain_privileges,
        "PrivateDevices=yes": lambda: os.stat("/dev/fuse"),
        "PrivateIPC=yes": lambda: shares("ipc", others),
        "PrivateMounts=yes": lambda: shares("mnt", others),
        "PrivateNetwork=yes": lambda: shares("net", others),
        "PrivateTmp=yes": lambda: os.stat(tmp_file),
        "PrivateUsers=yes": unmapped,
        "ProtectControlGroups=yes": make_cgroup,
        "ProtectHome=read-only": lambda: create(home),
        "ProtectHome=tmpfs": lambda: os.stat(f"{home}/.local"),
        "ProtectHostname=yes": lambda: shares("uts", others),
        "ProtectKernelTunables=yes": lambda: writable("/proc/sys"),
        "ProtectSystem=strict": lambda: create("/var/tmp"),
        "RestrictAddressFamilies=AF_UNIX": lambda: socket.socket().close(),
        "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6": lambda: socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW
        ).close(),
        "RestrictNamespaces=yes": lambda: libc("unshare", CLONE_NEWUSER),
        "RestrictSUIDSGID=yes": set_setuid,
        "SystemCallArchitectures=native": old_call,
        "SystemCallFilter=@system-service": lambda: libc("ptrace", PTRACE_TRACEME, 0, 0, 0),
        "SystemCallFilter=~@privileged @resources": lambda: os.setpriority(os.PRIO_PROCESS, 0, 19),
    }


def outcome(attempt: Callable[[], object]) -> str:
    """Return what came of it in a process of its own, which it may end: "worked", or why not."""
    pid = os.fork()
    if pid == 0:
        try:
            attempt()
        except OSError as exc:
            os._exit(exc.errno or 1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return "worked" if code == 0 else f"signal {-code}" if code < 0 else errno.errorcode.get(code, str(code))


if __name__ == "__main__":
    found = attempts(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
    print(json.dumps({line: outcome(attempt) for line, attempt in found.items()}))
