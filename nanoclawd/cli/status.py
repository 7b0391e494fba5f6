"""What there is and runs, as the router sees it."""

from __future__ import annotations

import time
from argparse import Namespace
from collections import Counter
from functools import partial
from pathlib import Path

from nanoclawd.cli import control, output
from nanoclawd.cli.agent import purge
from nanoclawd.cli.channel import say_channel
from nanoclawd.cli.output import GREEN, RED, YELLOW, say_field
from nanoclawd.cli.parser import UsageError
from nanoclawd.errors import ConfigError
from nanoclawd.version import VERSION
from nanoclawd.wire import Json

_UNITS: output.Fields = {
    "UNIT": "name",
    "STATE": lambda unit: f"{unit['activeState']} ({unit['subState']})",
    "MEMORY": lambda unit: output.size(unit["memoryBytes"]),
}
_SESSIONS: output.Fields = {
    name.upper(): name for name in ("agent", "session", "state", "queued", "chat", "message", "detail")
}
_LISTED: output.Fields = {
    **_SESSIONS,
    "LAST USED": "usedAt",
    "CLOSES": lambda session: output.when(session["closesAt"]) if session["closesAt"] else "",
}


def status(options: Namespace) -> None:
    found = control.call("Status")
    if options.json:
        return output.say_json(found)
    running = output.duration(max(0.0, time.time() - found["startedAt"]))
    since = f"since {output.when(found['startedAt'])} ({running})"
    output.say(f"NanoClaw {found['version']}, pid {found['pid']}, {since}\n")
    if found["held"]:
        hint = "their messages wait until 'nanoclawctl start --all'"
        print(f"{output.colour(RED, 'ALL AGENTS ARE STOPPED')}; {hint}\n")
    output.say_table(found["units"], _UNITS)
    output.say("")
    _say_sandbox("Router sandbox", found["sandbox"])
    gateway = found["gateway"]
    if gateway is None:
        say_field("Gateway", "agents cannot reach their models", "away,", RED)
        say_field("", found["gatewayProblem"])
    else:
        _say_sandbox("Gateway sandbox", gateway["sandbox"])
        for route in gateway["routes"]:
            credential = f"credential '{route['credential']}'" if route["credential"] else "no credential"
            say_field("Route", f"{route['name']} to {route['endpoint']}, {credential}")
            if route["credentialState"] != "ok":
                say_field("", route["credentialState"], "credential:", YELLOW)
    for channel in found["channels"]:
        say_channel(channel)
    _say_counts(found)
    for stop in found["budgetStops"]:
        who = f"{stop['agent']}@{stop['session']}" if stop["session"] else stop["agent"]
        say_field("Budget", f"{who}: {stop['message']}, {stop['limit']} is reached", "used up,", RED)
    if found["sessions"]:
        output.say("")
        output.say_table(found["sessions"], _SESSIONS)


def _say_counts(found: Json) -> None:
    queue, states = found["queue"], Counter(session["state"] for session in found["sessions"])
    running = states.total() - states["queued"] - states["idle"]
    say_field("Agents", f"{found['agents']}, {found['agentsHeld']} stopped, {found['agentsBroken']} broken")
    say_field(
        "Sessions", f"{found['sessionCount']}, {running} in a container, {states['queued']} in line for one"
    )
    waiting = f"{queue['queued']} waiting ({queue['deferred']} put off), {queue['leased']} being answered"
    say_field("Messages", f"{waiting}, {queue['answered']} answered, {queue['stopped']} stopped")
    say_field("Deliveries", f"{queue['deliveriesPending']} waiting, {queue['deliveriesSent']} sent")
    if found["approvalsPending"]:
        waiting = f"{found['approvalsPending']} wait for your answer:"
        say_field("Approvals", "see 'nanoclawctl approval list'", waiting, YELLOW)
    if queue["dead"] or queue["deliveriesDead"]:
        dead = f"{queue['dead']} messages, {queue['deliveriesDead']} deliveries:"
        say_field("Dead letters", "see 'nanoclawctl deadletter list'", dead, YELLOW)


def _say_sandbox(name: str, checks: list[Json]) -> None:
    missing = [check for check in checks if not check["active"]]
    if not missing:
        mark, code = ("active,", GREEN) if checks else ("unknown,", YELLOW)
        say_field(name, f"{len(checks)} lines tested", mark, code)
    for check in missing:
        say_field(name, f"{check['name']}: {check['detail']}", "NOT ACTIVE:", RED)


def _switch(method: str, done: str, options: Namespace) -> None:
    if not options.all:
        raise UsageError(
            "say --all", hint="for one agent there are 'nanoclawctl agent stop' and 'agent start'"
        )
    control.call(method)
    output.done(options, {}, done)


stop = partial(_switch, "StopAll", "All agents are stopped; messages wait until 'nanoclawctl start --all'.")
start = partial(_switch, "StartAll", "Agents may run again.")


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
            hint="correct them and reload again; until then such an agent does not run, and reaches nothing",
        )
    output.talk(f"{reply['agents']} agents are read.")


def session_list(options: Namespace) -> None:
    empty = "There are no sessions: one begins with the first message."
    output.say_list(options, "sessions", control.sessions(options.AGENT), _LISTED, empty)


def _forget(method: str, done: str, options: Namespace) -> None:
    parameters = {"agent": options.AGENT, "session": options.CONVERSATION}
    trash = control.call(method, parameters)["trash"]
    if trash and options.purge:
        purge(Path(trash))
    kept = None if options.purge else trash
    where = f" What the agent kept of it is in '{kept}'." if kept else ""
    output.done(options, {"session": options.CONVERSATION, "trash": kept}, f"{done}{where}")


session_reset = partial(_forget, "ResetSession", "The conversation begins anew.")
session_close = partial(_forget, "CloseSession", "The conversation is closed.")


def version(options: Namespace) -> None:
    if options.json:
        return output.say_json({"version": VERSION})
    output.say(f"nanoclawctl {VERSION}")
