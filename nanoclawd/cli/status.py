"""What there is and runs, as the router sees it."""

from __future__ import annotations

import time
from argparse import Namespace

from nanoclawd.cli import control, output
from nanoclawd.cli.output import GREEN, RED, YELLOW, colour
from nanoclawd.errors import ConfigError
from nanoclawd.version import VERSION
from nanoclawd.wire import Json


def status(options: Namespace) -> None:
    found = control.call("Status")
    if options.json:
        return output.say_json(found)
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["startedAt"]))
    running = output.duration(max(0.0, time.time() - found["startedAt"]))
    output.say(f"NanoClaw {found['version']}, pid {found['pid']}, since {since} ({running})\n")
    units = (
        (unit["name"], f"{unit['activeState']} ({unit['subState']})", output.size(unit["memoryBytes"]))
        for unit in found["units"]
    )
    output.say_table(("UNIT", "STATE", "MEMORY"), units)
    output.say("")
    _say_sandbox("router", found["sandbox"])
    gateway = found["gateway"]
    if gateway is None:
        print(f"Gateway:          {colour(RED, 'away')}, agents cannot reach their models")
        output.say(f"                  {found['gatewayProblem']}")
    else:
        _say_sandbox("gateway", gateway["sandbox"])
        for route in gateway["routes"]:
            _say_route(route)
    queue = found["queue"]
    output.say(
        f"{'Agents:':<17} {found['agents']}\n"
        f"{'Messages:':<17} {queue['queued']} waiting, {queue['leased']} being answered, "
        f"{queue['answered']} answered, {queue['stopped']} stopped, {queue['dead']} dead letters\n"
        f"{'Deliveries:':<17} {queue['deliveriesPending']} waiting, {queue['deliveriesSent']} sent, "
        f"{queue['deliveriesDead']} dead letters"
    )
    if found["sessions"]:
        output.say("")
        _say_sessions(found["sessions"])


def _say_route(route: Json) -> None:
    head = "Provider:".ljust(17)
    output.say(f"{head} {route['provider']} at {route['endpoint']}, credential '{route['credential']}'")
    if route["credentialState"] != "ok":
        print(f"{'':<17} {colour(YELLOW, 'cannot be used:')} ", end="")
        output.say(route["credentialState"])


def _say_sandbox(name: str, checks: list[Json]) -> None:
    missing = [check for check in checks if not check["active"]]
    head = f"{name.capitalize()} sandbox:".ljust(17)
    if not checks:
        print(f"{head} {colour(YELLOW, 'unknown')}")
    elif not missing:
        print(f"{head} {colour(GREEN, 'active')}, {len(checks)} lines tested")
    for check in missing:
        print(f"{head} {colour(RED, 'NOT ACTIVE:')} ", end="")
        output.say(f"{check['name']}: {check['detail']}")


def reload(options: Namespace) -> None:
    """Read all configuration again; fails if some of it is wrong."""
    reply = control.call("Reload")
    if options.json:
        return output.say_json(reply)
    for problem in reply["problems"]:
        output.talk(f"warning: {problem}")
    if reply["problems"]:
        raise ConfigError(
            f"{reply['agents']} agents are read, {len(reply['problems'])} problems remain",
            hint="correct the files and reload again; what was wrong stays as it was before",
        )
    output.talk(f"{reply['agents']} agents are read.")


def session_list(options: Namespace) -> None:
    found = control.sessions(options.AGENT)
    if options.json:
        return output.say_json({"sessions": found})
    if not found:
        return output.talk("There are no sessions: one begins with the first message.")
    _say_sessions(found)


def _say_sessions(found: list[Json]) -> None:
    keys = ("agent", "session", "state", "queued", "channel", "chat", "thread", "message")
    rows = (["" if session.get(key) is None else session[key] for key in keys] for session in found)
    output.say_table([key.upper() for key in keys], rows)


def version(options: Namespace) -> None:
    if options.json:
        return output.say_json({"version": VERSION})
    output.say(f"nanoclawctl {VERSION}")
