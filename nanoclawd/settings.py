"""Settings of the installation: nanoclaw.toml, read into frozen data.

SETTINGS has one row per key; nanoclaw.toml(5) explains each. A missing file is as good as an empty one; what
is wrong in it is an error that says what to write instead.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nanoclawd import limits, paths, policy, routes, tomltable
from nanoclawd.budget import Budget, parse_budget
from nanoclawd.errors import ConfigError, NotFound, Refused
from nanoclawd.files import read_text
from nanoclawd.ids import CredentialName, parse_credential_name
from nanoclawd.mounts import AllowedMount
from nanoclawd.prices import Price, Prices, parse_prices
from nanoclawd.privileges import Privileges, parse_privileges
from nanoclawd.routes import Endpoint, Route, Scheme, UsageShape
from nanoclawd.tomltable import BadValue, line_of_text, true_or_false, whole_number

FILE = "nanoclaw.toml"
MOUNTS = 1000  #: rows of [mounts] allow
ROUTES = 100
PATH_CHARACTERS = 4096
RETENTION_DAYS_MAX = 36_500
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", re.ASCII)
_BASE_PATH = re.compile(r"(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """All of nanoclaw.toml."""

    max_sessions: int  #: agent containers at once
    idle_exit: int  #: the router leaves after so many seconds without anything to do; 0: never
    attempts: int  #: that a message gets before it is a dead letter
    retention_days: int  #: of what has ended; 0 is for ever
    session_days: int  #: after so many without a message a session is closed; 0: never
    audit_days: int  #: of the audit trail; 0 is for ever
    usage_days: int  #: that usage is kept by the day; 0 is for ever
    ask_seconds: int  #: that a request waits for a person's answer
    require_sandbox: bool  #: do not start without a line of the unit's sandbox
    mounts: tuple[AllowedMount, ...]  #: empty: nothing may be mounted
    routes: Mapping[str, Route]  #: by name; those of providers too
    budget: Budget  #: of each agent whose file says nothing else
    guard: Privileges  #: the same
    prices: Prices


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
    values = {key: make(default) for key, (make, default) in SETTINGS.items()}
    values |= tomltable.parse(text, {key: make for key, (make, _) in SETTINGS.items()}, name)
    anthropic = routes.anthropic(
        values.pop("providers.anthropic.endpoint"), values.pop("providers.anthropic.credential")
    )
    configured = values.pop("routes")
    by_name = {route.name: route for route in (*configured, anthropic)}
    if len(by_name) <= len(configured):
        raise ConfigError(
            f"{name}: two routes have the same name", hint="each of [[routes]] has one of its own"
        )
    prices = Prices(_default_prices() | values.pop("prices"))
    return Settings(mounts=values.pop("mounts.allow"), routes=by_name, prices=prices, **values)


@functools.cache
def _default_prices() -> dict[str, Price]:
    text = read_text(paths.PRICES)
    prices: dict[str, Price] = tomltable.parse(text, {"prices": parse_prices}, str(paths.PRICES))["prices"]
    return prices


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
        raise BadValue("is not a name for a credential", exc.hint, secret=True) from None


_HEADER = line_of_text(
    64, r"[A-Za-z][A-Za-z0-9-]*", "is not a header's name", 'write e.g. header = "Authorization"'
)
#: What frames a message or names its receiver is ours alone.
_FRAMING = ("connection", "content-length", "host", "te", "trailer", "transfer-encoding", "upgrade")


def _route_name(value: Any) -> str:
    if (name := policy.ROUTE_NAME(value)) in ("anthropic", "r"):
        raise BadValue("is taken", "choose another name; a provider is configured under [providers]")
    return name


def _header(value: Any) -> str:
    if (name := _HEADER(value).lower()) in _FRAMING:
        raise BadValue("is a header that only the gateway sets", 'write e.g. header = "Authorization"')
    return name


def _headers(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise BadValue("must be a list of headers", 'write e.g. headers = ["Notion-Version"]')
    return tuple(map(_header, value))


def _scheme(value: Any) -> Scheme:
    try:
        return Scheme(value)
    except ValueError:
        raise BadValue("must be bearer, basic or plain", 'write e.g. scheme = "basic"') from None


def _usage(value: Any) -> UsageShape:
    try:
        return UsageShape(value)
    except ValueError:
        raise BadValue("must be anthropic or openai", 'write e.g. usage = "openai"') from None


#: One row a key, with its tables: what makes its value, or raises BadValue; its default, as TOML has it.
SETTINGS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "max_sessions": (whole_number(1, (limits.FDSTORE - limits.CHANNELS) // 2), limits.SESSIONS),
    "attempts": (whole_number(1, 100), limits.ATTEMPTS),
    "retention_days": (whole_number(0, RETENTION_DAYS_MAX), limits.RETENTION_DAYS),
    "session_days": (whole_number(0, RETENTION_DAYS_MAX), 0),
    "audit_days": (whole_number(0, RETENTION_DAYS_MAX), limits.AUDIT_DAYS),
    "usage_days": (whole_number(0, RETENTION_DAYS_MAX), limits.USAGE_DAYS),
    "ask_seconds": (whole_number(1, limits.ASK_MAX_S), limits.ASK_S),
    "require_sandbox": (true_or_false, False),
    "idle_exit": (whole_number(0, limits.IDLE_EXIT_MAX_S), 0),
    "mounts.allow": (
        tomltable.tables(
            AllowedMount,
            {"path": _mount_path, "read_only": true_or_false},
            required=("path",),
            max_count=MOUNTS,
            hint='write allow = [ {path = "~/src", read_only = true} ]',
        ),
        [],
    ),
    "providers.anthropic.endpoint": (_endpoint, "https://api.anthropic.com"),
    "providers.anthropic.credential": (_credential, "anthropic"),
    "routes": (
        tomltable.tables(
            routes.configured,
            {
                "name": _route_name,
                "endpoint": _endpoint,
                "credential": _credential,
                "header": _header,
                "scheme": _scheme,
                "methods": policy.methods,
                "headers": _headers,
                "usage": _usage,
            },
            required=("name", "endpoint"),
            max_count=ROUTES,
            hint="write [[routes]] and below it name = …, endpoint = …",
        ),
        [],
    ),
    "budget": (parse_budget, {}),
    "guard": (parse_privileges, {}),
    "prices": (parse_prices, {}),
}
