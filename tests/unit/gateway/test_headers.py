"""Which requests of a route pass, and which headers."""

from __future__ import annotations

import pytest

from nanoclawd.credentials import Secret
from nanoclawd.gateway import headers
from nanoclawd.gateway.replies import KINDS
from nanoclawd.ids import CredentialName
from nanoclawd.policy import Denied, parse_ask
from nanoclawd.routes import Endpoint, anthropic

SECRET = Secret(CredentialName("anthropic"), b"sk-ant-0123456789")
NAME = CredentialName("anthropic")
ANTHROPIC = anthropic(Endpoint(tls=True, host="api.anthropic.com", port=443, path=""), NAME)


@pytest.mark.parametrize(
    ("method", "target", "path", "query"),
    [
        ("POST", "/anthropic/v1/messages", "/v1/messages", ""),
        ("POST", "/anthropic/v1/messages?beta=true", "/v1/messages", "beta=true"),
        ("POST", "/anthropic/v1/messages/count_tokens?beta=true", "/v1/messages/count_tokens", "beta=true"),
        ("GET", "/anthropic/v1/models", "/v1/models", ""),
        ("GET", "/anthropic/v1/models?limit=20&after_id=m-1", "/v1/models", "limit=20&after_id=m-1"),
        ("GET", "/anthropic/v1/models/claude-sonnet-4.5", "/v1/models/claude-sonnet-4.5", ""),
    ],
)
def test_request_of_the_table_passes(method: str, target: str, path: str, query: str) -> None:
    ask = parse_ask(method, target)
    ANTHROPIC.check(ask)

    assert (ask.route, ask.target) == ("anthropic", f"{path}?{query}" if query else path)


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("POST", "https://evil.example/anthropic/v1/messages", 400),
        ("POST", "//evil.example/anthropic/v1/messages", 400),
        ("POST", "user:pw@evil.example", 400),
        ("OPTIONS", "*", 400),
        ("POST", "/anthropic/v1/%6dessages", 403),
        ("POST", "/anthropic/v1/messages%2f..%2ffiles", 400),
        ("GET", "/anthropic/v1/models/%2e%2e/files", 400),
        ("POST", "/anthropic\\v1\\messages", 400),
        ("POST", "/anthropic/v1/messages;x=1", 400),
        ("POST", "/anthropic/v1/messages#x", 400),
        ("GET", "/anthropic/v1/models/..", 400),
        ("GET", "/anthropic/v1/models/../files", 400),
        ("GET", "/anthropic/v1/models/./x", 400),
        ("GET", "/anthropic/v1/models/.hidden", 403),
        ("GET", "/anthropic/v1/models/a..b", 403),
        ("GET", "/anthropic/v1/models/", 403),
        ("POST", "/anthropic/v1/messages/", 403),
        ("POST", "/anthropic//v1/messages", 400),
        ("POST", "/anthropic/V1/messages", 403),
        ("POST", "/anthropic/v1/messages/batches", 403),
        ("POST", "/anthropic/v1/files", 403),
        ("GET", "/anthropic/v1/organizations/me", 403),
        ("GET", "/anthropic", 403),
        ("GET", "/", 400),
        ("GET", "/anthropic/v1/messages", 405),
        ("DELETE", "/anthropic/v1/models/x", 405),
        ("post", "/anthropic/v1/messages", 405),
        ("POST", "/anthropic/v1/messages?", 400),
        ("POST", "/anthropic/v1/messages?beta", 400),
        ("POST", "/anthropic/v1/messages?beta=%74rue", 400),
        ("POST", "/anthropic/v1/messages?beta=true&beta=true", 403),
        ("POST", "/anthropic/v1/messages?api_key=x", 403),
        ("POST", "/anthropic/v1/messages?beta=true?x=1", 400),
    ],
)
def test_request_outside_the_table_is_refused(method: str, target: str, status: int) -> None:
    with pytest.raises(Denied) as caught:
        ANTHROPIC.check(parse_ask(method, target))

    assert caught.value.status == status
    assert caught.value.status in KINDS


def test_length_beside_a_transfer_coding_is_refused() -> None:
    with pytest.raises(Denied) as caught:
        headers.body_headers(b"POST", [(b"content-length", b"2"), (b"transfer-encoding", b"chunked")], 100)

    assert caught.value.status == 400


def test_length_over_the_limit_is_refused() -> None:
    with pytest.raises(Denied) as caught:
        headers.body_headers(b"POST", [(b"content-length", b"101")], 100)

    assert caught.value.status == 413


@pytest.mark.parametrize("given", [[(b"content-length", b"1")], [(b"transfer-encoding", b"chunked")]])
def test_get_with_a_body_is_refused(given: list[headers.Header]) -> None:
    with pytest.raises(Denied):
        headers.body_headers(b"GET", given, 100)


@pytest.mark.parametrize(
    "name",
    [
        "x-api-key",
        "authorization",
        "proxy-authorization",
        "proxy-connection",
        "cookie",
        "host",
        "connection",
        "te",
        "keep-alive",
        "upgrade",
        "trailer",
        "expect",
        "forwarded",
        "x-forwarded-host",
        "x-original-url",
        "via",
        "x-http-method-override",
        "content-length",
        "transfer-encoding",
        "origin",
        "range",
        "x-unknown",
    ],
)
def test_header_of_an_agent_stays_here(name: str) -> None:
    given_headers = [(name.encode(), b"agent"), (b"anthropic-version", b"2023-06-01")]

    sent = headers.route_headers(given_headers, ANTHROPIC, SECRET)

    assert sent == [
        (b"host", b"api.anthropic.com"),
        (b"anthropic-version", b"2023-06-01"),
        (b"accept-encoding", b"identity"),
        (b"x-api-key", SECRET.reveal()),
    ]


def test_headers_of_an_answer_are_cleaned() -> None:
    answered = [
        (b"content-type", b"text/event-stream"),
        (b"request-id", b"req_1"),
        (b"retry-after", b"7"),
        (b"connection", b"x-hop, close"),
        (b"x-hop", b"1"),
        (b"set-cookie", b"a=b"),
        (b"location", b"https://evil.example/"),
        (b"transfer-encoding", b"chunked"),
        (b"content-length", b"99"),
    ]

    passed = headers.response_headers(answered, is_route=True)

    assert [name for name, _ in passed] == [b"content-type", b"request-id", b"retry-after"]


def test_secret_does_not_show_itself() -> None:
    assert "0123" not in repr(SECRET) + str(SECRET) + f"{SECRET}"
