"""Runs in the machine, reads requests as JSON lines, answers each with one: units through the real programs.

A process for all examples of a property test: starting one in the machine takes longer than an example.
    {"op": "check", "agents": [SPEC, …]}    → {name: problem or null}; nothing is installed
    {"op": "install", "agents": [SPEC, …]}  → {name: problem or null}
    {"op": "argv", "agents": [SPEC]}        → {"argv": what podman would be given} or {name: problem}
SPEC is {"name", "toml", "index", "mounts": [[source, target], …]}.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from nanoclawd import paths, quadlet, quadlet_check
from nanoclawd.agents import parse_agent
from nanoclawd.errors import NanoclawError
from nanoclawd.mounts import BindMount

UNITS = Path.home() / ".config/systemd/user"
SCRATCH = Path.home() / "argv"
PROGRAM = """\
#!/usr/bin/python3
import json, sys
json.dump(sys.argv[1:], open(sys.argv[0] + ".json", "w"))
"""


def spec_of(row: dict[str, Any]) -> quadlet.UnitSpec:
    mounts = tuple(
        BindMount(source=Path(source), target=target, read_only=True)
        for source, target in row.get("mounts", [])
    )
    config = parse_agent(row["toml"], paths.agents() / f"{row['name']}.toml")
    return quadlet.UnitSpec(config=config, index=row.get("index", 0), mounts=mounts)


def argv(spec: quadlet.UnitSpec) -> list[str]:
    """Return what systemd passes to podman: Quadlet's service, with a program that writes it down."""
    text = quadlet.render(spec)
    problems = asyncio.run(quadlet_check.check_units({spec.agent: text}))
    if problems:
        raise next(iter(problems.values()))
    (SCRATCH / "quadlets").mkdir(parents=True, exist_ok=True)
    (SCRATCH / f"quadlets/nanoclaw-{spec.agent}@.container").write_text(text)
    generator = next(path for path in quadlet_check.GENERATORS if os.access(path, os.X_OK))
    env = {**os.environ, "QUADLET_UNIT_DIRS": str(SCRATCH / "quadlets")}
    made = subprocess.run(
        [generator, "--dryrun", "--user"], env=env, capture_output=True, text=True, check=True
    )
    start = next(line for line in made.stdout.split("\n") if line.startswith("ExecStart=/usr/bin/podman "))
    program = SCRATCH / "program"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    UNITS.mkdir(parents=True, exist_ok=True)
    service = f"[Service]\nType=oneshot\n{start.replace('/usr/bin/podman', str(program), 1)}\n"
    (UNITS / "dump@.service").write_text(service)
    for command in (["daemon-reload"], ["start", "dump@s1.service"]):
        subprocess.run(["systemctl", "--user", *command], check=True, capture_output=True, text=True)
    arguments: list[str] = json.loads(program.with_suffix(".json").read_text())
    return arguments


def answer(request: dict[str, Any]) -> Any:
    specs = []
    problems: dict[str, str | None] = {}
    for row in request["agents"]:
        try:
            specs.append(spec_of(row))
            quadlet.render(specs[-1])
        except NanoclawError as exc:
            problems[row["name"]] = str(exc)
    if problems:
        return problems
    if request["op"] == "argv":
        return {"argv": argv(specs[0])}
    if request["op"] == "install":
        results: Any = asyncio.run(quadlet.install_units(specs))
    else:
        found = asyncio.run(quadlet_check.check_units({spec.agent: quadlet.render(spec) for spec in specs}))
        results = {spec.agent: found.get(spec.agent) for spec in specs}
    return {name: str(problem) if problem else None for name, problem in results.items()}


def main() -> None:
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as exc:  # the other side shows it
            reply = {"crash": f"{type(exc).__name__}: {exc}"}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
