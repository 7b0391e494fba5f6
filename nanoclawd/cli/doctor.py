"""What NanoClaw needs on this machine, whether it is there, and what to do if not.

Runs as the person, outside every sandbox, and without the router. install.sh runs it as `python3 -m
nanoclawd.cli.doctor --floor` before anything is installed. So it is written for Python 3.7, in order that a
Python that is too old can say so, and imports on top nothing but Python's own library.
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
    from argparse import Namespace
    from collections.abc import Iterator

    from nanoclawd.wire import Json

PYTHON = (3, 11)
SYSTEMD = (254,)
PODMAN = (5, 3)
SUBORDINATE_IDS = 65536
CONTROLLERS = ("cpu", "memory", "pids")
SOCKETS = ("nanoclaw.socket", "nanoclaw-channel.socket", "nanoclaw-gateway.socket", "podman.socket")
DISK_LOW_BYTES = 2 << 30
DISK_FULL_BYTES = 200 << 20
PROGRAM_S = 20.0
STATUS_S = 20.0

OK, WARNING, MISSING = "ok", "warning", "missing"


class Check(NamedTuple):
    """What one check found."""

    name: str
    state: str  #: OK, WARNING (works, but …) or MISSING
    found: str  #: one line
    todo: str = ""  #: what to do about it


def doctor(options: Namespace) -> int:
    """Check everything, print it, and return 1 if something that is needed is missing."""
    from nanoclawd.cli import output

    colours = {OK: output.GREEN, WARNING: output.YELLOW, MISSING: output.RED}
    checks = []
    for check in check_floor() if options.floor else check_all():
        checks.append(check)
        if not options.json:
            print(output.colour(colours[check.state], f"{check.state:<8}"), end="")
            output.say(f"{check.name}: {check.found}" + (f"\n        → {check.todo}" if check.todo else ""))
    missing, warnings = (sum(check.state == state for check in checks) for state in (MISSING, WARNING))
    document = {"ok": not missing, "checks": [check._asdict() for check in checks]}
    words = f"{missing} missing, {warnings} warnings." if missing or warnings else "All is well."
    output.done(options, document, f"\n{words}")
    return 1 if missing else 0


def main() -> int:
    """Print what of the floor is missing, or in the way; return 1 if something is missing."""
    checks = [check for check in check_floor() if check.state != OK]
    for check in checks:
        print(f"{check.state}: {check.name}: {check.found}\n  -> {check.todo}", file=sys.stderr)
    return 1 if any(check.state == MISSING for check in checks) else 0


def check_floor() -> Iterator[Check]:
    """Yield what there is of that which must be there before NanoClaw can be installed."""
    todo = "" if os.getuid() else "log in as the person whose agents they are to be"
    yield Check("user", MISSING if todo else OK, f"{user_name()} ({os.getuid()})", todo)
    todo = "" if sys.version_info >= PYTHON else f"install Python {_dotted(PYTHON)} or newer"
    yield Check("python", MISSING if todo else OK, f"Python {_dotted(sys.version_info[:3])}", todo)
    yield check_version("systemd", SYSTEMD, r"systemd (\d+)", "systemctl")
    yield check_user_manager()
    yield check_version("podman", PODMAN, r"podman version (\d+)\.(\d+)", "podman")
    yield from map(check_subordinate_ids, ("uid", "gid"))
    yield check_cgroups()


def check_all() -> Iterator[Check]:
    """Yield the result of each check: from the machine to the agents."""
    yield from check_floor()
    for check in (check_linger, check_journal, check_disk):
        yield check()
    yield from map(check_socket, SOCKETS)
    yield from check_router()


# --- the floor ------------------------------------------------------------------------------------


def check_version(name: str, floor: tuple[int, ...], pattern: str, program: str) -> Check:
    needed = f"{name} {_dotted(floor)} or newer"
    code, out = ask(program, "--version")
    found = re.search(pattern, out)
    if code != 0 or found is None:
        return Check(name, MISSING, first_line(out) or f"{name} fails", f"install {needed}")
    if tuple(map(int, found.groups())) < floor:
        return Check(name, MISSING, first_line(out), f"{needed} is needed: upgrade the distribution")
    return Check(name, OK, first_line(out))


def check_user_manager() -> Check:
    if not os.environ.get("XDG_RUNTIME_DIR", "").startswith("/"):
        todo = "log in through PAM (ssh, a console, machinectl shell), not by su or sudo"
        return Check("user manager", MISSING, "XDG_RUNTIME_DIR is not set", todo)
    code, out = ask("systemctl", "--user", "show", "--property=Version", "--value")
    if code != 0:
        todo = f"see 'systemctl status user@{os.getuid()}.service'; on Debian install dbus-user-session"
        return Check("user manager", MISSING, first_line(out) or "systemctl --user fails", todo)
    return Check("user manager", OK, f"systemd {first_line(out)} runs for this user")


def check_subordinate_ids(kind: str) -> Check:
    """Check the ranges of subordinate ids ("uid" or "gid") that containers are mapped to."""
    name = f"sub{kind}"
    count = count_subordinate_ids(kind)
    if shutil.which(f"new{kind}map") is None:
        todo = "install uidmap (Debian, Ubuntu) or shadow-utils (Fedora)"
        return Check(name, MISSING, f"there is no new{kind}map", todo)
    if count < SUBORDINATE_IDS:
        todo = f"as root: usermod --add-sub{kind}s 100000-165535 {user_name()}"
        return Check(name, MISSING, f"{count} ids, {SUBORDINATE_IDS} are needed", todo)
    return Check(name, OK, f"{count} ids")


def count_subordinate_ids(kind: str) -> int:
    # getsubids(1) comes with newuidmap(1), and knows directories such as LDAP, too.
    code, out = ask("getsubids", *(["-g"] if kind == "gid" else []), user_name())
    counts = [line.split()[-1] for line in out.splitlines() if code == 0]
    return sum(int(count) for count in counts if count.isdigit())


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
    absent = ", ".join(name for name in CONTROLLERS if name not in have)
    if absent:
        found = f"no {absent} controller for this user: limits of agents are not enforced"
        todo = "as root: systemctl edit user@.service, with [Service] Delegate=cpu cpuset io memory pids"
        return Check("cgroups", WARNING, found, todo)
    return Check("cgroups", OK, f"version 2 with {', '.join(CONTROLLERS)}")


def _own_cgroup(root: str) -> str:
    uid = os.getuid()
    return f"{root}/user.slice/user-{uid}.slice/user@{uid}.service"


# --- around the router ----------------------------------------------------------------------------


def check_linger() -> Check:
    if os.path.exists(f"/var/lib/systemd/linger/{user_name()}"):
        return Check("linger", OK, "services run while you are logged out")
    return Check("linger", WARNING, "everything stops when you log out", "loginctl enable-linger")


def check_journal() -> Check:
    if os.path.isdir("/var/log/journal"):
        return Check("journal", OK, "persistent")
    todo = "as root: mkdir /var/log/journal && systemctl restart systemd-journald"
    return Check("journal", WARNING, "not persistent: 'nanoclawctl logs' may show nothing", todo)


def check_disk() -> Check:
    from nanoclawd import paths

    place = next(path for path in (paths.state(), *paths.state().parents) if path.exists())
    free = shutil.disk_usage(place).free
    state = MISSING if free < DISK_FULL_BYTES else WARNING if free < DISK_LOW_BYTES else OK
    todo = "" if state == OK else "make room: 'podman image prune' and 'podman system df' may help"
    return Check("disk", state, f"{free / (1 << 30):.1f} GiB free at '{place}'", todo)


def check_socket(unit: str) -> Check:
    """Check that the socket unit listens, and that it will after the next boot."""
    todo = f"systemctl --user enable --now {unit}"
    _, active = ask("systemctl", "--user", "is-active", unit)
    if active != "active":
        return Check(unit, MISSING, f"is {first_line(active) or 'unknown'}", todo)
    _, enabled = ask("systemctl", "--user", "is-enabled", unit)
    if enabled not in ("enabled", "enabled-runtime", "static", "linked"):
        return Check(unit, WARNING, "is active, but not enabled: it will be away after the next boot", todo)
    return Check(unit, OK, "active and enabled")


def check_router() -> Iterator[Check]:
    """Ask the router about itself, the gateway and the agents."""
    from nanoclawd.cli import control
    from nanoclawd.errors import NanoclawError

    try:
        status = control.call("Status", timeout_s=STATUS_S)
        agents = control.list_all("ListAgents", timeout_s=STATUS_S)
    except NanoclawError as exc:
        yield Check("router", MISSING, exc.message, exc.hint or "see 'journalctl --user -u nanoclaw'")
        return
    yield Check("router", OK, f"version {status['version']} answers")
    yield check_sandbox("router", status["sandbox"])
    yield from check_channels(status["channels"])
    gateway = status["gateway"]
    if gateway is None:
        todo = "see 'journalctl --user -u nanoclaw-gateway'"
        yield Check("gateway", MISSING, status["gatewayProblem"], todo)
    else:
        yield Check("gateway", OK, f"version {gateway['version']} answers")
        yield check_sandbox("gateway", gateway["sandbox"])
        yield from check_credentials(gateway["routes"], agents)
    yield from check_agents(agents)


def check_sandbox(program: str, sandbox: list[Json]) -> Check:
    name = f"{program} sandbox"
    broken = [f"{check['name']} ({check['detail']})" for check in sandbox if not check["active"]]
    if broken:
        todo = "on Ubuntu user units need an AppArmor profile; see SECURITY in nanoclawd(8)"
        return Check(name, MISSING, f"not active: {', '.join(broken)}", todo)
    if not sandbox:
        return Check(name, WARNING, "not tested", "restart the unit: it tests itself when it starts")
    return Check(name, OK, f"{len(sandbox)} lines tested")


def check_channels(channels: list[Json]) -> Iterator[Check]:
    """Check that each adapter runs, is in its sandbox, and has its platform."""
    for channel in channels:
        name, todo = f"channel {channel['name']}", f"see 'nanoclawctl channel status {channel['name']}'"
        found = f"{channel['unit']} is {channel['activeState']}"
        if channel["problem"]:
            yield Check(name, MISSING, channel["problem"], "correct it, then 'nanoclawctl reload'")
        elif channel["activeState"] != "active":
            yield Check(name, MISSING, found, todo)
        elif channel["health"] == "login":
            todo = f"nanoclawctl channel login {channel['name']}"
            yield Check(name, MISSING, channel["healthText"] or "is not logged in", todo)
        elif channel["health"] != "connected":
            yield Check(name, WARNING, f"{channel['health'] or 'silent'}: {channel['healthText']}", todo)
        else:
            yield Check(name, OK, f"connected, {found}")
        if channel["sandbox"]:
            yield check_sandbox(name, channel["sandbox"])


def check_credentials(routes: list[Json], agents: list[Json]) -> Iterator[Check]:
    """Check the credential of each provider that an agent uses, and of each of [[routes]]."""
    from nanoclawd.credentials import UNENCRYPTED

    used = {agent["configuration"]["provider"] for agent in agents if agent["configuration"]}
    for route in routes:
        if not route["credential"] or (route["name"] == "anthropic" and "anthropic" not in used):
            continue
        name, found = f"credential {route['credential']}", f"for {route['name']}"
        if route["credentialState"] == "ok":
            yield Check(name, OK, found)
            continue
        found += f": {route['credentialState']}"
        if UNENCRYPTED in found:
            yield Check(name, WARNING, found, "upgrade the distribution, then set it again")
        else:
            yield Check(name, MISSING, found, f"nanoclawctl secret set {route['credential']}")


def check_agents(agents: list[Json]) -> Iterator[Check]:
    """Check that no agent is broken, and that the images are there."""
    for agent in agents:
        if agent["runtime"]["state"] == "broken":
            todo = f"correct it, then 'nanoclawctl reload'; see 'nanoclawctl agent show {agent['name']}'"
            yield Check(f"agent {agent['name']}", MISSING, agent["runtime"]["problem"], todo)
    for image in sorted({agent["configuration"]["image"] for agent in agents if agent["configuration"]}):
        code, out = ask("podman", "image", "exists", "--", image)
        if code == 0:
            yield Check(f"image {image}", OK, "is there")
        else:
            found = "is not there" if code == 1 else first_line(out)
            yield Check(f"image {image}", MISSING, found, "nanoclawctl image build")


def ask(*command: str, timeout_s: float = 0) -> tuple[int, str]:
    """Return exit code and output of a program; 127 if there is none, 124 if it takes too long."""
    timeout_s = timeout_s or PROGRAM_S
    null, pipe, same = subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT
    try:
        done = subprocess.run(command, stdin=null, stdout=pipe, stderr=same, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return 124, f"no answer within {timeout_s:.0f} s"
    except OSError as exc:
        return 127, f"{command[0]}: {exc.strerror}"
    return done.returncode, done.stdout.decode(errors="replace").strip()


def user_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def first_line(text: str) -> str:
    return text.split("\n")[0][:200]


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


if __name__ == "__main__":
    if sys.argv[1:] != ["--floor"]:
        sys.exit("usage: python3 -m nanoclawd.cli.doctor --floor; else use 'nanoclawctl doctor'")
    sys.exit(main())
