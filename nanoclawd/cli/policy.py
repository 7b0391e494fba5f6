"""The policy commands: what an agent may reach."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from nanoclawd import policy
from nanoclawd.cli import control, output
from nanoclawd.cli.parser import UsageError
from nanoclawd.errors import Refused
from nanoclawd.policy import Denied, Rule, Way
from nanoclawd.wire import Json

_COLUMNS: output.Fields = {
    "RULE": "number",
    "": lambda rule: "deny" if rule["deny"] else "allow",
    "WHAT": lambda rule: f"/r/{rule['route']}" if rule["route"] else f"{rule['host']}:{rule['port']}",
    "METHODS": lambda rule: ",".join(rule["methods"]),
    "PATH": "path",
    "ADDRESSES": lambda rule: ",".join(rule["addresses"]),
    "UP": lambda rule: output.size(rule["maxUpBytes"]),
    "DOWN": lambda rule: output.size(rule["maxDownBytes"]),
    "PER MINUTE": "perMinute",
    "SECONDS": "timeoutSeconds",
    "UNTIL": lambda rule: output.when(rule["until"]) if rule["until"] else "",
}


def policy_show(options: Namespace) -> None:
    shown = control.call_agent("ShowPolicy", options.AGENT)
    numbered = [{"number": number, **rule} for number, rule in enumerate(shown["rules"], 1)]
    if options.json:
        return output.say_json({"unknown": shown["unknown"], "rules": numbered})
    output.say_list(options, "rules", numbered, _COLUMNS, f"'{options.AGENT}' may reach nothing.")
    if numbered:
        rest = {"deny": "is denied", "ask": "waits for your answer ('nanoclawctl approval list')"}
        output.talk(f"What no rule decides {rest[shown['unknown']]}.")


def policy_allow(options: Namespace) -> None:
    limits = {
        "max_up_bytes": options.max_up,
        "max_down_bytes": options.max_down,
        "per_minute": options.per_minute,
        "timeout_seconds": options.time_limit,
        "addresses": tuple(options.address or ()),
    }
    _add(options, {key: value for key, value in limits.items() if value is not None})


def policy_deny(options: Namespace) -> None:
    _add(options, {"deny": True})


def policy_test(options: Namespace) -> int:
    """Exit as a refusal does if it is one, so that scripts can ask."""
    if len(options.method or ()) > 1:
        raise UsageError("--method: too many", hint="a test is about one")
    parameters = {"url": options.URL, "method": (options.method or ["GET"])[0]}
    found = control.call_agent("TestPolicy", options.AGENT, parameters)
    output.done(options, found, "")
    if not options.json:
        output.say_field("Allowed" if found["allowed"] else "Denied", found["message"])
    return 0 if found["allowed"] else 5


def _add(options: Namespace, values: Json) -> None:
    rule = _rule(options.TARGET, {**values, "methods": tuple(options.method or ())})
    reply = control.call_agent("AddRule", options.AGENT, {"rule": policy.to_json(rule)})
    if options.json:
        return output.say_json(reply)
    number = next(
        n for n, each in enumerate(reply["rules"], 1) if policy.from_json(each).match == rule.match
    )
    output.talk(f"Rule {number} of '{options.AGENT}': {rule}.")


def _rule(target: str, values: Any) -> Rule:
    """Return the rule about HOST[:PORT], a URL, or /r/NAME[/PATH]. Raises UsageError, Refused."""
    url = target if "://" in target or target.startswith("/") else f"https://{target}"
    plain = url.replace("://*.", "://", 1)
    try:
        if "?" in target or "#" in target:
            raise Denied(400, "query", "a rule knows no query")
        ask = policy.parse_url("GET", plain)
    except Denied as exc:
        hint = "write HOST, HOST:PORT, *.HOST, http://HOST:PORT/PATH or /r/ROUTE/PATH"
        raise UsageError(f"TARGET: '{target[:128]}' is none: {exc}", hint=hint) from None
    if ask.way is Way.ROUTE:
        return Rule(route=ask.route, path=ask.path, **values)
    if ask.way is Way.TUNNEL and "/" in plain.removeprefix("https://").rstrip("/"):
        hint = f"allow '{ask.host}:{ask.port}', or make a route in nanoclaw.toml"
        raise Refused("of https:// the gateway sees host and port, no path", hint=hint)
    if ask.way is Way.TUNNEL and ask.port == 443 and values["methods"]:
        hint = "leave --method out, or make a route in nanoclaw.toml"
        raise Refused("of https:// the gateway sees host and port, no method", hint=hint)
    star = "*." if plain != url else ""
    return Rule(host=star + ask.host, port=ask.port, path="" if ask.path == "/" else ask.path, **values)
