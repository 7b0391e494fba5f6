"""agents/NAME.toml: what a person configured of one agent."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import tomli_w

from nanoclawd import limits
from nanoclawd.errors import ConfigError, NotFound, Refused
from nanoclawd.files import read_text, write_text
from nanoclawd.ids import AgentName, parse_agent_name

DEFAULT_IMAGE = "localhost/nanoclaw-agent:latest"
MOUNTS = 16  #: [[mounts]] of one agent
PATH_CHARACTERS = 1024


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
    mounts: tuple[Mount, ...] = ()


# --- reading ----------------------------------------------------------------------------------------


def read_agent(path: Path) -> AgentConfig:
    """Return what `path`, an agents/NAME.toml, says.

    Raises NotFound, or ConfigError that names file, line, key and what was found.
    """
    return parse_agent(read_text(path), path)


def parse_agent(text: str, path: Path) -> AgentConfig:
    """Return what `text` says; `path` gives the agent's name and stands in errors. Raises ConfigError."""
    try:
        name = parse_agent_name(path.stem)
    except Refused as exc:
        raise ConfigError(f"{path}: {exc.message}", hint=exc.hint) from None
    table = _parse_toml(text, path)
    values: dict[str, Any] = {}
    for key, value in table.items():
        parse = KEYS.get(key)
        if parse is None:
            raise _error(text, path, key, f"there is no key {_shown(key)}", hint=_did_you_mean(key, KEYS))
        try:
            values[key] = parse(value)
        except _BadMount as exc:
            raise _error(text, path, exc.key, f"mounts: {exc.reason}", hint=exc.hint, nth=exc.nth) from None
        except _BadValue as exc:
            raise _error(text, path, key, f"{key} {exc.reason}: {_shown(value)}", hint=exc.hint) from None
    return AgentConfig(name=name, **values)


def read_agents(directory: Path) -> dict[AgentName, AgentConfig | ConfigError]:
    """Return all agents in `directory` by name, or why one is broken; a broken one harms no other.

    Files whose names are no agent's (an editor's backup, a draft) are not ours and left out.
    """
    found: dict[AgentName, AgentConfig | ConfigError] = {}
    for path in sorted(directory.glob("*.toml")):
        try:
            name = parse_agent_name(path.stem)
        except Refused:
            continue
        try:
            found[name] = read_agent(path)
        except NotFound:  # removed meanwhile, or a symlink to nowhere
            if path.is_symlink():
                found[name] = ConfigError(f"{path}: is a symlink to nowhere")
        except ConfigError as exc:
            found[name] = exc
    return found


def read_instructions(path: Path) -> str:
    """Return the text of NAME.md beside `path`, an agents/NAME.toml; empty if there is none."""
    try:
        return read_text(path.with_suffix(".md"), limits.INSTRUCTIONS_BYTES)
    except NotFound:
        return ""


# --- writing ----------------------------------------------------------------------------------------


def write_agent(path: Path, config: AgentConfig) -> None:
    """Write a new agents/NAME.toml with the keys that are not at their defaults. Raises ConfigError."""
    default = AgentConfig(name=config.name)
    table = {
        field.name: _plain(getattr(config, field.name))
        for field in fields(config)
        if field.name != "name" and getattr(config, field.name) != getattr(default, field.name)
    }
    text = tomli_w.dumps(table)
    parse_agent(text, path)
    write_text(path, text)


def change_agent(path: Path, changes: Mapping[str, Any]) -> AgentConfig:
    """Change keys of agents/NAME.toml and return what it says now; a person's comments and order stay.

    `changes` has keys of AgentConfig (not name) with values of its types. Raises ConfigError, and leaves the
    file, if it was broken before or would be.
    """
    text = read_text(path)
    before = parse_agent(text, path)
    for key, value in changes.items():
        _check(path, key, _plain(value))
    wanted = tomllib.loads(text) | {key: _plain(value) for key, value in changes.items()}
    changed = {
        key: value
        for key, value in wanted.items()
        if key in changes and getattr(before, key, None) != changes[key]
    }
    if not changed:
        return before
    new = text
    for key, value in changed.items():
        tables = key == "mounts" and not re.search(r"^\s*mounts\s*=", new, re.MULTILINE)
        new = _with_tables(new, key, value) if tables else _with_value(new, key, value)
    if _loads_or_none(new) != wanted:  # written in a way that we do not edit: correct values before comments
        new = tomli_w.dumps(wanted)
    config = parse_agent(new, path)
    write_text(path, new)
    return config


