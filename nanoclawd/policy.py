"""What an agent may reach: the rules of its TOML, and which of them decides about a request. Pure.

No rule, no answer: whatever no rule allows is denied, and the first rule that matches decides.
"""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, NamedTuple
from urllib.parse import unquote

from nanoclawd.tomltable import BadValue, Rows, line_of_text, true_or_false, whole_number
from nanoclawd.wire import Json

RULES = 200  #: of one agent
#: TRACE would show an agent what was added to its request; CONNECT is a tunnel.
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
TARGET_CHARACTERS = 8192
HTTP_PORT = 80

_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
#: The last label begins with a letter: "127.1" and "0x7f.1" are addresses to some, and a name to nobody.
_NAME = re.compile(rf"(?=.{{1,253}}\Z)(?:{_LABEL}\.)*(?=[a-z]){_LABEL}", re.ASCII)
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(?::([0-9]{1,5}))?", re.ASCII)
_ABSOLUTE = re.compile(r"http://([^/?]*)(/[^?]*)?(\?.*)?", re.ASCII | re.IGNORECASE)
_ROUTE = re.compile(r"/(?:r/)?([a-z][a-z0-9-]{0,31})((?:/[^?]*)?)(\?.*)?", re.ASCII)
_PATH = re.compile(r"(?:/(?:[A-Za-z0-9._~!$&'()*+,=:@-]|%[0-9A-Fa-f]{2})*)*", re.ASCII)
#: Encoded dots, slashes, backslashes, percent signs and control characters: what one server decodes, and the
#: next one decodes again or not at all.
_HIDDEN = re.compile(r"%(?:2[EF5]|5C|[01].|7F)", re.IGNORECASE)


class Denied(Exception):
    """A request that is not for us to carry out: `status` of HTTP, `reason` in a word for the journal."""

    def __init__(self, status: int, reason: str, message: str, *headers: tuple[str, str]) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.headers = headers


class Way(StrEnum):
    """How a request comes to the gateway, and so what the gateway can see of it."""

    ROUTE = "route"  #: to /NAME/… or /r/NAME/…: the gateway itself asks the route's endpoint
    TUNNEL = "tunnel"  #: by CONNECT: host and port are seen, nothing else
    PLAIN = "plain"  #: for http://…, as to any proxy


class Unknown(StrEnum):
    """What becomes of a request for a host about which no rule decides."""

    DENY = "deny"
    ASK = "ask"  #: it waits for a person's answer


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One row of [[policy]]. It names a host or a route; what it does not say does not matter to it."""

    host: str = ""  #: a name, "*." and a name for all below it, or an address
    port: int = 443
    route: str = ""  #: a provider, or one of [[routes]] in nanoclaw.toml
    methods: tuple[str, ...] = ()  #: empty: each
    path: str = ""  #: this and all below; without percent-encoding; empty: each
    deny: bool = False
    addresses: tuple[str, ...] = ()  #: networks that the host may be in, although they are not public
    max_up_bytes: int = 32 << 20  #: of one request or tunnel, from the agent
    max_down_bytes: int = 1 << 30  #: of one, to the agent
    per_minute: int = 600  #: requests and tunnels of one agent
    timeout_seconds: int = 3600  #: for a whole request or tunnel
    until: float = 0.0  #: seconds since 1970; 0: for ever. Only an answer to a request has it, no file

    @property
    def is_narrow(self) -> bool:
        """Whether it asks for more than a tunnel shows."""
        return bool(self.methods or self.path)

    @property
    def networks(self) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
        """The addresses that it allows by name."""
        named = [*self.addresses, self.host] if _address(self.host) else self.addresses
        return [ipaddress.ip_network(network) for network in named]

    @property
    def seconds_left(self) -> float:
        """How long what it allows may take from now on."""
        return min(self.timeout_seconds, self.until - time.time()) if self.until else self.timeout_seconds

    @property
    def match(self) -> tuple[object, ...]:
        """What it is about: of two rules with the same, the second never decides."""
        return self.host, self.host and self.port, self.route, frozenset(self.methods), self.path

    def matches(self, ask: Ask) -> bool:
        """Say whether it decides about `ask`. Of a tunnel nobody knows method and path."""
        if self.route != ask.route or (self.until and self.until <= time.time()):
            return False
        if not self.route:
            below = self.host.startswith("*.") and ask.host.endswith(self.host[1:])
            if not (ask.host == self.host or below) or ask.port != self.port:
                return False
        if ask.way is Way.TUNNEL:
            return True
        head = self.path if self.path.endswith("/") else f"{self.path}/"
        return (not self.methods or ask.method in self.methods) and (
            not self.path or ask.path == self.path or ask.path.startswith(head)
        )

    def __str__(self) -> str:
        what = f"/r/{self.route}" if self.route else authority(self.host, self.port)
        until = time.strftime("until %Y-%m-%d %H:%M UTC", time.gmtime(self.until)) if self.until else ""
        words = ("deny" if self.deny else "allow", what, ",".join(self.methods), self.path, until)
        return " ".join(filter(None, words))


Rules = tuple[Rule, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """All that decides about an agent's requests. By default nothing is allowed."""

    rules: Rules = ()
    unknown: Unknown = Unknown.DENY


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """What an agent asks for, in its one spelling."""

    way: Way
    method: str
    host: str = ""  #: in lower case; an address as Python writes it
    port: int = 0
    route: str = ""
    path: str = ""  #: decoded, for comparisons; below the route
    target: str = ""  #: path and query as they came, to be sent on


