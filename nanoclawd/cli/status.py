"""The whole picture, as the router sees it."""

from __future__ import annotations

import time
from argparse import Namespace

from nanoclawd.cli import control, output, sessions
from nanoclawd.cli.output import GREEN, RED, YELLOW, colour
from nanoclawd.errors import ConfigError
from nanoclawd.wire import Json


def run(options: Namespace) -> None:
    status = control.call("Status")
    if options.json:
        return output.say_json(status)
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status["startedAt"]))
    running = output.duration(max(0.0, time.time() - status["startedAt"]))
    output.say(f"NanoClaw {status['version']}, pid {status['pid']}, since {since} ({running})\n")
    output.say_table(
        ("UNIT", "STATE", "MEMORY"),
        (
            (unit["name"], f"{unit['activeState']} ({unit['subState']})", output.size(unit["memoryBytes"]))
            for unit in status["units"]
        ),
    )
    output.say("")
    _say_sandbox("router", status["sandbox"])
    gateway = status["gateway"]
    if gateway is None:
        print(f"Gateway:          {colour(RED, 'away')}, agents cannot reach their models")
        output.say(f"                  {status['gatewayProblem']}")
    else:
        _say_sandbox("gateway", gateway["sandbox"])
        for route in gateway["routes"]:
            _say_route(route)
    queue = status["queue"]
    output.say(
        f"{'Agents:':<17} {status['agents']}\n"
        f"{'Messages:':<17} {queue['queued']} waiting, {queue['leased']} being answered, "
        f"{queue['answered']} answered, {queue['stopped']} stopped, {queue['dead']} dead letters\n"
        f"{'Deliveries:':<17} {queue['deliveriesPending']} waiting, {queue['deliveriesSent']} sent, "
        f"{queue['deliveriesDead']} dead letters"
    )
    if status["sessions"]:
        output.say("")
        sessions.say_sessions(status["sessions"])


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
        output.say_json(reply)
        return
    for problem in reply["problems"]:
        output.talk(f"warning: {problem}")
    if reply["problems"]:
        raise ConfigError(
            f"{reply['agents']} agents are read, {len(reply['problems'])} problems remain",
            hint="correct the files and reload again; what was wrong stays as it was before",
        )
    output.talk(f"{reply['agents']} agents are read.")