def write_instructions(path: Path, text: str) -> None:
    """Write NAME.md beside `path`, an agents/NAME.toml. Raises Refused if it is too large."""
    if len(text.encode()) > limits.INSTRUCTIONS_BYTES:
        raise Refused(f"instructions are larger than {limits.INSTRUCTIONS_BYTES >> 10} KiB")
    write_text(path.with_suffix(".md"), text)


def _check(path: Path, key: str, value: Any) -> None:
    """Raise ConfigError if this is not a key and a value of it, before it is written anywhere."""
    try:
        if key not in KEYS:
            raise _BadValue("is not a key", _did_you_mean(key, KEYS))
        KEYS[key](value)
    except _BadValue as exc:
        raise ConfigError(f"{path}: {key} {exc.reason}: {_shown(value)}", hint=exc.hint) from None


def _plain(value: Any) -> Any:
    """Return a value of AgentConfig as TOML has it."""
    if isinstance(value, tuple | list):
        return [
            {"source": mount.source, "target": mount.target, "read_only": mount.read_only} for mount in value
        ]
    return value


def _with_value(text: str, key: str, value: Any) -> str:
    """Return the TOML text with one top-level key changed in place, or added below the others."""
    assignment = tomli_w.dumps({key: value}).rstrip("\n")
    lines = text.splitlines(keepends=True)
    head = next((i for i, line in enumerate(lines) if line.lstrip().startswith("[")), len(lines))
    for first in range(head):
        if not re.match(rf"""\s*["']?{re.escape(key)}["']?\s*=""", lines[first]):
            continue
        for last in range(first, head):  # a value may go over several lines
            if _loads_or_none("".join(lines[first : last + 1])) is not None:
                comment = _comment("".join(lines[first : last + 1]))
                lines[first : last + 1] = [assignment + comment + "\n"]
                return "".join(lines)
    if head < len(lines):  # above the comment that belongs to the first table, and the empty lines before it
        while head and lines[head - 1].lstrip().startswith("#"):
            head -= 1
        while head and not lines[head - 1].strip():
            head -= 1
    if head and not lines[head - 1].endswith("\n"):
        lines[head - 1] += "\n"
    lines.insert(head, assignment + "\n")
    return "".join(lines)


def _comment(assignment: str) -> str:
    """Return the comment at the end of `key = value  # comment`, with the space before it."""
    for found in re.finditer(r"\s*#", assignment):
        # The first sign that is not within the value: what stands before it is complete.
        if _loads_or_none(assignment[: found.start()]) is not None:
            return assignment[found.start() :].rstrip("\r\n")
    return ""


def _with_tables(text: str, key: str, tables: list[Any]) -> str:
    """Return the TOML text with all [[key]] tables replaced."""
    kept: list[str] = []
    ours = False
    for line in text.splitlines(keepends=True):
        if line.lstrip().startswith("["):
            ours = re.match(rf"\s*\[\[\s*{re.escape(key)}\s*\]\]", line) is not None
        if not ours:
            kept.append(line)
    rest = "".join(kept).rstrip()
    blocks = (f"[[{key}]]\n" + tomli_w.dumps(table) for table in tables)
    return "\n\n".join(part.rstrip() for part in (rest, *blocks) if part) + "\n"