class Decision(NamedTuple):
    """What became of an Ask, and why: the one thing that whoever keeps the gate has to look at."""

    allowed: bool
    number: int  #: of the rule that decided, from 1 on; 0: none did
    rule: Rule | None
    reason: str  #: allowed, denied, no-rule, needs-route; ask: a person is; approved: one has said yes
    message: str  #: the same for people


def decide(rules: Sequence[Rule], ask: Ask, unknown: Unknown = Unknown.DENY) -> Decision:
    """Return which of `rules` decides about `ask`, and how; `unknown`: if none does."""
    what = f"the route {ask.route}" if ask.route else authority(ask.host, ask.port)
    for number, rule in enumerate(rules, 1):
        if not rule.matches(ask):
            continue
        named = f"rule {number} of the agent's policy ({rule})"
        if ask.way is Way.TUNNEL and rule.is_narrow:
            # Also of one that denies: what it is about could be asked for within the tunnel.
            message = (
                f"{named} is about methods or paths, which cannot be seen in a tunnel: "
                "only a route serves it (/r/NAME/… of the gateway, see [[routes]] in nanoclaw.toml)."
            )
            return Decision(False, number, rule, "needs-route", message)
        if rule.deny:
            return Decision(False, number, rule, "denied", f"{named} denies {what}.")
        return Decision(True, number, rule, "allowed", f"{named} allows {what}.")
    if rules and unknown is Unknown.ASK and ask.host and _may_be_asked_for(ask.host):
        message = f"No rule decides about {ask.method} {what}{ask.path}: a person is asked."
        return Decision(False, 0, None, "ask", message)
    why = f"no rule allows {ask.method} {what}{ask.path}" if rules else "the policy is empty or unreadable"
    return Decision(False, 0, None, "no-rule", f"The agent's policy denies this: {why}.")


def _may_be_asked_for(host: str) -> bool:
    """Say whether a person can allow it with one word: what is not public has to be named in a rule."""
    address = _address(host)
    return address is None or address.is_global


def with_rule(rules: Rules, rule: Rule, *, last: bool = False) -> Rules:
    """Return `rules` and one more, which takes the place of one with the same match.

    One that denies comes first, so that it does; one that allows comes last, so that those still do. `last`:
    this one in any case.
    """
    same = next((old for old in rules if old.match == rule.match), None)
    if same is not None and same.deny == rule.deny:
        return tuple(rule if old is same else old for old in rules)
    others = tuple(old for old in rules if old.match != rule.match)
    return (rule, *others) if rule.deny and not last else (*others, rule)


# --- requests ---------------------------------------------------------------------------------------


def parse_ask(method: str, target: str) -> Ask:
    """Return what a request line asks for. Raises Denied if it has any other form than its plainest.

    Nothing is repaired: what would have to be normalised could be read otherwise further on.
    """
    if len(target) > TARGET_CHARACTERS:
        raise Denied(414, "target-too-long", f"The target is longer than {TARGET_CHARACTERS} characters.")
    if method == "CONNECT":
        host, port = parse_authority(target, None)
        return Ask(way=Way.TUNNEL, method=method, host=host, port=port)
    if method not in METHODS:
        raise Denied(
            405, "method", f"The gateway knows {', '.join(METHODS)}.", ("allow", ", ".join(METHODS))
        )
    if found := _ABSOLUTE.fullmatch(target):
        host, port = parse_authority(found[1], HTTP_PORT)
        path = found[2] or "/"
        return Ask(
            way=Way.PLAIN,
            method=method,
            host=host,
            port=port,
            path=_parse_path(path),
            target=path + _check_query(found[3]),
        )
    if target.lower().startswith("https:"):
        raise Denied(400, "target", "Ask for https:// by CONNECT, or through a route.")
    if found := _ROUTE.fullmatch(target):
        path = _parse_path(found[2])
        sent = found[2] + _check_query(found[3])
        return Ask(way=Way.ROUTE, method=method, route=found[1], path=path, target=sent)
    message = "The target must be /NAME/… or /r/NAME/… of a route, http://HOST/…, or HOST:PORT for CONNECT."
    raise Denied(400, "target", message)


def parse_url(method: str, url: str) -> Ask:
    """Return the Ask for a URL as a person writes it: https:// is a tunnel. Raises Denied."""
    if not url.lower().startswith("https://"):
        return parse_ask(method, url)
    rest = re.split("[/?#]", url[8:], maxsplit=1)[0]
    host, port = parse_authority(rest, 443)
    return Ask(way=Way.TUNNEL, method=method, host=host, port=port)


def unknown(value: Any) -> Unknown:
    """Read what becomes of unknown hosts. Raises BadValue."""
    if value not in tuple(Unknown):
        raise BadValue("must be deny or ask", 'write unknown = "ask" to be asked about each unknown host')
    return Unknown(value)


def authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_host(text: str) -> str:
    """Return a host's name or address in its one spelling. Raises ValueError."""
    if address := _address(text.removeprefix("[").removesuffix("]")):
        return str(address)
    name = text.lower()
    if not _NAME.fullmatch(name):
        raise ValueError(text)
    return name


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def parse_authority(text: str, default_port: int | None) -> tuple[str, int]:
    """Return host and port of HOST:PORT. Raises Denied."""
    found = _AUTHORITY.fullmatch(text)
    try:
        if found is None:
            raise ValueError(text)
        port = int(found[2] or default_port or 0)
        if not 0 < port < 1 << 16:
            raise ValueError(text)
        return parse_host(found[1]), port
    except ValueError:
        message = "The host must be a plain name or an address, with a port: no user, no final dot."
        raise Denied(400, "host", message) from None


def _parse_path(path: str) -> str:
    """Return a path decoded. Raises Denied if there is more than one way to read it."""
    try:
        if not _PATH.fullmatch(path) or _HIDDEN.search(path):
            raise ValueError(path)
        decoded = unquote(path, errors="strict")  # what is no UTF-8 may be a dot in two bytes
        if any(part in ("", ".", "..") for part in decoded.split("/")[1:-1]) or decoded.endswith(
            ("/.", "/..", "//")
        ):
            raise ValueError(path)
    except ValueError:
        message = "The path must be plain: no '..' or '//', nothing encoded that could hide one."
        raise Denied(400, "path", message) from None
    return decoded


def _check_query(query: str | None) -> str:
    if query and not re.fullmatch(r"[!-\"$-~]*", query):
        raise Denied(400, "query", "The query must be printable ASCII, and without '#'.")
    return query or ""


# --- files and messages -----------------------------------------------------------------------------


def _one_host(value: Any) -> str:
    text = line_of_text(260)(value)
    try:
        star = "*." if text.startswith("*.") else ""
        host = parse_host(text.removeprefix(star))
        if star and _address(host):
            raise ValueError(text)
    except ValueError:
        hint = 'write host = "pypi.org", "*.example.com" or an address; port and path have keys of their own'
        raise BadValue("is not a host", hint) from None
    return star + host


def methods(value: Any) -> tuple[str, ...]:
    """Read a list of methods. Raises BadValue."""
    if not isinstance(value, list) or not value or any(method not in METHODS for method in value):
        raise BadValue(f"must be a list of {', '.join(METHODS)}", 'write e.g. methods = ["GET", "HEAD"]')
    return tuple(dict.fromkeys(value))


def _path(value: Any) -> str:
    text = line_of_text(1024, r"/.*", "must begin with /", 'write e.g. path = "/simple/"')(value)
    if re.search(r"//|%|\\|[?#]|/\.\.?(/|\Z)", text):
        raise BadValue("must be a plain path", "write it without percent-encoding, '//', '..' and query")
    return text


def _networks(value: Any) -> tuple[str, ...]:
    try:
        if not isinstance(value, list) or len(value) > RULES or not all(isinstance(v, str) for v in value):
            raise ValueError(value)
        return tuple(str(ipaddress.ip_network(network)) for network in value)
    except ValueError:
        hint = 'write e.g. addresses = ["192.168.1.0/24"]'
        raise BadValue("must be a list of addresses or networks", hint) from None


ROUTE_NAME = line_of_text(32, r"[a-z][a-z0-9-]*", "is not a route's name", "use a-z, 0-9 and -")
#: One row a key of [[policy]].
KEYS: Rows = {
    "host": _one_host,
    "port": whole_number(1, (1 << 16) - 1),
    "route": ROUTE_NAME,
    "methods": methods,
    "path": _path,
    "deny": true_or_false,
    "addresses": _networks,
    "max_up_bytes": whole_number(0, 1 << 40),
    "max_down_bytes": whole_number(0, 1 << 40),
    "per_minute": whole_number(1, 60_000),
    "timeout_seconds": whole_number(1, 86_400),
}
_NAMES = {field.name: re.sub("_(.)", lambda found: found[1].upper(), field.name) for field in fields(Rule)}


def make_rule(**values: Any) -> Rule:
    """Return a rule of a file. Raises BadValue."""
    if bool(values.get("host")) == bool(values.get("route")):
        raise BadValue("must name a host or a route", 'write host = "…" or route = "…"')
    if values.get("route") and {"port", "addresses"} & values.keys():
        raise BadValue("has a route, and so no port or addresses", "they are the endpoint's")
    return Rule(**values)


def to_json(rule: Rule) -> Json:
    """Return the rule as the interfaces have it."""
    return {_NAMES[key]: [*v] if isinstance(v, tuple) else v for key, v in asdict(rule).items()}


def from_json(rule: Json) -> Rule:
    """The reverse, as trusted as the sender."""
    values: dict[str, Any] = {}
    for key, name in _NAMES.items():
        values[key] = tuple(rule[name]) if isinstance(rule[name], list) else rule[name]
    return Rule(**values)
