"""What must be there before NanoClaw can be installed.

Written for Python 3.7 and its library alone, so that a Python that is too old can say so. Imports nothing of
ours.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PYTHON = (3, 11)
SYSTEMD = (254,)
PODMAN = (5, 3)
SUBORDINATE_IDS = 65536
CONTROLLERS = ("cpu", "memory", "pids")
PROGRAM_S = 20.0

OK, WARNING, MISSING = "ok", "warning", "missing"


class Check(NamedTuple):
    """What one check found."""

    name: str
    state: str  #: OK, WARNING (works, but …) or MISSING
    found: str  #: one line
    todo: str = ""  #: what to do about it


def run(*command: str) -> tuple[int, str]:
    """Return exit code and output of a program; 127 if there is none, 124 if it takes too long."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PROGRAM_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 124, f"no answer within {PROGRAM_S:.0f} s"
    except OSError as exc:
        return 127, f"{command[0]}: {exc.strerror}"
    return done.returncode, done.stdout.decode(errors="replace").strip()


def check_all() -> Iterator[Check]:
    """Yield the result of each check of the floor."""
    checks: list[Callable[[], Check]] = [
        check_user,
        check_python,
        check_systemd,
        check_user_manager,
        check_podman,
        lambda: check_subordinate_ids("uid"),
        lambda: check_subordinate_ids("gid"),
        check_cgroups,
    ]
    for check in checks:
        yield check()


def check_user() -> Check:
    if os.getuid() == 0:
        return Check("user", MISSING, "this is root", "log in as the person whose agents they are to be")
    return Check("user", OK, f"{user_name()} ({os.getuid()})")


def check_python() -> Check:
    found = sys.version_info[:3]
    name = "Python " + ".".join(map(str, found))
    if found < PYTHON:
        return Check("python", MISSING, name, f"install Python {_dotted(PYTHON)} or newer")
    return Check("python", OK, name)


def check_systemd() -> Check:
    return _version("systemd", SYSTEMD, r"systemd (\d+)", "systemctl", "--version")


def check_podman() -> Check:
    return _version("podman", PODMAN, r"podman version (\d+)\.(\d+)", "podman", "--version")


def check_user_manager() -> Check:
    if not os.environ.get("XDG_RUNTIME_DIR", "").startswith("/"):
        todo = "log in through PAM (ssh, a console, machinectl shell), not by su or sudo"
        return Check("user manager", MISSING, "XDG_RUNTIME_DIR is not set", todo)
    code, out = run("systemctl", "--user", "show", "--property=Version", "--value")
    if code != 0:
        todo = f"see 'systemctl status user@{os.getuid()}.service'; on Debian install dbus-user-session"
        return Check("user manager", MISSING, first_line(out) or "systemctl --user fails", todo)
    return Check("user manager", OK, f"systemd {first_line(out)} runs for this user")


def check_subordinate_ids(kind: str) -> Check:
    """Check the ranges of subordinate ids ("uid" or "gid") that containers are mapped to."""
    name = f"sub{kind}"
    count = count_subordinate_ids(kind)
    todo = f"as root: usermod --add-sub{kind}s 100000-165535 {user_name()}"
    if shutil.which(f"new{kind}map") is None:
        package = "uidmap (Debian, Ubuntu) or shadow-utils (Fedora)"
        return Check(name, MISSING, f"there is no new{kind}map", f"install {package}")
    if count < SUBORDINATE_IDS:
        return Check(name, MISSING, f"{count} ids, {SUBORDINATE_IDS} are needed", todo)
    return Check(name, OK, f"{count} ids")


def count_subordinate_ids(kind: str) -> int:
    # getsubids(1) also knows directories such as LDAP, but not every distribution has it.
    code, out = run("getsubids", *(["-g"] if kind == "gid" else []), user_name())
    if code == 0:
        rows = [line.split()[-2:] for line in out.splitlines()]
    else:
        try:
            with open(f"/etc/sub{kind}", encoding="utf-8", errors="replace") as file:
                fields = [line.strip().split(":") for line in file]
        except OSError:
            fields = []
        rows = [row[1:] for row in fields if len(row) == 3 and row[0] in (user_name(), str(os.getuid()))]
    return sum(int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit())


def check_cgroups(root: str = "/sys/fs/cgroup") -> Check:
    """Check that cgroups are of version 2, and that this user's may be limited."""
    if not os.path.exists(f"{root}/cgroup.controllers"):
        todo = "boot without systemd.unified_cgroup_hierarchy=0 on the kernel's command line"
        return Check("cgroups", MISSING, "cgroup v2 is not mounted", todo)
    ours = _own_cgroup(root)
    try:
        with open(f"{ours}/cgroup.controllers", encoding="ascii") as file:
            have = file.read().split()
    except OSError as exc:
        return Check("cgroups", WARNING, f"{ours}/cgroup.controllers: {exc.strerror}", "check it by hand")
    absent = [name for name in CONTROLLERS if name not in have]
    if absent:
        found = f"no {', '.join(absent)} controller for this user: limits of agents are not enforced"
        todo = "as root: systemctl edit user@.service, with [Service] Delegate=cpu cpuset io memory pids"
        return Check("cgroups", WARNING, found, todo)
    return Check("cgroups", OK, f"version 2 with {', '.join(CONTROLLERS)}")


def _own_cgroup(root: str) -> str:
    uid = os.getuid()
    return f"{root}/user.slice/user-{uid}.slice/user@{uid}.service"


def _version(name: str, floor: tuple[int, ...], pattern: str, *command: str) -> Check:
    needed = f"{name} {_dotted(floor)} or newer"
    code, out = run(*command)
    found = re.search(pattern, out)
    if code != 0 or found is None:
        return Check(name, MISSING, first_line(out) or f"{name} fails", f"install {needed}")
    if tuple(map(int, found.groups())) < floor:
        return Check(name, MISSING, first_line(out), f"{needed} is needed: upgrade the distribution")
    return Check(name, OK, first_line(out))


def user_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def first_line(text: str) -> str:
    return text.split("\n")[0][:200]


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def main() -> int:
    """Print what is missing, or in the way; return 1 if something is missing."""
    worst: str | None = None
    for check in check_all():
        if check.state != OK:
            print(f"{check.state}: {check.name}: {check.found}\n  -> {check.todo}", file=sys.stderr)
            worst = check.state if worst != MISSING else worst
    return 1 if worst == MISSING else 0
