"""Which headers pass, and what they say on the other side. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nanoclawd.credentials import Secret
from nanoclawd.policy import HTTP_PORT, Ask, Denied, authority, parse_authority
from nanoclawd.routes import Route

Header = tuple[bytes, bytes]  #: name in lower case, value

#: What passes to the endpoint of a route, beside what the route names. Everything else stays here: a header
#: that we do not know could mean something to the endpoint or to a proxy before it (X-Forwarded-For,
#: X-Original-URL, X-HTTP-Method-Override …). Not Range: the credential could come back in two halves.
ROUTE_HEADERS = frozenset(
    {b"accept", b"accept-encoding", b"accept-language", b"content-encoding", b"content-type", b"user-agent"}
    | {b"if-match", b"if-none-match", b"if-modified-since", b"git-protocol"}
)
ROUTE_HEADER_PREFIX = b"x-stainless-"  # what SDKs tell about themselves

#: Hop by hop (RFC 9110 §7.6.1), or about this hop.
HOP_HEADERS = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
    | {b"proxy-authenticate", b"proxy-authentication-info", b"proxy-authorization"}
)
#: With these, some servers take a request for one of another method or path than the rule has seen.
OVERRIDES = frozenset(
    {b"x-http-method", b"x-http-method-override", b"x-method-override"}
    | {b"x-original-url", b"x-original-uri", b"x-rewrite-url"}
)
#: What does not pass from a route's endpoint beside: state, and ways to elsewhere.
RESPONSE_HEADERS_DROPPED = frozenset(
    {b"www-authenticate", b"authentication-info", b"set-cookie", b"set-cookie2", b"clear-site-data"}
    | {b"alt-svc", b"alt-used", b"content-location", b"link", b"location", b"refresh"}
    | {b"strict-transport-security"}
)


def body_headers(method: bytes, headers: Sequence[Header], max_bytes: int) -> list[Header]:
    """Return the one header that frames the body on its way on, after a look at its size. Raises Denied.

    h11 has refused lengths that are no numbers or differ; what it lets pass is a length beside a transfer
    coding, of which two servers may believe a different one (request smuggling).
    """
    lengths = [value for name, value in headers if name == b"content-length"]
    chunked = any(name == b"transfer-encoding" for name, _ in headers)
    if lengths and chunked:
        raise Denied(400, "framing", "Content-Length and Transfer-Encoding exclude each other.")
    if method in (b"GET", b"HEAD"):
        if chunked or (lengths and int(lengths[0])):
            raise Denied(400, "framing", f"A {method.decode()} request has no body here.")
        return []
    if chunked:
        return [(b"transfer-encoding", b"chunked")]
    length = int(lengths[0]) if lengths else 0
    if length > max_bytes:
        raise too_large(max_bytes)
    return [(b"content-length", b"%d" % length)]


def too_large(max_bytes: int) -> Denied:
    return Denied(413, "too-large", f"This is more than the {max_bytes} bytes that the policy allows.")


def route_headers(headers: Iterable[Header], route: Route, secret: Secret | None) -> list[Header]:
    """Return the headers that go to a route's endpoint: what may pass of the agent's, and our own."""
    more = {name.encode() for name in route.headers}
    passed = [
        (name, value)
        for name, value in headers
        if name in ROUTE_HEADERS or name in more or name.startswith(ROUTE_HEADER_PREFIX)
    ]
    host = (b"host", route.endpoint.authority.encode())
    if secret is not None or route.usage is not None:
        # In a compressed answer nobody could find the credential, or what it has cost.
        passed = [(name, value) for name, value in passed if name != b"accept-encoding"]
        passed.append((b"accept-encoding", b"identity"))
    if secret is None:
        return [host, *passed]
    key = (route.header.encode(), route.scheme.value_of(secret.reveal()))
    return [host, *(h for h in passed if h[0] != key[0]), key]


def plain_headers(headers: Sequence[Header], ask: Ask) -> list[Header]:
    """Return the headers that go to a server which the agent itself talks to: nearly all.

    Raises Denied if the header Host names another host than the target.
    """
    spoken = [value.decode("ascii", "replace") for name, value in headers if name == b"host"]
    if any(parse_authority(value, HTTP_PORT) != (ask.host, ask.port) for value in spoken):
        raise Denied(400, "host", "The header Host is not the host of the target.")
    dropped = _hop_headers(headers) | OVERRIDES | {b"host", b"expect", b"content-length"}
    host = authority(ask.host, ask.port).removesuffix(f":{HTTP_PORT}").encode()
    return [(b"host", host), *((name, value) for name, value in headers if name not in dropped)]


def response_headers(headers: Sequence[Header], *, is_route: bool) -> list[Header]:
    """Return the headers that go back to the agent: end to end, and of a route no state."""
    dropped = _hop_headers(headers)
    if is_route:
        dropped |= RESPONSE_HEADERS_DROPPED
    if any(name == b"transfer-encoding" for name, _ in headers):
        dropped.add(b"content-length")  # then it has no meaning, and must not get one on the way
    return [(name, value) for name, value in headers if name not in dropped]


def _hop_headers(headers: Iterable[Header]) -> set[bytes]:
    """Return the names of what ends here; the value of Connection names further ones."""
    named = (value for name, value in headers if name == b"connection")
    return {*HOP_HEADERS, *(token.strip().lower() for value in named for token in value.split(b","))}
