"""agents/NAME.toml: what a person configured of one agent."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import tomli_w

from nanoclawd import limits, tomledit
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

    Files whose names are no agent's are left out, see misnamed_files(). Raises ConfigError if the directory
    cannot be read.
    """
    found: dict[AgentName, AgentConfig | ConfigError] = {}
    for path in _toml_files(directory):
        try:
            name = parse_agent_name(path.stem)
        except Refused:
            continue
        try:
            found[name] = read_agent(path)
        except NotFound:  # removed meanwhile, or a symlink to nowhere
            if path.is_symlink():
                hint = f"'namei {path}' shows where it leads"
                found[name] = ConfigError(f"{path}: is a symlink to nowhere", hint=hint)
        except ConfigError as exc:
            found[name] = exc
    return found


def misnamed_files(directory: Path) -> list[ConfigError]:
    """Return what is wrong with files that look like agents and have a name that none can have."""
    found = []
    for path in _toml_files(directory):
        try:
            parse_agent_name(path.stem)
        except Refused as exc:
            found.append(ConfigError(f"{path}: {exc.message}", hint=exc.hint))
    return found


def _toml_files(directory: Path) -> list[Path]:
    """Return the visible *.toml in `directory`. Raises ConfigError if that cannot be told."""
    try:
        # Not glob(), which takes what it may not read for empty: then all agents would be gone.
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise ConfigError(
            f"{directory}: cannot be read: {exc.strerror}", hint=f"run: chmod u+rwx {directory}"
        ) from None
    return [directory / name for name in names if name.endswith(".toml") and not name.startswith(".")]


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
    changed = {key: _plain(value) for key, value in changes.items() if getattr(before, key) != value}
    if not changed:
        return before
    new = tomledit.change(text, changed)
    config = parse_agent(new, path)
    write_text(path, new)
    return config


def write_instructions(path: Path, text: str) -> None:
    """Write NAME.md beside `path`, an agents/NAME.toml. Raises Refused if it is too large or no text."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise Refused("instructions are not valid Unicode") from None
    if size > limits.INSTRUCTIONS_BYTES:
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


def is_image(name: str) -> bool:
    """Say whether `name` is one that an agent's image can have."""
    try:
        KEYS["image"](name)
    except _BadValue:
        return False
    return True


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
