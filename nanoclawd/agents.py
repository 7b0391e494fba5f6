"""agents/NAME.toml: what a person configured of one agent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nanoclawd import budget, limits, policy, tomltable
from nanoclawd.budget import NO_LIMITS, Budget, parse_budget
from nanoclawd.errors import ConfigError, NotFound, Refused
from nanoclawd.files import read_all, read_text, write_text
from nanoclawd.ids import AgentName, parse_agent_name
from nanoclawd.policy import Policy, Rule, Unknown
from nanoclawd.privileges import NOT_SAID, Privileges, parse_privileges
from nanoclawd.tomltable import BadValue, line_of_text, true_or_false, whole_number

DEFAULT_IMAGE = "localhost/nanoclaw-agent:latest"
MOUNTS = 16  #: [[mounts]] of one agent
PATH_CHARACTERS = 1024
WORD_CHARACTERS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Mount:
    """One directory or file of the person that the agent sees; mounts.py says whether it may."""

    source: str  #: a path on this host; "~" is the person's home
    target: str  #: a path in the container, below /mnt
    read_only: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentConfig:
    """One agent's TOML file, after defaults."""

    name: AgentName  #: the file's name without .toml
    description: str = ""  #: one line for people
    provider: str = "anthropic"  #: "anthropic", "echo", or one that a skill brought
    model: str = ""  #: empty: the provider's default
    image: str = DEFAULT_IMAGE  #: never pulled; see nanoclawctl image build
    idle_seconds: int = 600  #: without work until the container goes
    memory_max: str = "1G"  #: as MemoryMax= takes it
    tasks_max: int = 256  #: as TasksMax= takes it
    cpu_quota: str = ""  #: as CPUQuota= takes it; empty: none
    runtime: str = ""  #: the OCI runtime that makes its containers; empty: Podman's own, crun
    mounts: tuple[Mount, ...] = ()
    unknown: Unknown = Unknown.DENY  #: what becomes of requests that no rule decides
    policy: tuple[Rule, ...] = ()  #: what it may reach, but for its provider
    budget: Budget = NO_LIMITS  #: what it may spend; None in it: as in nanoclaw.toml
    guard: Privileges = NOT_SAID  #: the same for what it may have the router do

    @property
    def all_policy(self) -> Policy:
        """All of it. Last comes its provider, so that a rule of the person's can deny that too."""
        return Policy(rules=(*self.policy, Rule(route=self.provider)), unknown=self.unknown)


# --- reading ----------------------------------------------------------------------------------------


def read_agent(path: Path) -> AgentConfig:
    """Return what `path`, an agents/NAME.toml, says. Raises NotFound, ConfigError."""
    return parse_agent(read_text(path), path)


def parse_agent(text: str, path: Path) -> AgentConfig:
    """Return what `text` says; `path` gives the agent's name and stands in errors. Raises ConfigError."""
    return AgentConfig(name=_name_of(path), **tomltable.parse(text, KEYS, str(path)))


def read_agents(directory: Path) -> tuple[dict[AgentName, AgentConfig | ConfigError], list[ConfigError]]:
    """Return all agents in `directory`, as read_all() does."""
    return read_all(directory, _name_of, read_agent)


def _name_of(path: Path) -> AgentName:
    try:
        return parse_agent_name(path.stem)
    except Refused as exc:
        raise ConfigError(f"{path}: {exc.message}", hint=exc.hint) from None


def read_instructions(path: Path) -> str:
    """Return the text of NAME.md beside `path`, an agents/NAME.toml; empty if there is none."""
    try:
        return read_text(path.with_suffix(".md"), limits.INSTRUCTIONS_BYTES)
    except NotFound:
        return ""


# --- writing ----------------------------------------------------------------------------------------


def write_agent(path: Path, config: AgentConfig) -> None:
    """Write a new agents/NAME.toml with the keys that are not at their defaults. Raises ConfigError."""
    values = {
        f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default
    }
    del values["name"]
    tables = {
        "budget": {key: budget.plain(key, value) for key, value in asdict(config.budget).items()},
        "guard": asdict(config.guard),
    }
    text = _change("", path, {key: value for key, value in values.items() if key not in tables})
    for name, table in tables.items():
        if name in values:
            text = tomltable.change_table(text, name, table)
    parse_agent(text, path)
    write_text(path, text)


