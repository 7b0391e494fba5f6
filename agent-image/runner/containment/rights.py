"""Attempts at rights that an agent has not, and at more of the machine than its share."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import stat
from functools import partial

from .host import write
from .probe import Held, Json, Probe, code, doing, file_text, listed, walk

TMP_MAX = 1 << 30
FILES_MAX = 8192  #: twice as many as an agent may have open
_DEVICES = "mem kmsg port kvm fuse net/tun vhost-net loop-control sda vda nvme0 dri/card0 uinput vsock"
_HIDDEN = "kcore keys timer_list cpuinfo interrupts softirqs diskstats cmdline"
_DISK, _SDA, _FIRST = 0o600 | stat.S_IFBLK, os.makedev(8, 0), os.sched_param(1)


def has_capabilities(_: Json) -> str:
    status = file_text("/proc/self/status")
    found = re.findall(r"^(Cap\w+:\s+0*[1-9a-f]\w*)$", status, re.MULTILINE)
    return listed(found, "all five sets are empty")


def gain_by_exec(_: Json) -> str:
    """Programs that hand out privileges, and whether running one would."""
    found = [path for path in walk("/") if _is_privileged(path)]
    if re.search(r"^NoNewPrivs:\s+0$", file_text("/proc/self/status"), re.MULTILINE):
        return f"may run {found[0] if found else 'one, though there is none'} with its privileges"
    raise Held(f"no new privileges, and {len(found)} such programs")


def _is_privileged(path: str) -> bool:
    with contextlib.suppress(OSError):
        mode = os.lstat(path).st_mode
        return stat.S_ISREG(mode) and bool(
            mode & (stat.S_ISUID | stat.S_ISGID) or "security.capability" in os.listxattr(path)
        )
    return False


def own_identity(parameters: Json) -> str:
    """A file that we make belongs to somebody; to the person, and we are the person."""
    with open("/proc/self/uid_map") as file:
        for inside, outside, count in (map(int, line.split()) for line in file):
            if inside <= os.getuid() < inside + count:
                mapped = outside + os.getuid() - inside
                # The outer id is one of the namespace that podman made; there 0 is the person.
                if mapped == 0 or os.getuid() in (0, parameters["uid"]):
                    return f"uid {os.getuid()} is the person's"
    raise Held(f"uid {os.getuid()}, one of the person's subordinate ones")


def give_away(_: Json) -> str:
    with open("/workspace/owned", "w") as file:
        os.fchown(file.fileno(), 0, 0)
    return "gave a file to root"


def open_device(_: Json) -> str:
    found = []
    for name in _DEVICES.split():
        with contextlib.suppress(OSError):
            os.close(os.open(f"/dev/{name}", os.O_RDONLY))
            found.append(name)
    return listed(found, "none of them is there")


def read_hidden(_: Json) -> str:
    found = []
    for name in _HIDDEN.split():
        with contextlib.suppress(OSError), open(f"/proc/{name}", "rb") as file:
            if file.read(64):
                found.append(name)
    found += ["/sys/firmware"] if os.path.isdir("/sys/firmware") and os.listdir("/sys/firmware") else []
    return listed(found, "all are empty")


def panic(_: Json) -> str:
    """The magic key, or where a kernel has none, what becomes of a panic."""
    first = "/proc/sysrq-trigger"
    return write(first if os.path.lexists(first) else "/proc/sys/kernel/panic", _)


def escape_cgroup(_: Json) -> str:
    """Leave the unit's limits, as any process may that can write to this file of another cgroup."""
    for top, _directories, _files in os.walk("/sys/fs/cgroup"):
        with contextlib.suppress(OSError), open(f"{top}/cgroup.procs", "w") as file:
            file.write("0")
            return f"may write to {top}/cgroup.procs"
    os.mkdir("/sys/fs/cgroup/out")
    return "made one of its own"


def spare_from_oom(_: Json) -> str:
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("-1")  # down to where it began any process may
    return "is killed after the person's own programs"


