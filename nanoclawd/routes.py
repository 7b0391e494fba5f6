"""Routes: endpoints that the gateway itself asks, with a credential that agents never see. Pure."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple
from urllib.parse import quote

from nanoclawd.ids import CredentialName
from nanoclawd.policy import Ask, Denied

PASSWORD_BYTES = 8  #: a shorter one is not covered by itself: by chance it is in many answers


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """Where a route leads. Equal endpoints share connections."""

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


class Scheme(StrEnum):
    """How a credential stands in its header."""

    BEARER = "bearer"
    BASIC = "basic"  #: the credential is USER:PASSWORD
    PLAIN = "plain"  #: as it is

    def spellings(self, credential: bytes) -> set[bytes]:
        """Return what no answer may say: the credential, its password; each in base64, too, and in URLs."""
        found = {credential}
        if self is Scheme.BASIC and len(password := credential.partition(b":")[2]) >= PASSWORD_BYTES:
            found.add(password)
        found |= {base64.b64encode(each) for each in found}
        return found | {quote(each, safe="").encode() for each in found}

    def value_of(self, credential: bytes) -> bytes:
        """Return what the header says."""
        word = b"" if self is Scheme.PLAIN else self.value.capitalize().encode() + b" "
        return word + (base64.b64encode(credential) if self is Scheme.BASIC else credential)


class UsageShape(StrEnum):
    """How an endpoint's answers tell what they have cost."""

    ANTHROPIC = "anthropic"  #: as the Messages API does
    OPENAI = "openai"  #: as Chat Completions and Responses do


class Operation(NamedTuple):
    """What may be asked of an endpoint."""

    methods: tuple[str, ...]
    path: str = ".*"  #: a pattern, for the path as it was sent
    query: frozenset[str] | None = None  #: names of parameters; None: whatever


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """One endpoint under a name. What no operation names is not forwarded, whatever a policy says."""

    name: str  #: what agents write: /NAME/… or /r/NAME/…
    endpoint: Endpoint
    credential: CredentialName | None = None  #: as given to 'nanoclawctl secret set'
    header: str = "authorization"  #: of the credential
    scheme: Scheme = Scheme.BEARER
    operations: tuple[Operation, ...] = ()
    headers: tuple[str, ...] = ()  #: of an agent, that pass beside the common ones
    usage: UsageShape | None = None  #: calls of it cost money

    def is_metered(self, ask: Ask) -> bool:
        """Say whether what is asked for counts against a budget."""
        is_free = self.usage is UsageShape.ANTHROPIC and ask.path.endswith("/messages/count_tokens")
        return self.usage is not None and ask.method == "POST" and not is_free

    def check(self, ask: Ask) -> None:
        """Raise Denied unless an operation names what is asked for."""
        path, _, query = ask.target.partition("?")
        found = [each for each in self.operations if re.fullmatch(each.path, path, re.ASCII)]
        if not found:
            raise Denied(403, "path", f"The route {self.name} does not forward this path.")
        operation = next((each for each in found if ask.method in each.methods), None)
        if operation is None:
            allowed = ", ".join(dict.fromkeys(method for each in found for method in each.methods))
            raise Denied(
                405, "method", f"The route {self.name} forwards only {allowed} here.", ("allow", allowed)
            )
        if operation.query is not None and "?" in ask.target:
            _check_query(query, operation.query)


_QUERY = re.compile(r"[a-z_]+=[A-Za-z0-9_.:-]*(?:&[a-z_]+=[A-Za-z0-9_.:-]*)*", re.ASCII)


def _check_query(query: str, allowed: frozenset[str]) -> None:
    if not _QUERY.fullmatch(query):
        raise Denied(400, "query", "The query must be plain NAME=VALUE pairs.")
    names = [pair.partition("=")[0] for pair in query.split("&")]
    if not allowed.issuperset(names) or len(names) != len(set(names)):
        shown = ", ".join(sorted(allowed))
        raise Denied(403, "query", f"The gateway forwards only these parameters here: {shown}.")


# --- the Messages API ---------------------------------------------------------------------------------

_SEGMENT = r"[A-Za-z0-9][A-Za-z0-9_:@-]*(?:\.[A-Za-z0-9_:@-]+)*"
_PAGE = frozenset({"after_id", "before_id", "limit"})
_BETA = frozenset({"beta"})  # the SDK's beta methods send ?beta=true
_MESSAGES = (
    Operation(("POST",), "/v1/messages", _BETA),
    Operation(("POST",), "/v1/messages/count_tokens", _BETA),
    Operation(("GET",), "/v1/models", _BETA | _PAGE),
    Operation(("GET",), f"/v1/models/{_SEGMENT}", _BETA),
)


def anthropic(endpoint: Endpoint, credential: CredentialName) -> Route:
    """Return the route of the provider `anthropic`."""
    return Route(
        name="anthropic",
        endpoint=endpoint,
        credential=credential,
        header="x-api-key",
        scheme=Scheme.PLAIN,
        operations=_MESSAGES,
        headers=("anthropic-beta", "anthropic-version", "idempotency-key"),
        usage=UsageShape.ANTHROPIC,
    )


def configured(
    *,
    name: str,
    endpoint: Endpoint,
    credential: CredentialName | None = None,
    header: str = "authorization",
    scheme: Scheme = Scheme.BEARER,
    methods: Iterable[str] = ("GET", "HEAD"),
    headers: tuple[str, ...] = (),
    usage: UsageShape | None = None,
) -> Route:
    """Return a row of [[routes]]: these methods, for all below the endpoint."""
    return Route(
        name=name,
        endpoint=endpoint,
        credential=credential,
        header=header,
        scheme=scheme,
        operations=(Operation(tuple(methods)),),
        headers=headers,
        usage=usage,
    )
