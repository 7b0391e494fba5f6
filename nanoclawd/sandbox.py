"""Does a unit's sandbox hold? Tried at start, line by line.

systemd leaves out in silence what it cannot do, e.g. on Ubuntu, whose AppArmor rules keep user units from
making namespaces.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import resource
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nanoclawd import journal, paths
from nanoclawd.errors import ConfigError

Try = Callable[[], tuple[bool, str]]  #: whether a line bites, and what was tried and came back


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line of the sandbox, tried."""

    name: str
    active: bool
    detail: str  #: what was tried and what came back


def run_checks(table: Mapping[str, Try]) -> list[Check]:
    """Try all of ROUTER or GATEWAY, and warn in the journal of what does not hold. Leaves nothing behind."""
    checks = []
    for name, check in table.items():
        try:
            active, detail = check()
        except (ConfigError, OSError) as exc:  # not even tried: that is no yes
            active, detail = False, str(exc)
        checks.append(Check(name=name, active=active, detail=detail))
        if not active:
            journal.warning("sandbox-inactive", detail, check=name)
    return checks


def require(checks: Iterable[Check]) -> None:
    """Raise ConfigError unless all of the sandbox is active."""
    if missing := ", ".join(check.name for check in checks if not check.active):
        hint = "see SECURITY in nanoclawd(8); or go on without: remove require_sandbox= from nanoclaw.toml"
        raise ConfigError(f"parts of the sandbox are not active: {missing}", hint=hint)


def _user_namespace() -> tuple[bool, str]:
    line = " ".join(Path("/proc/self/uid_map").read_text().split())
    # Outside of any, all 2^32 - 1 ids map to themselves.
    return line != "0 0 4294967295", f"/proc/self/uid_map: {line}"


def _status_field(name: str, wanted: str) -> Try:
    def check() -> tuple[bool, str]:
        found = re.search(rf"^{name}:\s*(\S+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
        value = found[1] if found else "missing"
        return (value.lstrip("0") or "0") == wanted, f"/proc/self/status: {name} {value}"

    return check


def _is_hidden(what: Callable[[], Path]) -> Try:
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


def _shows_one(what: Callable[[], Path]) -> Try:
    """At most one file of a directory is bound into the unit."""

    def check() -> tuple[bool, str]:
        path = what()
        try:
            shown = len(os.listdir(path))
        except FileNotFoundError:
            shown = 0
        return shown <= 1, f"{path}: shows {shown}"

    return check


def _home_hidden() -> tuple[bool, str]:
    # ProtectHome=tmpfs: an empty read-only file system, on which only what the unit binds is seen.
    shown = [name for name in (".bashrc", ".profile", ".ssh", ".gnupg") if (Path.home() / name).exists()]
    if shown:
        return False, f"{Path.home()} shows {', '.join(shown)}"
    return _is_read_only(Path.home)()


def _is_read_only(what: Callable[[], Path]) -> Try:
    refusals = (errno.EROFS, errno.EACCES, errno.ENOENT, errno.EPERM)

    def check() -> tuple[bool, str]:
        probe = what() / f".nanoclaw-probe-{os.getpid()}"
        try:
            descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            return exc.errno in refusals, f"create {probe}: {exc.strerror}"
        os.close(descriptor)
        os.unlink(probe)
        return False, f"create {probe}: it was made"

    return check


def _is_family_refused(family: socket.AddressFamily, kind: socket.SocketKind = socket.SOCK_RAW) -> Try:
    def check() -> tuple[bool, str]:
        try:
            socket.socket(family, kind).close()
        except OSError as exc:
            # Without the sandbox AF_PACKET fails too, but for want of a capability: EPERM.
            return exc.errno == errno.EAFNOSUPPORT, f"socket({family.name}): {exc.strerror}"
        return False, f"socket({family.name}): it was made"

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


def _not_dumpable() -> tuple[bool, str]:
    # Of a process that is not, all that /proc shows is root's. See PR_SET_DUMPABLE in prctl(2).
    owner = Path("/proc/self/mem").stat().st_uid
    return owner != os.getuid(), f"/proc/self/mem: owner {owner}"


def _only_loopback() -> tuple[bool, str]:
    # Not socket.if_nameindex(): it needs the socket that the unit must not have.
    lines = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    names = [line.partition(":")[0].strip() for line in lines]
    return names == ["lo"], f"interfaces: {', '.join(names)}"


_COMMON: dict[str, Try] = {
    "user-namespace": _user_namespace,
    "no-new-privileges": _status_field("NoNewPrivs", "1"),
    "no-capabilities": _status_field("CapBnd", "0"),
    "system-calls": _status_field("Seccomp", "2"),
    "no-netlink": _is_family_refused(socket.AF_NETLINK),
    "no-packet": _is_family_refused(socket.AF_PACKET),
    "no-writable-code": _no_writable_code,
    "no-core-dump": _no_core_dump,
}
ROUTER: dict[str, Try] = _COMMON | {
    "home-read-only": _is_read_only(Path.home),
    "credentials-hidden": _is_hidden(paths.credentials),
    "plain-credentials-hidden": _is_hidden(lambda: paths.config() / "credentials"),
    "no-internet": _is_family_refused(socket.AF_INET, socket.SOCK_STREAM),
    "private-network": _only_loopback,
}
GATEWAY: dict[str, Try] = _COMMON | {
    "not-dumpable": _not_dumpable,
    "home-hidden": _home_hidden,
    "state-hidden": _is_hidden(paths.state),
    "agents-hidden": _is_hidden(paths.agents),
    "podman-hidden": _is_hidden(paths.podman_socket),
    "bus-hidden": _is_hidden(lambda: paths.runtime_home() / "bus"),
    "configuration-read-only": _is_read_only(paths.config),
    "credentials-read-only": _is_read_only(paths.credentials),
    "runtime-read-only": _is_read_only(paths.runtime_home),
}
#: Of an adapter, as its unit begins: the adapter itself may be written in whatever language.
ADAPTER: dict[str, Try] = _COMMON | {
    "not-dumpable": _not_dumpable,
    "home-hidden": _home_hidden,
    "database-hidden": _is_hidden(lambda: paths.state() / "nanoclaw.db"),
    "agents-hidden": _is_hidden(paths.agents),
    "settings-hidden": _is_hidden(lambda: paths.config() / "nanoclaw.toml"),
    "other-channels-hidden": _shows_one(paths.channels),
    "other-credentials-hidden": _shows_one(paths.credentials),
    "control-hidden": _is_hidden(lambda: paths.control_socket().parent),
    "terminal-hidden": _is_hidden(lambda: paths.terminal_socket().parent),
    "podman-hidden": _is_hidden(paths.podman_socket),
    "bus-hidden": _is_hidden(lambda: paths.runtime_home() / "bus"),
    "configuration-read-only": _is_read_only(paths.channels),
    "runtime-read-only": _is_read_only(paths.runtime_home),
}
