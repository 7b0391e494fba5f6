"""The channel commands: the platforms on which people talk to agents, and their adapters."""

from __future__ import annotations

import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

from nanoclawd.cli import control, output
from nanoclawd.cli.agent import purge
from nanoclawd.cli.output import GREEN, RED, YELLOW, say_field
from nanoclawd.cli.parser import UsageError
from nanoclawd.errors import Failed, NotFound, Unavailable
from nanoclawd.ids import parse_channel_name
from nanoclawd.wire import Json

LOGIN_S = 60.0  #: until the adapter says how it went
LOOK_S = 0.2
SILENT_S = 180.0  #: an adapter says once a minute how it is


def _state(channel: Json) -> str:
    """Say in one word, or few, how a channel is."""
    if channel["problem"]:
        return "broken"
    if channel["activeState"] != "active" or not channel["health"]:
        return str(channel["subState"] if channel["activeState"] == "activating" else channel["activeState"])
    if channel["healthAge"] > SILENT_S:
        return f"silent for {output.duration(channel['healthAge'])}"
    return str(channel["health"])


_COLUMNS: output.Fields = {
    "CHANNEL": "name",
    "KIND": "kind",
    "STATE": _state,
    "ACCOUNTS": lambda channel: ", ".join(channel["accounts"]),
    "WAITING": "waiting",
    "DETAIL": lambda channel: channel["problem"] or channel["healthText"],
}


def channel_add(options: Namespace) -> None:
    if options.kind is None:
        raise UsageError("--kind is missing", hint="say which adapter, e.g. --kind matrix")
    wanted = {"name": options.CHANNEL, "kind": options.kind, "settings": dict(options.SETTING)}
    added = control.call("AddChannel", wanted)["channel"]
    hint = f"Give it its password or token: 'nanoclawctl channel login {options.CHANNEL}'."
    output.done(options, {"channel": added}, f"Added '{options.CHANNEL}'. {hint}")


def channel_list(options: Namespace) -> None:
    channels = [reply["channel"] for reply in control.list_all("ListChannels")]
    empty = "There are no channels but the terminal. 'nanoclawctl channel add' adds one."
    output.say_list(options, "channels", channels, _COLUMNS, empty)


def channel_login(options: Namespace) -> None:
    """Store the credential, start the adapter anew, and say what it says."""
    from nanoclawd import credentials
    from nanoclawd.cli import secret

    credentials.never_dump_core()
    name = parse_channel_name(options.CHANNEL)
    login = control.call("ShowChannel", {"name": name})["credential"]
    secret.set_secret(login, secret.read_value(f"Password or token of '{name}' (not shown): "))
    secret.note(login, "secret_set")
    control.call("RestartChannel", {"name": name})
    channel = _wait_health(name)
    who = ", ".join(channel["accounts"]) or name
    words = f"Logged in as {who}." + (f" {channel['healthText']}" if channel["healthText"] else "")
    output.done(options, {"channel": channel}, words)


def _wait_health(name: str) -> Json:
    """Return the channel once its adapter has logged in. Raises Failed with what it says, Unavailable."""
    hint = f"'nanoclawctl channel status {name}' and 'journalctl --user -u nanoclaw-channel@{name}' say more"
    until = time.monotonic() + LOGIN_S
    while time.monotonic() < until:
        channel: Json = control.call("ShowChannel", {"name": name})["channel"]
        if channel["health"] in ("connected", "degraded"):
            return channel
        if channel["health"] in ("login", "failed"):
            raise Failed(f"the adapter of '{name}' cannot log in: {channel['healthText']}", hint=hint)
        if channel["activeState"] in ("inactive", "failed"):
            raise Failed(f"the adapter of '{name}' has ended", hint=hint)
        time.sleep(LOOK_S)
    raise Unavailable(f"the adapter of '{name}' has not said within {LOGIN_S:.0f} s how it went", hint=hint)


def channel_status(options: Namespace) -> None:
    reply = control.call("ShowChannel", {"name": options.CHANNEL})
    if options.json:
        return output.say_json(reply)
    channel = reply["channel"]
    say_channel(channel)
    say_field("Unit", f"{channel['unit']}, {channel['activeState']} ({channel['subState']})")
    say_field("Adapter", channel["adapter"] or "has not announced itself yet")
    say_field("Accounts", ", ".join(channel["accounts"]) or "-")
    capabilities = (channel["capabilities"] or {}).items()
    can = [
        key if value is True else f"{key} {value}" for key, value in capabilities if value not in (False, 0)
    ]
    say_field("Can", ", ".join(can) or "-")
    for name in ("file", "directory", "socket", "credential"):
        say_field(name.capitalize(), reply[name])


def say_channel(channel: Json) -> None:
    """Print in one line how a channel is, and what waits; in another what is wrong."""
    state = _state(channel)
    code = GREEN if state == "connected" else RED if state in ("broken", "failed", "login") else YELLOW
    parts = [channel["healthText"], f"{channel['waiting']} deliveries wait"]
    say_field(f"Channel {channel['name']}", "; ".join(filter(None, parts)), f"{state},", code)
    if channel["problem"]:
        say_field("", channel["problem"])
    if channel["lastError"]:
        say_field("", channel["lastError"], "last error:", YELLOW)
    for check in channel["sandbox"]:
        if not check["active"]:
            say_field("", f"{check['name']}: {check['detail']}", "sandbox not active:", RED)


def channel_remove(options: Namespace) -> None:
    from nanoclawd import credentials
    from nanoclawd.cli import secret

    name = parse_channel_name(options.CHANNEL)
    shown = control.call("ShowChannel", {"name": name})
    channel, login = shown["channel"], shown["credential"]
    if not options.yes:
        waiting = f" {channel['waiting']} deliveries to it are given up." if channel["waiting"] else ""
        output.confirm(f"Remove the channel '{name}' with its login, and block its chats?{waiting}")
    trash = control.call("RemoveChannel", {"name": name})["trash"]
    if trash and options.purge:
        purge(Path(trash))
    with suppress(NotFound):
        credentials.remove(login)
        secret.note(login, "secret_removed")
    kept = None if options.purge else trash
    where = f" What its adapter had to remember is in '{kept}'." if kept else ""
    output.done(options, {"removed": name, "trash": kept}, f"Removed '{name}'.{where}")
