"""What NanoClaw needs on this machine, whether it is there, and what to do if not.

Runs as the person, outside every sandbox, and without the router. install.sh runs it as `python3 -m
nanoclawd.cli.doctor --floor`: nothing may be imported on top that an old Python lacks.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING

from nanoclawd.cli import floor
from nanoclawd.cli.floor import MISSING, OK, WARNING, Check

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator

    from nanoclawd.wire import Json

SOCKETS = ("nanoclaw.socket", "nanoclaw-channel.socket", "nanoclaw-gateway.socket", "podman.socket")
DISK_LOW_BYTES = 2 << 30
DISK_FULL_BYTES = 200 << 20
STATUS_S = 20.0


def run(options: Namespace) -> int:
    """Check everything, print it, and return 1 if something that is needed is missing."""
    from nanoclawd.cli import output

    checks = []
    for check in floor.check_all() if options.floor else check_all():
        checks.append(check)
        if not options.json:
            _say(check)
    missing = sum(check.state == MISSING for check in checks)
    if options.json:
        output.say_json({"ok": not missing, "checks": [check._asdict() for check in checks]})
    else:
        warnings = sum(check.state == WARNING for check in checks)
        output.talk(
            f"\n{missing} missing, {warnings} warnings." if missing or warnings else "\nAll is well."
        )
    return 1 if missing else 0


def _say(check: Check) -> None:
    from nanoclawd.cli import output

    code = {OK: output.GREEN, WARNING: output.YELLOW, MISSING: output.RED}[check.state]
    print(output.colour(code, f"{check.state:<8}"), end="")
    output.say(f"{check.name}: {check.found}" + (f"\n        → {check.todo}" if check.todo else ""))


def check_all() -> Iterator[Check]:
    """Yield the result of each check: from the machine to the agents."""
    yield from floor.check_all()
    yield check_linger()
    yield check_journal()
    yield check_network_online()
    yield check_disk()
    yield check_socket_path()
    for unit in SOCKETS:
        yield check_socket(unit)
    yield from check_router()


def check_linger() -> Check:
    if os.path.exists(f"/var/lib/systemd/linger/{floor.user_name()}"):
        return Check("linger", OK, "services run while you are logged out")
    return Check("linger", WARNING, "everything stops when you log out", "loginctl enable-linger")


def check_journal() -> Check:
    if os.path.isdir("/var/log/journal"):
        return Check("journal", OK, "persistent")
    todo = "as root: mkdir /var/log/journal && systemctl restart systemd-journald"
    return Check("journal", WARNING, "not persistent: 'nanoclawctl logs' may show nothing", todo)


def check_network_online() -> Check:
    """Quadlet's own ordering waits up to 90 s for a target that many machines never reach."""
    from nanoclawd import paths

    waiting = []
    for file in sorted((paths.quadlets() / "nanoclaw").glob("**/*.container")):
        try:
            text = file.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        if "DefaultDependencies=false" not in text.split():
            waiting.append(file.name)
    if waiting:
        found = f"{', '.join(waiting[:5])} would wait for the network at each start"
        return Check("network-online", WARNING, found, "systemctl --user restart nanoclaw")
    return Check("network-online", OK, "no agent waits for it")


def check_disk() -> Check:
    from nanoclawd import paths

    place = next(path for path in (paths.state(), *paths.state().parents) if path.exists())
    free = shutil.disk_usage(place).free
    found = f"{free / (1 << 30):.1f} GiB free at '{place}'"
    todo = "make room: 'podman image prune' and 'podman system df' may help"
    if free < DISK_FULL_BYTES:
        return Check("disk", MISSING, found, todo)
    return Check("disk", OK, found) if free >= DISK_LOW_BYTES else Check("disk", WARNING, found, todo)


def check_socket_path() -> Check:
    from nanoclawd import paths
    from nanoclawd.errors import ConfigError

    try:
        longest = max(
            (paths.control_socket(), paths.channel_socket(), paths.gateway_socket()),
            key=lambda p: len(str(p)),
        )
    except ConfigError as exc:
        return Check("socket path", MISSING, exc.message, exc.hint)
    return Check("socket path", OK, f"'{longest}' is short enough")


def check_socket(unit: str) -> Check:
    """Check that the socket unit listens, and that it will after the next boot."""
    todo = f"systemctl --user enable --now {unit}"
    _, active = floor.run("systemctl", "--user", "is-active", unit)
    if active != "active":
        return Check(unit, MISSING, f"is {floor.first_line(active) or 'unknown'}", todo)
    _, enabled = floor.run("systemctl", "--user", "is-enabled", unit)
    if enabled not in ("enabled", "enabled-runtime", "static", "linked"):
        return Check(unit, WARNING, "is active, but not enabled: it will be away after the next boot", todo)
    return Check(unit, OK, "active and enabled")


def check_router() -> Iterator[Check]:
    """Ask the router about itself, the gateway and the agents."""
    from nanoclawd.cli import control
    from nanoclawd.errors import NanoclawError

    try:
        status = control.call("Status", timeout_s=STATUS_S)
        agents = [reply for reply in control.stream("ListAgents", timeout_s=STATUS_S) if reply.get("name")]
    except NanoclawError as exc:
        yield Check("router", MISSING, exc.message, "see 'journalctl --user -u nanoclaw'")
        return
    yield Check("router", OK, f"version {status['version']} answers")
    yield check_sandbox("router", status["sandbox"])
    gateway = status["gateway"]
    if gateway is None:
        yield Check(
            "gateway", MISSING, status["gatewayProblem"], "see 'journalctl --user -u nanoclaw-gateway'"
        )
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


def check_credentials(routes: list[Json], agents: list[Json]) -> Iterator[Check]:
    """Check the credential of each provider that an agent uses."""
    used = {agent["configuration"]["provider"] for agent in agents if agent["configuration"]}
    for route in routes:
        if route["provider"] in used:
            name = f"credential {route['credential']}"
            if route["credentialState"] == "ok":
                yield Check(name, OK, f"for {route['provider']}")
            else:
                todo = f"nanoclawctl secret set {route['credential']}"
                yield Check(name, MISSING, f"for {route['provider']}: {route['credentialState']}", todo)


def check_agents(agents: list[Json]) -> Iterator[Check]:
    """Check that no agent is broken, and that the images are there."""
    for agent in agents:
        if agent["runtime"]["state"] == "broken":
            todo = f"correct it, then 'nanoclawctl reload'; see 'nanoclawctl agent show {agent['name']}'"
            yield Check(f"agent {agent['name']}", MISSING, agent["runtime"]["problem"], todo)
    images = {agent["configuration"]["image"] for agent in agents if agent["configuration"]}
    for image in sorted(images):
        code, out = floor.run("podman", "image", "exists", "--", image)
        if code == 0:
            yield Check(f"image {image}", OK, "is there")
        else:
            found = "is not there" if code == 1 else floor.first_line(out)
            yield Check(f"image {image}", MISSING, found, "nanoclawctl image build")


if __name__ == "__main__":
    if sys.argv[1:] != ["--floor"]:
        sys.exit("usage: python3 -m nanoclawd.cli.doctor --floor; else use 'nanoclawctl doctor'")
    sys.exit(floor.main())
