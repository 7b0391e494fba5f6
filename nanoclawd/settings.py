"""Settings of the installation: nanoclaw.toml, read into frozen data.

SETTINGS has one row per key; nanoclaw.toml(5) explains each. A missing file is as good as an empty one; what
is wrong in it is an error that says what to write instead.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nanoclawd import limits, paths, tomltable
from nanoclawd.errors import NotFound, Refused
from nanoclawd.files import read_text
from nanoclawd.ids import CredentialName, parse_credential_name
from nanoclawd.mounts import AllowedMount
from nanoclawd.tomltable import BadValue, line_of_text, true_or_false, whole_number

FILE = "nanoclaw.toml"
MOUNTS = 1000  #: rows of [mounts] allow
PATH_CHARACTERS = 4096
RETENTION_DAYS_MAX = 36_500
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
    idle_exit: int  #: the router leaves after so many seconds without anything to do; 0: never
    attempts: int  #: that a message gets before it is a dead letter
    retention_days: int  #: of what has ended; 0 is for ever
    require_sandbox: bool  #: do not start without a line of the unit's sandbox
    mounts: tuple[AllowedMount, ...]  #: empty: nothing may be mounted
    providers: Mapping[str, Provider]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One key of nanoclaw.toml."""

    key: str  #: with its tables, e.g. "mounts.allow"
    parse: Callable[[Any], Any]  #: from TOML's value; raises BadValue
    default: Any  #: as TOML has it
    example: str  #: a line that may be written there


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
    values = {row.key: row.parse(row.default) for row in SETTINGS}
    values |= tomltable.parse(text, {row.key: row.parse for row in SETTINGS}, name)
    anthropic = Provider(
        name="anthropic",
        endpoint=values["providers.anthropic.endpoint"],
        credential=values["providers.anthropic.credential"],
    )
    return Settings(
        max_sessions=values["max_sessions"],
        idle_exit=values["idle_exit"],
        attempts=values["attempts"],
        retention_days=values["retention_days"],
        require_sandbox=values["require_sandbox"],
        mounts=values["mounts.allow"],
        providers={anthropic.name: anthropic},
    )


def _mount_path(value: Any) -> Path:
    text = line_of_text(PATH_CHARACTERS)(value)
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise BadValue("names a user that is unknown", "write the path out") from None
    if not path.is_absolute() or ".." in path.parts:
        raise BadValue("must begin with / or ~/ and have no '..'", 'write e.g. path = "~/src"')
    return path


def _endpoint(value: Any) -> Endpoint:
    text = line_of_text(PATH_CHARACTERS)(value)
    if "@" in text:
        hint = "keys come from 'nanoclawctl secret set'"
        raise BadValue("must not hold a user or a password", hint, secret=True)
    hint = 'write e.g. endpoint = "https://api.anthropic.com", or remove it for the default'
    if "?" in text or "#" in text:
        raise BadValue("must not have a query or a fragment", hint, secret=True)
    try:
        url = urlsplit(text)
        host, port = url.hostname or "", url.port
    except ValueError as exc:
        raise BadValue(f"must be a URL ({exc})", hint) from None
    if url.scheme not in ("https", "http"):
        raise BadValue("must begin with https://", hint)
    try:
        address = None if "%" in host else ipaddress.ip_address(host)
    except ValueError:
        address = None
    tls, path = url.scheme == "https", url.path.rstrip("/")
    if not (address or _HOST.fullmatch(host)) or not _BASE_PATH.fullmatch(path) or port == 0:
        raise BadValue("must be https://HOST[:PORT][/PATH]", hint)
    if not tls and host != "localhost" and not (address and address.is_loopback):
        raise BadValue("must begin with https://; http:// is for this host only", hint)
    return Endpoint(tls=tls, host=host, port=port or (443 if tls else 80), path=path)


def _credential(value: Any) -> CredentialName:
    try:
        return parse_credential_name(line_of_text(PATH_CHARACTERS)(value))
    except Refused as exc:
        raise BadValue("is not a name for a credential", exc.hint) from None


SETTINGS = (
    Setting(
        key="max_sessions",
        parse=whole_number(1, limits.FDSTORE // 2),
        default=limits.SESSIONS,
        example=f"max_sessions = {limits.SESSIONS}",
    ),
    Setting(
        key="attempts",
        parse=whole_number(1, 100),
        default=limits.ATTEMPTS,
        example=f"attempts = {limits.ATTEMPTS}",
    ),
    Setting(
        key="retention_days",
        parse=whole_number(0, RETENTION_DAYS_MAX),
        default=limits.RETENTION_DAYS,
        example=f"retention_days = {limits.RETENTION_DAYS}",
    ),
    Setting(
        key="require_sandbox",
        parse=true_or_false,
        default=False,
        example="require_sandbox = true",
    ),
    Setting(
        key="idle_exit",
        parse=whole_number(0, limits.IDLE_EXIT_MAX_S),
        default=0,
        example="idle_exit = 600",
    ),
    Setting(
        key="mounts.allow",
        parse=tomltable.tables(
            AllowedMount,
            {"path": _mount_path, "read_only": true_or_false},
            required=("path",),
            max_count=MOUNTS,
            hint='write allow = [ {path = "~/src", read_only = true} ]',
        ),
        default=[],
        example='allow = [ {path = "~/src", read_only = true} ]',
    ),
    Setting(
        key="providers.anthropic.endpoint",
        parse=_endpoint,
        default="https://api.anthropic.com",
        example='endpoint = "https://api.anthropic.com"',
    ),
    Setting(
        key="providers.anthropic.credential",
        parse=_credential,
        default="anthropic",
        example='credential = "anthropic"',
    ),
)
