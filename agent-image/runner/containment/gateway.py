"""Attempts at the gateway: at places that it must not reach, by requests that can be read in two ways."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Callable
from functools import partial

from .probe import Held, Json, Probe, Untried, code

GATEWAY = "/run/nanoclaw/gateway.sock"
GATEWAY_S = 4.0  #: a gateway that says nothing for so long has let nothing through
#: What it says itself to a request that it does not carry out.
_DENIED = {400, 403, 404, 405, 408, 411, 413, 414, 417, 421, 426, 431, 451, 501, 505}
_MESSAGES, _MODELS = b"/anthropic/v1/messages", b"GET /anthropic/v1/models"
_TWO, _NINE, _0 = b"Content-Length: 2\r\n", b"Content-Length: 9\r\n", b"0\r\n\r\n"
_CODING = b"Transfer-Encoding: %s\r\n"
_LARGE = 4096  #: more than the rule of the allowed host lets up
Request = bytes | Callable[[Json], bytes]


def ask(request: bytes) -> tuple[int, bytes]:
    """Say something to the gateway; return the status of its answer, 0 if there is none, and all of it."""
    answer = b""
    with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
        sock.settimeout(GATEWAY_S)
        present(sock, GATEWAY)
        with contextlib.suppress(OSError):  # it may hang up before it has all
            sock.sendall(request)
        while data := sock.recv(1 << 16):
            answer += data
            head, end, rest = answer.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)^content-length: *(\d+)", head, re.MULTILINE)
            if end and length and len(rest) >= int(length[1]):
                break
    status = re.match(rb"HTTP/1\.1 (\d{3})", answer)
    return int(status[1]) if status else 0, answer


def present(sock: socket.socket, path: str) -> None:
    """Connect. That nobody is there is no refusal. Raises Untried."""
    try:
        sock.connect(path)
    except OSError as exc:
        raise Untried(f"{path} does not answer: {code(exc)}") from exc


def smuggle(request: Request, parameters: Json) -> str:
    """A request that must be denied by the gateway itself, whatever its policy allows besides."""
    status, answer = ask(request if isinstance(request, bytes) else request(parameters))
    if parameters["token"].encode() in answer:
        return "the host answered through it"
    if status == 0:
        raise Held("it hung up" if not answer else "no answer that lets it pass")
    # What it says itself has neither.
    others = re.search(rb"(?i)^(date|server|request-id):", answer.partition(b"\r\n\r\n")[0], re.MULTILINE)
    if status not in _DENIED or others:
        return f"status {status}"
    raise Held(f"status {status}")


def beyond(request: Request, parameters: Json) -> str:
    """More than a rule allows that lets something through, as is made sure first."""
    if parameters["token"].encode() not in ask(_upload(b"/inbox", b"{}")(parameters))[1]:
        raise Untried("not even what is allowed comes through")
    return smuggle(request, parameters)


# --- requests --------------------------------------------------------------------------------------------


def head(first: bytes, headers: bytes = b"", host: bytes = b"gateway") -> bytes:
    return b"%s HTTP/1.1\r\nHost: %s\r\n%s\r\n" % (first, host, headers)


def post(path: bytes, headers: bytes, body: bytes = b"{}") -> bytes:
    return head(b"POST " + path, b"Content-Type: application/json\r\n" + headers) + body


def _tunnel(host: str, key: str = "tcp") -> Request:
    def request(parameters: Json) -> bytes:
        target = b"%s:%d" % (host.encode(), parameters[key])
        # With a request behind it, should the tunnel be there.
        return head(b"CONNECT " + target, host=target) + b"?"

    return request


def _absolute(authority: str) -> Request:
    def request(parameters: Json) -> bytes:
        target = (authority % parameters["tcp"]).encode()
        return head(b"GET http://%s/" % target, host=target.rpartition(b"@")[2])

    return request


def _upload(
    path: bytes, body: bytes, headers: bytes = b"", method: bytes = b"POST"
) -> Callable[[Json], bytes]:
    """To the allowed host, with a length unless `headers` say how long it is."""

    def request(parameters: Json) -> bytes:
        host = b"localhost:%d" % parameters["allowed"]
        length = headers or b"Content-Length: %d\r\n" % len(body)
        return head(method + b" http://" + host + path, length, host) + body

    return request


# fmt: off
#: Name, what it tries, and the request or what makes it. None of them reaches an endpoint.
_REQUESTS: tuple[tuple[str, str, Request], ...] = (
    ("gw-absolute", "the host's loopback by an absolute URL", _absolute("127.0.0.1:%d")),
    ("gw-userinfo", "the same, disguised by userinfo", _absolute("api.anthropic.com@127.0.0.1:%d")),
    ("gw-rebinding", "... by an allowed name that leads to it now", _absolute("localhost:%d")),
    ("gw-connect", "a tunnel to the host's loopback", _tunnel("127.0.0.1")),
    ("gw-connect-rebinding", "... by an allowed name that leads to it now", _tunnel("localhost")),
    ("gw-connect-v6", "... over IPv6", _tunnel("[::1]")),
    ("gw-connect-mapped", "... as an IPv4-mapped address", _tunnel("[::ffff:127.0.0.1]")),
    ("gw-connect-nat64", "... through NAT64", _tunnel("[64:ff9b::7f00:1]")),
    ("gw-connect-number", "... as one number", _tunnel("2130706433")),
    ("gw-connect-octal", "... in octal", _tunnel("0177.0.0.1")),
    ("gw-connect-zero", "... as 0.0.0.0", _tunnel("0.0.0.0")),
    ("gw-metadata", "the cloud's metadata", head(b"GET http://169.254.169.254/", host=b"169.254.169.254")),
    ("gw-unknown-host", "a tunnel to a host of no policy", head(b"CONNECT exfiltration.invalid:443")),
    ("gw-path", "an upload to a route's host, elsewhere", post(b"/anthropic/v1/files", _TWO)),
    ("gw-dots", "... by dot segments", post(_MESSAGES + b"/../files", _TWO)),
    ("gw-encoded-dots", "... by encoded ones", post(_MESSAGES + b"/%2e%2e/files", _TWO)),
    ("gw-bytes", "more bytes than may go there", post(_MESSAGES, b"Content-Length: 999999999\r\n", b"")),
    ("gw-method", "a method that is not allowed there", head(b"DELETE /anthropic/v1/models/x")),
    ("gw-query", "data in the query", head(_MODELS + b"?secret=x")),
    ("gw-smuggle-length", "a request hidden behind two lengths", post(_MESSAGES, _TWO + _NINE)),
    ("gw-smuggle-chunked", "... behind length and chunks", post(_MESSAGES, _TWO + _CODING % b"chunked", _0)),
    ("gw-smuggle-coding", "... behind an unknown coding", post(_MESSAGES, _CODING % b"xchunked", _0)),
    ("gw-two-hosts", "two Host headers", head(_MODELS, b"Host: other\r\n")),
    ("gw-cr", "a header injected by a bare CR", head(_MODELS + b"?limit=1\rX-Api-Key:")),
    ("gw-null", "a NUL in the path", head(_MODELS + b"\0.txt")),
    ("gw-header-name", "a control character in a header", head(_MODELS, b"A\x0b: b\r\n")),
    ("gw-large-header", "headers of a MiB", post(_MESSAGES, b"X: %s\r\n" % (b"x" * (1 << 20)))),
    ("gw-protocol", "another protocol", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
)
#: The same to a host that a rule allows: POST /inbox with few bytes.
_BEYOND: tuple[tuple[str, str, Request], ...] = (
    ("gw-upload-path", "an upload to an allowed host, elsewhere", _upload(b"/other", b"{}")),
    ("gw-upload-method", "... by another method", _upload(b"/inbox", b"{}", method=b"PUT")),
    ("gw-upload-bytes", "... of more bytes than the rule allows", _upload(b"/inbox", b"x" * _LARGE)),
    ("gw-upload-chunks", "... of as many in pieces, with no length",
     _upload(b"/inbox", b"%x\r\n%s\r\n0\r\n\r\n" % (_LARGE, b"x" * _LARGE), _CODING % b"chunked")),
    ("gw-upload-tunnel", "... past method and path, by a tunnel", _tunnel("localhost", "allowed")),
)
PROBES = (
    *(Probe(name, tries, "gateway", partial(smuggle, request)) for name, tries, request in _REQUESTS),
    *(Probe(name, tries, "gateway", partial(beyond, request)) for name, tries, request in _BEYOND),
)
# fmt: on
