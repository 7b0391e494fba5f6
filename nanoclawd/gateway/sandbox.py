"""Does the unit's sandbox hold? Tried at start, line by line.

systemd leaves out in silence what it cannot do. That happens e.g. on Ubuntu, whose AppArmor rules keep user
units from making namespaces (PLATFORM.md §2.4).
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import resource
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nanoclawd import paths
from nanoclawd.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line of the sandbox: does it bite?"""

    name: str
    active: bool
    detail: str  #: what was tried and what came back


def run_checks() -> list[Check]:
    """Return the outcome of all checks. Leaves nothing behind, also where nothing stops it."""
    checks = []
    for name, check in CHECKS.items():
        try:
            active, detail = check()
        except (ConfigError, OSError) as exc:  # not even tried: that is no yes
            active, detail = False, str(exc)
        checks.append(Check(name=name, active=active, detail=detail))
    return checks


def _user_namespace() -> tuple[bool, str]:
    line = " ".join(Path("/proc/self/uid_map").read_text().split())
    # Outside of any, all 2^32 - 1 ids map to themselves.
    return line != "0 0 4294967295", f"/proc/self/uid_map: {line}"


def _status_field(name: str, wanted: str) -> Callable[[], tuple[bool, str]]:
    def check() -> tuple[bool, str]:
        found = re.search(rf"^{name}:\s*(\S+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
        value = found[1] if found else "missing"
        return value == wanted, f"/proc/self/status: {name} {value}"

    return check


def _no_capabilities() -> tuple[bool, str]:
    found = re.search(r"^CapBnd:\s*(\S+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    value = found[1] if found else "missing"
    return value.strip("0") == "", f"/proc/self/status: CapBnd {value}"


def _is_hidden(what: Callable[[], Path]) -> Callable[[], tuple[bool, str]]:
    def check() -> tuple[bool, str]:
        path = what()
        try:
            # A directory that InaccessiblePaths= covers is still there, but cannot be listed.
            os.listdir(path)
        except NotADirectoryError:
            return False, f"{path}: it is there"
        except OSError as exc:
            return True, f"{path}: {exc.strerror}"
        return False, f"{path}: can be listed"

    return check


def _home() -> tuple[bool, str]:
    home = Path.home()
    try:
        found = os.statvfs(home)
    except OSError as exc:
        return True, f"statvfs {home}: {exc.strerror}"
    # ProtectHome=tmpfs: an empty read-only file system, on which only what the unit binds is seen.
    dotfiles = [name for name in (".bashrc", ".profile", ".ssh", ".gnupg") if (home / name).exists()]
    if dotfiles:
        return False, f"{home} shows {', '.join(dotfiles)}"
    return bool(
        found.f_flag & os.ST_RDONLY
    ), f"{home} is {'' if found.f_flag & os.ST_RDONLY else 'not '}read-only"


def _is_read_only(what: Callable[[], Path]) -> Callable[[], tuple[bool, str]]:
    def check() -> tuple[bool, str]:
        probe = what() / f".nanoclaw-probe-{os.getpid()}"
        try:
            descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            return exc.errno in (
                errno.EROFS,
                errno.EACCES,
                errno.ENOENT,
                errno.EPERM,
            ), f"create {probe}: {exc.strerror}"
        os.close(descriptor)
        os.unlink(probe)
        return False, f"create {probe}: it was made"

    return check


def _is_family_refused(family: int, name: str) -> Callable[[], tuple[bool, str]]:
    def check() -> tuple[bool, str]:
        try:
            socket.socket(family, socket.SOCK_RAW).close()
        except OSError as exc:
            # Without the sandbox AF_PACKET fails too, but for want of a capability: EPERM.
            return exc.errno == errno.EAFNOSUPPORT, f"socket({name}): {exc.strerror}"
        return False, f"socket({name}): it was made"

    return check


def _no_writable_code() -> tuple[bool, str]:
    try:
        mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()
    except OSError as exc:
        return True, f"mmap(W|X): {exc.strerror}"
    return False, "mmap(W|X): it was made"


def _no_core_dump() -> tuple[bool, str]:
    limit = resource.getrlimit(resource.RLIMIT_CORE)
    return limit == (0, 0), f"RLIMIT_CORE: {limit[0]}, {limit[1]}"


def _bus() -> Path:
    return paths.runtime_home() / "bus"


CHECKS: dict[str, Callable[[], tuple[bool, str]]] = {
    "user-namespace": _user_namespace,
    "no-new-privileges": _status_field("NoNewPrivs", "1"),
    "no-capabilities": _no_capabilities,
    "system-calls": _status_field("Seccomp", "2"),
    "home-hidden": _home,
    "state-hidden": _is_hidden(paths.state),
    "agents-hidden": _is_hidden(paths.agents),
    "podman-hidden": _is_hidden(paths.podman_socket),
    "bus-hidden": _is_hidden(_bus),
    "configuration-read-only": _is_read_only(paths.config),
    "credentials-read-only": _is_read_only(paths.credentials),
    "runtime-read-only": _is_read_only(paths.runtime_home),
    "no-netlink": _is_family_refused(socket.AF_NETLINK, "AF_NETLINK"),
    "no-packet": _is_family_refused(socket.AF_PACKET, "AF_PACKET"),
    "no-writable-code": _no_writable_code,
    "no-core-dump": _no_core_dump,
}