def _loads_or_none(text: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None


# --- values -----------------------------------------------------------------------------------------


class _BadValue(Exception):
    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


class _BadMount(_BadValue):
    def __init__(self, nth: int, key: str, reason: str, hint: str = "") -> None:
        super().__init__(reason, hint)
        self.nth = nth
        self.key = key


def _text(max_characters: int) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if not isinstance(value, str):
            raise _BadValue("must be a string", 'write it in quotes: "…"')
        if len(value) > max_characters:
            raise _BadValue(f"is longer than {max_characters} characters")
        if not value.isprintable():
            raise _BadValue("has a line break or another control character", "use one line of text")
        return value

    return parse


def _pattern(pattern: str, reason: str, hint: str) -> Callable[[Any], str]:
    compiled = re.compile(pattern, re.ASCII)

    def parse(value: Any) -> str:
        text = _text(256)(value)
        if not compiled.fullmatch(text):
            raise _BadValue(reason, hint)
        return text

    return parse


def _integer(lowest: int, highest: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool):  # True is an int to Python
            raise _BadValue("must be a whole number", "write it without quotes")
        if not lowest <= value <= highest:
            raise _BadValue(f"must be from {lowest} to {highest}")
        return value

    return parse


def _mounts(value: Any) -> tuple[Mount, ...]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise _BadValue("must be tables", "write [[mounts]] and below it source = …, target = …")
    if len(value) > MOUNTS:
        raise _BadMount(MOUNTS, "source", f"there are more than {MOUNTS}")
    return tuple(_mount(nth, item) for nth, item in enumerate(value))


def _mount(nth: int, table: dict[str, Any]) -> Mount:
    for key, item in table.items():
        try:
            if key in ("source", "target"):
                _text(PATH_CHARACTERS)(item)
            elif key != "read_only":
                known = ("source", "target", "read_only")
                raise _BadMount(nth, key, f"there is no key {_shown(key)}", _did_you_mean(key, known))
            elif not isinstance(item, bool):
                raise _BadValue("must be true or false", "write it without quotes")
        except _BadMount:
            raise
        except _BadValue as exc:
            raise _BadMount(nth, key, f"{key} {exc.reason}: {_shown(item)}", exc.hint) from None
    for key in ("source", "target"):
        if key not in table:
            raise _BadMount(nth, "[[mounts]]", f"{key} is missing", f'add {key} = "/…"')
    return Mount(**table)


_IMAGE_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
#: One row a key: how its value is checked. Defaults and meaning stand in AgentConfig.
KEYS: dict[str, Callable[[Any], Any]] = {
    "description": _text(200),
    "provider": _pattern(
        r"[a-z][a-z0-9_-]{0,31}", "is not a provider's name", 'write "anthropic" or "echo"'
    ),
    "model": _pattern(r"(?:[A-Za-z0-9][A-Za-z0-9._:/@-]*)?", "is not a model's name", "use the API's name"),
    "image": _pattern(
        # Quadlet takes *.build, *.image and *.pod for units of its own.
        rf"(?!.*\.(?:build|image|pod)$)(?:[a-zA-Z0-9][a-zA-Z0-9.-]*(?::[0-9]+)?/)?{_IMAGE_PART}(?:/{_IMAGE_PART})*"
        r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?",
        "is not an image's name",
        f"write it as {DEFAULT_IMAGE}",
    ),
    "idle_seconds": _integer(0, 7 * 86_400),
    "memory_max": _pattern(
        r"[1-9][0-9]{0,14}[KMGT]?|100%|[1-9][0-9]?%|infinity",
        "is not a size",
        'write "512M" or "2G", or remove the line for the default',
    ),
    "tasks_max": _integer(16, 65_536),
    "cpu_quota": _pattern(
        r"(?:[1-9][0-9]{0,5}%)?", "is not a percentage", 'write "150%" for one and a half CPUs'
    ),
    "mounts": _mounts,
}


# --- errors -----------------------------------------------------------------------------------------


def _parse_toml(text: str, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        reason, _, place = str(exc).rpartition(" (at ")
        line = re.match(r"line ([0-9]+)", place)
        where = f"{path}:{line[1]}" if line else f"{path}:{text.count(chr(10)) + 1}"
        raise ConfigError(f"{where}: {reason or exc}", hint="the format is TOML: key = value") from None
    except (RecursionError, ValueError) as exc:  # nested too deeply; a number of 5,000 digits
        raise ConfigError(f"{path}: cannot be read as TOML: {exc}") from None


def _error(text: str, path: Path, key: str, reason: str, *, hint: str, nth: int = 0) -> ConfigError:
    """Return an error at the line of `key`, in mounts of the `nth` table; tomllib does not tell lines."""
    lines = text.splitlines()
    heads = [number for number, line in enumerate(lines) if re.match(r"\s*\[\[\s*mounts\s*\]\]", line)]
    begin = heads[nth] if nth < len(heads) and key not in KEYS else 0
    pattern = re.compile(
        rf"""\s*["']?{re.escape(key)}["']?\s*(?:=|\.|$)|\s*\[+\s*["']?{re.escape(key)}["']?\s*[\].]"""
    )
    number = next(
        (i + 1 for i in range(begin, len(lines)) if pattern.match(lines[i])), begin + 1 if begin else None
    )
    return ConfigError(f"{path}:{number}: {reason}" if number else f"{path}: {reason}", hint=hint)


def _did_you_mean(key: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"the keys are {', '.join(known)}"


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, str) or not value.isprintable() else f"'{value}'"
    return text if len(text) <= 80 else text[:79] + "…"
