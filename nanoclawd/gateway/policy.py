"""Which requests of an agent pass, and with which headers. Pure.

RULES is the table of what may be asked: no row, no answer. Targets are compared with these patterns as they
came in and are never decoded or normalised, so that the endpoint cannot read in them what we did not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from nanoclawd.credentials import Secret
from nanoclawd.gateway import limits
from nanoclawd.gateway.replies import ErrorReply
from nanoclawd.settings import Endpoint

Header = tuple[bytes, bytes]  #: name in lower case, value


class Rule(NamedTuple):
    """One path of a provider that agents may use."""

    method: str
    path: str  #: a pattern
    query: frozenset[str]  #: names of parameters that may be given


class Target(NamedTuple):
    """An allowed request."""

    provider: str
    path: str  #: below the provider's endpoint; begins with "/"
    query: str  #: "" or "a=b&…"


_SEGMENT = r"[A-Za-z0-9][A-Za-z0-9_:@-]*(?:\.[A-Za-z0-9_:@-]+)*"  # never "." or "..", nothing encoded
_PAGE = frozenset({"after_id", "before_id", "limit"})
_BETA = frozenset({"beta"})  # the SDK's beta methods send ?beta=true

RULES = {
    "anthropic": (
        Rule("POST", "/v1/messages", _BETA),
        Rule("POST", "/v1/messages/count_tokens", _BETA),
        Rule("GET", "/v1/models", _BETA | _PAGE),
        Rule("GET", f"/v1/models/{_SEGMENT}", _BETA),
    ),
}

#: The header that carries a provider's key.
KEY_HEADER = {"anthropic": b"x-api-key"}

_TARGET = re.compile(r"(/[A-Za-z0-9_-]+)((?:/[^/?#%\\;]*)*)(?:\?(.*))?", re.ASCII)
_QUERY = re.compile(r"[a-z_]+=[A-Za-z0-9_.:-]*(?:&[a-z_]+=[A-Za-z0-9_.:-]*)*", re.ASCII)

#: What passes from an agent. Everything else stays here: a header that we do not know could mean something
#: to the endpoint or to a proxy before it (X-Forwarded-For, X-Original-URL, X-HTTP-Method-Override …).
REQUEST_HEADERS = frozenset(
    {b"accept", b"accept-encoding", b"accept-language", b"content-encoding", b"content-type", b"user-agent"}
    | {b"anthropic-beta", b"anthropic-version", b"idempotency-key"}
)
REQUEST_HEADER_PREFIX = b"x-stainless-"  # what the SDK tells about itself

#: What does not pass from an endpoint: hop by hop (RFC 9110 §7.6.1), state, and ways to elsewhere.
RESPONSE_HEADERS_DROPPED = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
    | {b"proxy-authenticate", b"proxy-authentication-info", b"www-authenticate", b"authentication-info"}
    | {b"set-cookie", b"set-cookie2", b"clear-site-data", b"strict-transport-security"}
    | {b"alt-svc", b"alt-used", b"content-location", b"link", b"location", b"refresh"}
)


def check_target(method: bytes, target: bytes) -> Target:
    """Return what is asked for, if a rule allows it. Raises ErrorReply."""
    text = target.decode("ascii", "replace")
    if len(text) > limits.TARGET_BYTES:
        raise ErrorReply(400, "target-too-long", f"The path is longer than {limits.TARGET_BYTES} bytes.")
    found = _TARGET.fullmatch(text)
    if found is None:
        message = (
            "The request must be for a plain path such as /anthropic/v1/messages: no scheme, no host, "
            "nothing percent-encoded."
        )
        raise ErrorReply(400, "target", message)
    provider, path, query = found[1][1:], found[2], found[3]
    if provider not in RULES:
        message = f"The gateway knows no provider here; it has {', '.join(RULES)}."
        raise ErrorReply(404, "unknown-provider", message)
    rule = next((rule for rule in RULES[provider] if re.fullmatch(rule.path, path, re.ASCII)), None)
    if rule is None:
        message = "The gateway does not forward this path; only messages and models pass."
        raise ErrorReply(403, "path", message)
    if method != rule.method.encode():
        message = f"The gateway forwards only {rule.method} here."
        raise ErrorReply(405, "method", message, ("allow", rule.method))
    if query is not None:
        if len(query) > limits.QUERY_BYTES or not _QUERY.fullmatch(query):
            raise ErrorReply(400, "query", "The query must be plain NAME=VALUE pairs.")
        names = [pair.partition("=")[0] for pair in query.split("&")]
        if not rule.query.issuperset(names) or len(names) != len(set(names)):
            allowed = ", ".join(sorted(rule.query))
            raise ErrorReply(403, "query", f"The gateway forwards only these parameters here: {allowed}.")
    return Target(provider, path, query or "")


def body_headers(method: bytes, headers: Sequence[Header]) -> list[Header]:
    """Return the one header that frames the body on its way on, after a look at its size. Raises ErrorReply.

    h11 has refused lengths that are no numbers or differ; what it lets pass is a length beside a transfer
    coding, of which two servers may believe a different one (request smuggling).
    """
    lengths = [value for name, value in headers if name == b"content-length"]
    chunked = any(name == b"transfer-encoding" for name, _ in headers)
    if lengths and chunked:
        raise ErrorReply(400, "framing", "Content-Length and Transfer-Encoding exclude each other.")
    if method == b"GET":
        if chunked or (lengths and int(lengths[0])):
            raise ErrorReply(400, "framing", "A GET request has no body here.")
        return []
    if chunked:
        return [(b"transfer-encoding", b"chunked")]
    length = int(lengths[0]) if lengths else 0
    if length > limits.BODY_BYTES:
        raise too_large()
    return [(b"content-length", b"%d" % length)]


def too_large() -> ErrorReply:
    return ErrorReply(413, "too-large", f"The request is larger than {limits.BODY_BYTES} bytes.")


def request_headers(
    headers: Iterable[Header], body: Iterable[Header], *, provider: str, endpoint: Endpoint, secret: Secret
) -> list[Header]:
    """Return the headers that go to `endpoint`: what may pass of the agent's, and our own."""
    passed = [
        (name, value)
        for name, value in headers
        if name in REQUEST_HEADERS or name.startswith(REQUEST_HEADER_PREFIX)
    ]
    key = (KEY_HEADER[provider], secret.reveal())
    return [(b"host", endpoint.authority.encode()), *passed, key, *body]


def response_headers(headers: Sequence[Header], secret: Secret) -> list[Header]:
    """Return the headers that go back to the agent: end to end, no state, and no trace of the key."""
    dropped = set(RESPONSE_HEADERS_DROPPED)
    for name, value in headers:
        if name == b"connection":  # its value names further headers that are hop by hop
            dropped |= {token.strip().lower() for token in value.split(b",")}
        if name == b"transfer-encoding":  # then a length has no meaning, and must not get one on the way
            dropped.add(b"content-length")
    key = secret.reveal().lower()
    return [
        (name, value)
        for name, value in headers
        if name not in dropped and key not in value.lower() and key not in name
    ]
