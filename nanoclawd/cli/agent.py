"""The agent commands."""

from __future__ import annotations

import os
import shlex
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import NoReturn

from nanoclawd import limits, paths
from nanoclawd.cli import control, logs, output
from nanoclawd.cli.parser import UsageError
from nanoclawd.errors import ConfigError, Failed, NotFound, Refused
from nanoclawd.ids import parse_agent_name, parse_session_name
from nanoclawd.wire import Json

DELETE_S = 600.0  #: for a workspace
_COLUMNS: output.Fields = {
    "AGENT": "name",
    "STATE": "runtime.state",
    "RUNNING": "runtime.running",
    "QUEUED": "runtime.queued",
    "PROVIDER": "configuration.provider",
    "MODEL": "configuration.model",
    "DESCRIPTION": lambda agent: (
        (agent["configuration"] or {}).get("description") or agent["runtime"]["problem"]
    ),
}


def agent_add(options: Namespace) -> None:
    reply = control.call("AddAgent", {"name": options.AGENT, **_keys(options), "mounts": options.mount})
    output.done(options, reply, f"Added '{options.AGENT}'. Try 'nanoclawctl chat {options.AGENT}'.")
    _warn_if_broken(options, reply)


def agent_set(options: Namespace) -> None:
    if options.mount and options.no_mounts:
        raise UsageError("--mount and --no-mounts exclude each other")
    keys = {**_keys(options), "mounts": [] if options.no_mounts else options.mount}
    if all(value is None for value in keys.values()):
        raise UsageError("nothing to change", hint="'nanoclawctl agent set --help' lists what there is")
    reply = control.call_agent("SetAgent", options.AGENT, keys)
    _warn_if_broken(options, reply)
    keeps = f"Sessions that run keep what they have; 'nanoclawctl agent restart {options.AGENT}' ends that."
    later = any(value is not None for key, value in keys.items() if key != "unknown")
    output.done(options, reply, keeps if later and reply["runtime"]["running"] else "")


def agent_list(options: Namespace) -> None:
    empty = "There are no agents. Add one: 'nanoclawctl agent add NAME'."
    output.say_list(options, "agents", control.list_all("ListAgents"), _COLUMNS, empty)


def agent_show(options: Namespace) -> None:
    reply = control.call_agent("ShowAgent", options.AGENT)
    if options.json:
        return output.say_json(reply)
    from nanoclawd.cli.usage import shown  # slow to import

    instructions, budget = reply.pop("instructions").rstrip(), reply.pop("budget")
    output.say_document({**reply, "budget": shown(budget)})
    if instructions:
        output.say(f"\n{instructions}")


def agent_remove(options: Namespace) -> None:
    if not options.yes:
        what = "and delete its workspace" if options.purge else "and move its workspace to the trash"
        output.require_person()
        # The name is checked first: nobody should have to think about the removal of what does not exist.
        control.call_agent("ShowAgent", options.AGENT)
        output.confirm(f"Remove agent '{options.AGENT}' {what}? Messages that wait for it are given up.")
    trashed = control.call_agent("RemoveAgent", options.AGENT).get("trash")
    if trashed and options.purge:
        purge(Path(trashed))
    kept = None if options.purge else trashed
    where = f" What it had is in '{kept}'." if kept else ""
    output.done(options, {"removed": options.AGENT, "trash": kept}, f"Removed '{options.AGENT}'.{where}")


def purge(directory: Path) -> None:
    """Delete `directory`, which must lie directly in the trash.

    Its files belong to the agent's uid, one of the person's subordinate uids: only podman-unshare(1), where
    that uid is mapped, may remove them. rm(1) follows no symbolic link that an agent left there.
    """
    from nanoclawd.cli.doctor import ask

    trash = paths.state() / "trash"
    inside = directory.parent == trash and directory.name not in ("", ".", "..")
    if not inside or trash.is_symlink() or directory.is_symlink():
        raise Refused(f"'{directory}' is not in '{trash}': not deleting it")
    if not os.path.lexists(directory):
        return
    command = ["podman", "unshare", "rm", "-rf", "--", str(directory)]
    code, out = ask(*command, timeout_s=DELETE_S)
    if code != 0 or os.path.lexists(directory):
        problem = f"the agent is removed, but '{directory}' cannot be deleted: {out or 'it is still there'}"
        raise Failed(problem, hint=f"try: {shlex.join(command)}")


def _act(method: str, options: Namespace) -> None:
    control.call_agent(method, options.AGENT)
    output.done(options, {"agent": options.AGENT}, "")


agent_start, agent_stop, agent_restart = (
    partial(_act, f"{verb}Agent") for verb in ("Start", "Stop", "Restart")
)


agent_logs = logs.logs


def agent_shell(options: Namespace) -> NoReturn:
    """Become a shell in the agent's container."""
    agent = parse_agent_name(options.AGENT)
    if options.session is not None:
        session = parse_session_name(options.session)
    else:
        sessions = control.sessions(agent)
        running = [found["session"] for found in sessions if found["state"] in ("ready", "working")]
        if not running:
            hint = f"send it a message first: 'nanoclawctl chat {agent}'"
            raise NotFound(f"no session of '{agent}' runs", hint=hint)
        if len(running) > 1:
            many = f"several sessions of '{agent}' run: {', '.join(running)}"
            raise UsageError(many, hint="choose: --session")
        session = parse_session_name(running[0])
    keyboard = ["--interactive", "--tty"] if os.isatty(0) and os.isatty(1) else ["--interactive"]
    logs.become(["podman", "exec", *keyboard, f"nanoclaw-{agent}-{session}", "bash"])


def _keys(options: Namespace) -> Json:
    """Return the configuration keys as the router takes them; None is "stays" or "the default"."""
    keys = {
        "idleSeconds": options.idle_seconds,
        "memoryMax": options.memory_max,
        "tasksMax": options.tasks_max,
        "cpuQuota": options.cpu_quota,
        "instructions": None if options.instructions is None else _read_instructions(options.instructions),
    }
    return {
        key: getattr(options, key)
        for key in ("description", "provider", "model", "image", "runtime", "unknown")
    } | keys


def _read_instructions(name: str) -> str:
    try:
        if name == "-":
            data = sys.stdin.buffer.read(limits.INSTRUCTIONS_BYTES + 1)
        else:
            with open(name, "rb") as file:
                data = file.read(limits.INSTRUCTIONS_BYTES + 1)
        if len(data) > limits.INSTRUCTIONS_BYTES:
            raise ConfigError(f"{name}: is longer than {limits.INSTRUCTIONS_BYTES >> 10} KiB")
        return data.decode()
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{name}: is not UTF-8 at byte {exc.start}") from None
    except OSError as exc:
        raise ConfigError(f"{name}: cannot be read: {exc.strerror}") from None


def _warn_if_broken(options: Namespace, reply: Json) -> None:
    if reply["runtime"]["state"] == "broken" and not options.json:
        output.talk(f"warning: '{options.AGENT}' cannot run yet: {reply['runtime']['problem']}")
