"""The agent commands."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from nanoclawd import limits
from nanoclawd.cli import control, output
from nanoclawd.cli.parser import UsageError
from nanoclawd.errors import ConfigError, Refused
from nanoclawd.wire import Json


def add(options: Namespace) -> None:
    reply = control.call("AddAgent", {"name": options.AGENT, **_keys(options), "mounts": options.mount})
    if options.json:
        return output.say_json(reply)
    output.talk(f"Added '{options.AGENT}'. Try 'nanoclawctl chat {options.AGENT}'.")
    _warn_if_broken(options.AGENT, reply)


def set_(options: Namespace) -> None:
    if options.mount and options.no_mounts:
        raise UsageError("--mount and --no-mounts exclude each other")
    keys = {**_keys(options), "mounts": [] if options.no_mounts else options.mount}
    if all(value is None for value in keys.values()):
        raise UsageError("nothing to change", hint="'nanoclawctl agent set --help' lists what there is")
    reply = control.call_agent("SetAgent", options.AGENT, keys)
    if options.json:
        return output.say_json(reply)
    _warn_if_broken(options.AGENT, reply)
    if reply["runtime"]["running"]:
        output.talk(
            f"Sessions that run keep what they have; 'nanoclawctl agent restart {options.AGENT}' ends that."
        )


def list_(options: Namespace) -> None:
    agents = [reply for reply in control.stream("ListAgents") if reply.get("name")]
    if options.json:
        return output.say_json({"agents": agents})
    if not agents:
        return output.talk("There are no agents. Add one: 'nanoclawctl agent add NAME'.")
    output.say_table(
        ("AGENT", "STATE", "RUNNING", "QUEUED", "PROVIDER", "MODEL", "DESCRIPTION"), map(_row, agents)
    )


def _row(agent: Json) -> tuple[object, ...]:
    runtime, configuration = agent.get("runtime") or {}, agent.get("configuration") or {}
    return (
        agent["name"],
        runtime.get("state", "?"),
        runtime.get("running", "?"),
        runtime.get("queued", "?"),
        configuration.get("provider", ""),
        configuration.get("model", ""),
        configuration.get("description") or runtime.get("problem", ""),
    )


def show(options: Namespace) -> None:
    reply = control.call_agent("ShowAgent", options.AGENT)
    if options.json:
        return output.say_json(reply)
    runtime, configuration = reply["runtime"], reply["configuration"] or {}
    mounts = [
        f"{mount['source']} on {mount['target']}{'' if mount['readOnly'] else ' (writable)'}"
        for mount in configuration.get("mounts", [])
    ]
    rows = [
        ("State", runtime["state"] + (f": {runtime['problem']}" if runtime["problem"] else "")),
        (
            "Sessions",
            f"{runtime['sessions']}, of which {runtime['running']} run; {runtime['queued']} messages wait",
        ),
        ("Description", configuration.get("description", "")),
        ("Provider", configuration.get("provider", "")),
        ("Model", configuration.get("model") or "the provider's default"),
        ("Image", configuration.get("image", "")),
        ("Idle seconds", configuration.get("idleSeconds", "")),
        ("Memory", configuration.get("memoryMax", "")),
        ("Tasks", configuration.get("tasksMax", "")),
        ("CPU quota", configuration.get("cpuQuota") or "none"),
        *(("Mount", mount) for mount in mounts),
        ("Host uid", runtime["hostUid"] if runtime["hostUid"] >= 0 else "unknown"),
        ("File", reply["file"]),
        ("Workspace", reply["workspace"]),
        ("Unit", f"{runtime['unitTemplate']}, generated from {reply['unitFile']}"),
        ("Drop-ins", reply["dropInDirectory"]),
    ]
    for head, value in rows:
        output.say(f"{head + ':':<14} {value}".rstrip())
    if reply["instructions"].strip():
        output.say(f"\n{reply['instructions'].rstrip()}")


def remove(options: Namespace) -> None:
    from nanoclawd.cli import trash

    if not options.yes:
        if not output.is_interactive():
            raise UsageError("nobody can be asked here", hint="say --yes if you are sure")
        what = "and delete its workspace" if options.purge else "and move its workspace to the trash"
        # The name is checked first: nobody should have to think about the removal of what does not exist.
        control.call_agent("ShowAgent", options.AGENT)
        if not output.ask(f"Remove agent '{options.AGENT}' {what}? Messages that wait for it are given up."):
            raise Refused("nothing was removed")
    trashed = control.call_agent("RemoveAgent", options.AGENT).get("trash")
    if trashed and options.purge:
        trash.purge(Path(trashed))
    kept = None if options.purge else trashed
    if options.json:
        output.say_json({"removed": options.AGENT, "trash": kept})
    else:
        output.talk(f"Removed '{options.AGENT}'." + (f" What it had is in '{kept}'." if kept else ""))


def start(options: Namespace) -> None:
    _act(options, "StartAgent")


def stop(options: Namespace) -> None:
    _act(options, "StopAgent")


def restart(options: Namespace) -> None:
    _act(options, "RestartAgent")


def _act(options: Namespace, method: str) -> None:
    control.call_agent(method, options.AGENT)
    if options.json:
        output.say_json({"agent": options.AGENT})


def _keys(options: Namespace) -> Json:
    """Return the configuration keys as the router takes them; None is "stays" or "the default"."""
    instructions = options.instructions
    return {
        "description": options.description,
        "provider": options.provider,
        "model": options.model,
        "image": options.image,
        "instructions": None if instructions is None else _read_instructions(instructions),
        "idleSeconds": options.idle_seconds,
        "memoryMax": options.memory_max,
        "tasksMax": options.tasks_max,
        "cpuQuota": options.cpu_quota,
    }


def _read_instructions(name: str) -> str:
    import sys

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


def _warn_if_broken(agent: str, reply: Json) -> None:
    if reply["runtime"]["state"] == "broken":
        output.talk(f"warning: '{agent}' cannot run yet: {reply['runtime']['problem']}")