def run_from_session(_: Json) -> str:
    with open("/session/program", "w") as file:
        file.write("#!/bin/sh\n")
        os.fchmod(file.fileno(), 0o700)
    try:
        os.waitpid(os.posix_spawn("/session/program", ["/session/program"], {}), 0)
    except PermissionError as exc:
        raise Held(f"noexec: {code(exc)}") from exc
    return "it ran"


# --- floods ----------------------------------------------------------------------------------------------


def flood_processes(parameters: Json) -> str:
    """As many processes as there may be, and some more; all are ended again."""
    children: list[int] = []
    try:
        while len(children) < parameters["tasks"] + 64:
            pid = os.fork()
            if pid == 0:
                signal.pause()
            children.append(pid)
    except OSError as exc:
        raise Held(f"{code(exc)} at {len(children)}") from None
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return f"made {len(children)}, more than {parameters['tasks']}"


def flood_descriptors(_: Json) -> str:
    opened = [os.open("/", os.O_PATH)]
    try:
        while len(opened) < FILES_MAX:
            opened.append(os.dup(opened[0]))
    except OSError as exc:
        raise Held(f"{code(exc)} at {len(opened)}") from None
    return f"opened {len(opened)}"


def flood_disk(_: Json) -> str:
    size = 0
    with open("/tmp/flood", "wb", buffering=0) as file:
        os.unlink("/tmp/flood")
        try:
            while size < TMP_MAX:
                size += file.write(bytes(1 << 20))
        except OSError as exc:
            raise Held(f"{code(exc)} at {size >> 20} MiB") from None
    return f"wrote {size >> 20} MiB"


def dump_core(_: Json) -> str:
    """Crash. A pipe gets its dump whatever the limit is; systemd-coredump then keeps none of it."""
    pid = os.fork()
    if pid == 0:
        os.chdir("/tmp")
        os.abort()
    dumped = os.WCOREDUMP(os.waitpid(pid, 0)[1])
    limit = resource.getrlimit(resource.RLIMIT_CORE)[1]
    if dumped and limit:
        return "dumped core"
    raise Held(f"the limit is {limit}")


def raise_limits(_: Json) -> str:
    for name in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC):
        hard = resource.getrlimit(name)[1]
        if hard == resource.RLIM_INFINITY:
            return "one is unlimited"
        try:
            resource.setrlimit(name, (hard + 1, hard + 1))
        except ValueError as exc:  # EPERM
            raise Held(str(exc)) from exc
    return "raised both"


# fmt: off
PROBES = (
    Probe("capabilities", "have any capability", "capability", has_capabilities),
    Probe("setuid-program", "gain privileges by running a program", "kernel", gain_by_exec),
    Probe("root", "become root", "capability", doing(os.setresuid, 0, 0, 0)),
    Probe("identity", "be the person", "uid", own_identity),
    Probe("chown", "give a file to root", "capability", give_away),
    Probe("device-node", "make a device", "capability", doing(os.mknod, "/tmp/disk", _DISK, _SDA)),
    Probe("devices", "open devices", "mount", open_device),
    Probe("proc-hidden", "read what /proc and /sys tell of the host", "mount", read_hidden),
    Probe("sysctl", "choose who gets core dumps", "uid", partial(write, "/proc/sys/kernel/core_pattern")),
    Probe("sysrq", "take the machine down by /proc", "uid", panic),
    Probe("cgroup", "leave its cgroup", "mount", escape_cgroup),
    Probe("priority", "be served first", "capability", doing(os.setpriority, os.PRIO_PROCESS, 0, -5)),
    Probe("real-time", "keep a CPU", "capability", doing(os.sched_setscheduler, 0, os.SCHED_FIFO, _FIRST)),
    Probe("oom-score", "be spared when memory is short", "capability", spare_from_oom),
    Probe("run-session", "run a program from its session's directory", "mount", run_from_session),
    Probe("core", "dump core", "limit", dump_core),
    Probe("raise-limits", "raise its limits", "capability", raise_limits),
    Probe("fork-flood", "make processes without end", "limit", flood_processes),
    Probe("descriptor-flood", "open files without end", "limit", flood_descriptors),
    Probe("disk-flood", "fill /tmp without end", "mount", flood_disk),
)
# fmt: on
