"""Settings of the installation: nanoclaw.toml, read into frozen data.

SETTINGS has one row per key: it makes the parser, the default, the error text and the manual's table. A
missing file is as good as an empty one; what is wrong in it is an error that says what to write instead.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nanoclawd import limits, paths
from nanoclawd.errors import ConfigError, NotFound, Refused
from nanoclawd.files import read_text
from nanoclawd.ids import CredentialName, parse_credential_name
from nanoclawd.mounts import AllowedMount

FILE = "nanoclaw.toml"
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", re.ASCII)
_BASE_PATH = re.compile(r"(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """Where a provider is reached. Equal endpoints share connections."""

    tls: bool
    host: str  #: a name or an address, without brackets
    port: int
    path: str  #: "" or "/prefix", put before every path

    @property
    def authority(self) -> str:
        """The value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.authority}{self.path}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Provider:
    """One model API that the gateway forwards to."""

    name: str  #: also the first part of the path that agents use
    endpoint: Endpoint
    credential: CredentialName  #: as given to 'nanoclawctl secret set'


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """All of nanoclaw.toml."""

    max_sessions: int  #: agent containers at once
    mounts: tuple[AllowedMount, ...]  #: empty: nothing may be mounted
    providers: Mapping[str, Provider]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One key of nanoclaw.toml."""

    key: str  #: with its tables, e.g. "mounts.allow"
    parse: Callable[[Any], Any]  #: from TOML's value; raises ValueError with "must be …"
    default: Any  #: as TOML has it
    example: str  #: a line that may be written there
    help: str


def read_settings(path: Path | None = None) -> Settings:
    """Return what the file `path` says, by default nanoclaw.toml. Raises ConfigError."""
    path = path or paths.config() / FILE
    try:
        text = read_text(path)
    except NotFound:
        text = ""
    return parse_settings(text, str(path))


def parse_settings(text: str, name: str = FILE) -> Settings:
    """Return the settings in `text`; `name` stands in errors. Raises ConfigError."""
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as exc:  # ValueError: of a number of 5,000 digits, too
        raise ConfigError(
            f"{name}: is not TOML: {exc}", hint="see https://toml.io, or remove the line"
        ) from exc
    given = _flatten(document, "", text, name)
    values = {row.key: row.parse(row.default) for row in SETTINGS}
    for row in SETTINGS:
        if row.key not in given:
            continue
        try:
            values[row.key] = row.parse(given[row.key])
        except ValueError as exc:
            raise ConfigError(
                f"{_place(text, name, row.key)}: {row.key}= {exc}",
                hint=f"write e.g. {row.example}, or remove it for the default",
            ) from exc
    anthropic = Provider(
        name="anthropic",
        endpoint=values["providers.anthropic.endpoint"],
        credential=values["providers.anthropic.credential"],
    )
    return Settings(
        max_sessions=values["max_sessions"],
        mounts=values["mounts.allow"],
        providers={anthropic.name: anthropic},
    )


def _flatten(table: Mapping[str, Any], prefix: str, text: str, name: str) -> dict[str, Any]:
    """Return values by dotted key. Raises ConfigError for a key that no row knows."""
    keys = [row.key for row in SETTINGS]
    found: dict[str, Any] = {}
    for part, value in table.items():
        key = f"{prefix}{part}"
        if key in keys:
            found[key] = value
        elif any(known.startswith(f"{key}.") for known in keys):
            if not isinstance(value, dict):
                raise ConfigError(f"{_place(text, name, key)}: {key} must be a table, not {_kind(value)}")
            found |= _flatten(value, f"{key}.", text, name)
        else:
            near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
            raise ConfigError(
                f"{_place(text, name, key)}: there is no setting {key!r}",
                hint=f"did you mean {near[0]!r}?" if near else f"there are {', '.join(keys)}",
            )
    return found


def _place(text: str, name: str, key: str) -> str:
    """Return "file:line" of `key` as far as a look at the lines can tell, else "file"."""
    table, _, last = key.rpartition(".")
    here = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[+\s*([^\]]+?)\s*\]", line):
            here = header[1]
            if here == key or here.startswith(f"{key}."):
                return f"{name}:{number}"
        elif found := re.match(r"""\s*["']?([\w.-]+)["']?\s*=""", line):
            full = f"{here}.{found[1]}" if here else found[1]
            if full == key or (here == table and found[1] == last):
                return f"{name}:{number}"
    return name


def _kind(value: Any) -> str:
    """Return what TOML calls the type of `value`, and a short value itself."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return repr(value[:80])
        case int() | float():
            return str(value)[:80]
        case list():
            return "an array"
        case dict():
            return "a table"
    return "a date or time"


def _session_count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limits.FDSTORE // 2:
        raise ValueError(f"must be an integer from 1 to {limits.FDSTORE // 2}, not {_kind(value)}")
    return value


def _mount_rules(value: Any) -> tuple[AllowedMount, ...]:
    if not isinstance(value, list):
        raise ValueError(f"must be an array of tables, not {_kind(value)}")
    return tuple(_mount_rule(item) for item in value)


def _mount_rule(value: Any) -> AllowedMount:
    if not isinstance(value, dict):
        raise ValueError(f"must hold tables, not {_kind(value)}")
    if unknown := set(value) - {"path", "read_only"}:
        raise ValueError(f"must have only path and read_only, not {sorted(unknown)[0]!r}")
    path, read_only = value.get("path"), value.get("read_only", True)
    if not isinstance(path, str) or not path or "\0" in path:
        raise ValueError("must have a path in each table")
    if not isinstance(read_only, bool):
        raise ValueError(f"must have read_only as true or false, not {_kind(read_only)}")
    try:
        expanded = Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"must not name a user that is unknown: {path!r}") from None
    if not expanded.is_absolute() or ".." in expanded.parts:
        raise ValueError(f"must have paths that begin with / or ~/ and have no '..', not {path!r}")
    return AllowedMount(path=expanded, read_only=read_only)


def _endpoint(value: Any) -> Endpoint:
    if not isinstance(value, str):
        raise ValueError(f"must be a URL in quotes, not {_kind(value)}")
    try:
        url = urlsplit(value)
        host, port = url.hostname or "", url.port
    except ValueError as exc:
        raise ValueError(f"must be a URL, not {value[:80]!r}: {exc}") from None
    if url.scheme not in ("https", "http"):
        raise ValueError(f"must begin with https://, not {value[:80]!r}")
    if "@" in url.netloc:
        raise ValueError("must not hold a user or a password; keys come from 'nanoclawctl secret set'")
    if "?" in value or "#" in value:
        raise ValueError("must not have a query or a fragment")
    path = url.path.rstrip("/")
    if not (_is_address(host) or _HOST.fullmatch(host)) or not _BASE_PATH.fullmatch(path) or port == 0:
        raise ValueError(f"must be https://HOST[:PORT][/PATH], not {value[:80]!r}")
    if url.scheme == "http" and not _is_loopback(host):
        raise ValueError("must begin with https://; http:// is for this host only")
    tls = url.scheme == "https"
    return Endpoint(tls=tls, host=host, port=port or (443 if tls else 80), path=path)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return "%" not in host


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _credential(value: Any) -> CredentialName:
    if not isinstance(value, str):
        raise ValueError(f"must be a name in quotes, not {_kind(value)}")
    try:
        return parse_credential_name(value)
    except Refused as exc:
        raise ValueError(f"must be a credential's name: {exc}") from exc


SETTINGS = (
    Setting(
        key="max_sessions",
        parse=_session_count,
        default=limits.SESSIONS,
        example=f"max_sessions = {limits.SESSIONS}",
        help="Agent containers that run at once; further sessions wait.",
    ),
    Setting(
        key="mounts.allow",
        parse=_mount_rules,
        default=[],
        example='allow = [ {path = "~/src", read_only = true} ]',
        help="What may be mounted into agents: these paths and what is below them. Empty: nothing.",
    ),
    Setting(
        key="providers.anthropic.endpoint",
        parse=_endpoint,
        default="https://api.anthropic.com",
        example='endpoint = "https://api.anthropic.com"',
        help="Where the Messages API is. http:// is for this host only.",
    ),
    Setting(
        key="providers.anthropic.credential",
        parse=_credential,
        default="anthropic",
        example='credential = "anthropic"',
        help="Name of the API key, as given to 'nanoclawctl secret set'.",
    ),
)