def change_agent(path: Path, changes: Mapping[str, Any]) -> AgentConfig:
    """Change keys of agents/NAME.toml and return what it says now; a person's comments and order stay.

    `changes` has keys of AgentConfig (not name) with values of its types. Raises ConfigError, and leaves the
    file, if it was broken before or would be.
    """
    text = read_text(path)
    new = _change(text, path, changes)
    if new != text:
        write_text(path, new)
    return parse_agent(new, path)


def change_table(path: Path, table: str, changes: Mapping[str, Any]) -> AgentConfig:
    """Change keys of a table in agents/NAME.toml, as change_agent() does; None takes a key out."""
    text = read_text(path)
    parse_agent(text, path)
    new = tomltable.change_table(text, table, changes)
    config = parse_agent(new, path)
    write_text(path, new)
    return config


def _change(text: str, path: Path, changes: Mapping[str, Any]) -> str:
    """Return the text of an agent's file with `changes`, as far as they change anything."""
    before = parse_agent(text, path)
    plain = {
        key: [_table(v) for v in value] if isinstance(value, tuple) else value
        for key, value in changes.items()
    }
    tomltable.check(plain, KEYS, str(path))
    new = tomltable.change(text, {k: v for k, v in plain.items() if getattr(before, k) != changes[k]})
    parse_agent(new, path)
    return new


def _table(row: Mount | Rule) -> dict[str, Any]:
    """Return what has to be written of a row: not its defaults."""
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    given = {f.name: values[f.name] for f in fields(row) if values[f.name] != f.default}
    return {key: [*value] if isinstance(value, tuple) else value for key, value in given.items()}


def write_instructions(path: Path, text: str) -> None:
    """Write NAME.md beside `path`, an agents/NAME.toml. Raises Refused if it is too large or no text."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise Refused("instructions are not valid Unicode") from None
    if size > limits.INSTRUCTIONS_BYTES:
        raise Refused(f"instructions are larger than {limits.INSTRUCTIONS_BYTES >> 10} KiB")
    write_text(path.with_suffix(".md"), text)


# --- values -----------------------------------------------------------------------------------------

_PATH = line_of_text(PATH_CHARACTERS)
_IMAGE_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
#: One row a key: how its value is checked. Defaults and meaning stand in AgentConfig.
KEYS: dict[str, Callable[[Any], Any]] = {
    "description": line_of_text(200),
    "provider": line_of_text(
        WORD_CHARACTERS, r"[a-z][a-z0-9_-]{0,31}", "is not a provider's name", 'write "anthropic" or "echo"'
    ),
    "model": line_of_text(
        WORD_CHARACTERS, r"([A-Za-z0-9][A-Za-z0-9._:/@-]*)?", "is not a model's name", "use the API's name"
    ),
    "image": line_of_text(
        WORD_CHARACTERS,
        # Quadlet takes *.build, *.image and *.pod for units of its own.
        rf"(?!.*\.(?:build|image|pod)$)(?:[a-zA-Z0-9][a-zA-Z0-9.-]*(?::[0-9]+)?/)?{_IMAGE_PART}(?:/{_IMAGE_PART})*"
        r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?",
        "is not an image's name",
        f"write it as {DEFAULT_IMAGE}",
    ),
    "idle_seconds": whole_number(0, 7 * 86_400),
    "memory_max": line_of_text(
        WORD_CHARACTERS,
        r"[1-9][0-9]{0,14}[KMGT]?|100%|[1-9][0-9]?%|infinity",
        "is not a size",
        'write "512M" or "2G", or remove the line for the default',
    ),
    "tasks_max": whole_number(16, 65_536),
    "cpu_quota": line_of_text(
        WORD_CHARACTERS,
        r"([1-9][0-9]{0,5}%)?",
        "is not a percentage",
        'write "150%" for one and a half CPUs',
    ),
    "runtime": line_of_text(
        WORD_CHARACTERS,
        r"(krun|runsc)?",
        "is no runtime that is known",
        'write "krun" or "runsc", or remove the line',
    ),
    "mounts": tomltable.tables(
        Mount,
        {"source": _PATH, "target": _PATH, "read_only": true_or_false},
        required=("source", "target"),
        max_count=MOUNTS,
        hint="write [[mounts]] and below it source = …, target = …",
    ),
    "unknown": policy.unknown,
    "policy": tomltable.tables(
        policy.make_rule,
        policy.KEYS,
        required=(),
        max_count=policy.RULES,
        hint="write [[policy]] and below it host = …, or route = …",
    ),
    "budget": parse_budget,
    "guard": parse_privileges,
}


def is_image(name: str) -> bool:
    """Say whether `name` is one that an agent's image can have."""
    try:
        KEYS["image"](name)
    except BadValue:
        return False
    return True
