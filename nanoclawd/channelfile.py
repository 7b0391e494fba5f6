"""channels/NAME.toml: what a person configured of one channel."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from nanoclawd import paths, tomltable
from nanoclawd.errors import ConfigError, Refused
from nanoclawd.files import read_all, read_text, write_text
from nanoclawd.ids import ChannelName, CredentialName, parse_channel_name
from nanoclawd.tomltable import BadValue, line_of_text

KIND = line_of_text(
    32,
    r"(?!kind$)[a-z][a-z0-9_]{0,31}",
    "is not a kind of channel",
    'write the name of its adapter, e.g. "matrix"',
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelConfig:
    """One channel's TOML file."""

    name: ChannelName  #: the file's name without .toml
    kind: str  #: names the adapter's program
    settings: Mapping[str, Any]  #: the table named as the kind, for the adapter alone


def parse_channel(text: str, path: Path) -> ChannelConfig:
    """Return what `text` says; `path` gives the channel's name and stands in errors. Raises ConfigError."""
    table = tomltable.load(text, str(path))
    if "kind" not in table:
        raise ConfigError(f"{path}: kind is missing", hint='write e.g. kind = "matrix"')
    # Which table there may be follows from the kind; is that none, the row of `kind` says so.
    rows = {str(table["kind"]): _settings, "kind": KIND}
    values = tomltable.check(table, rows, str(path), text)
    kind = values["kind"]
    return ChannelConfig(name=_name_of(path), kind=kind, settings=values.get(kind, {}))


def write_channel(path: Path, kind: str, settings: Mapping[str, Any]) -> None:
    """Write a new channels/NAME.toml. Raises ConfigError, Failed."""
    try:
        text = tomli_w.dumps({"kind": kind, **({kind: settings} if settings else {})})
    except TypeError:  # null, which TOML has not
        raise ConfigError(f"{path}: a setting has no value", hint='write it as KEY=""') from None
    parse_channel(text, path)
    write_text(path, text)


def find_program(kind: str) -> Path:
    """Return the adapter's program: the person's own if there is one, else ours. Raises ConfigError."""
    for home in _homes():
        program = home / kind / "adapter"
        if os.access(program, os.X_OK):
            return program
    known = kinds()
    hint = f"there are {', '.join(known)}" if known else f"put it at '{_homes()[0] / kind / 'adapter'}'"
    raise ConfigError(f"there is no adapter of the kind '{kind}'", hint=hint)


def kinds() -> list[str]:
    """Return which kinds of channels there can be."""
    return sorted({path.parent.name for home in _homes() for path in home.glob("*/adapter")})


def _homes() -> tuple[Path, Path]:
    return paths.data() / "channels", paths.SHARE / "channels"


def credential_of(name: ChannelName) -> CredentialName:
    """Return the name of the credential with which a channel's adapter logs in."""
    return CredentialName(f"channel-{name}")


def read_channels(
    directory: Path,
) -> tuple[dict[ChannelName, ChannelConfig | ConfigError], list[ConfigError]]:
    """Return all channels in `directory`, as read_all() does."""
    return read_all(directory, _name_of, lambda path: parse_channel(read_text(path), path))


def _name_of(path: Path) -> ChannelName:
    try:
        return parse_channel_name(path.stem)
    except Refused as exc:
        raise ConfigError(f"{path}: {exc.message}", hint=exc.hint) from None


def _settings(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadValue("must be a table", "write the kind's name as [KIND], and its settings below")
    return value
