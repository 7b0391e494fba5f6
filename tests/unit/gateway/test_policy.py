"""Which requests and headers pass."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoclawd.credentials import Secret
from nanoclawd.gateway import limits, policy
from nanoclawd.gateway.replies import KINDS, ErrorReply
from nanoclawd.ids import CredentialName
from nanoclawd.settings import Endpoint

SECRET = Secret(CredentialName("anthropic"), b"sk-ant-0123456789")
ENDPOINT = Endpoint(tls=True, host="api.anthropic.com", port=443, path="")


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
    found = policy.check_target(method.encode(), target.encode())

    assert (found.provider, found.path, found.query) == ("anthropic", path, query)


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("POST", "http://api.anthropic.com/v1/messages", 400),
        ("POST", "https://evil.example/anthropic/v1/messages", 400),
        ("POST", "//evil.example/anthropic/v1/messages", 400),
        ("POST", "user:pw@evil.example", 400),
        ("CONNECT", "evil.example:443", 400),
        ("OPTIONS", "*", 400),
        ("POST", "/anthropic/v1/%6dessages", 400),
        ("POST", "/anthropic/v1/messages%2f..%2ffiles", 400),
        ("GET", "/anthropic/v1/models/%2e%2e/files", 400),
        ("POST", "/anthropic\\v1\\messages", 400),
        ("POST", "/anthropic/v1/messages;x=1", 400),
        ("POST", "/anthropic/v1/messages#x", 400),
        ("GET", "/anthropic/v1/models/..", 403),
        ("GET", "/anthropic/v1/models/../files", 403),
        ("GET", "/anthropic/v1/models/./x", 403),
        ("GET", "/anthropic/v1/models/.hidden", 403),
        ("GET", "/anthropic/v1/models/a..b", 403),
        ("GET", "/anthropic/v1/models/", 403),
        ("POST", "/anthropic/v1/messages/", 403),
        ("POST", "/anthropic//v1/messages", 403),
        ("POST", "/anthropic/V1/messages", 403),
        ("POST", "/anthropic/v1/messages/batches", 403),
        ("POST", "/anthropic/v1/files", 403),
        ("GET", "/anthropic/v1/organizations/me", 403),
        ("GET", "/anthropic", 403),
        ("POST", "/v1/messages", 404),
        ("POST", "/openai/v1/messages", 404),
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
        ("POST", "/anthropic/v1/messages?beta=" + "x" * 300, 400),
        ("GET", "/anthropic/v1/models/" + "x" * 600, 400),
    ],
)
def test_request_outside_the_table_is_refused(method: str, target: str, status: int) -> None:
    with pytest.raises(ErrorReply) as caught:
        policy.check_target(method.encode(), target.encode())

    assert caught.value.status == status
    assert caught.value.status in KINDS


@given(
    st.binary(max_size=200), st.sampled_from(["", "/anthropic/", "/anthropic/v1/models/", "/anthropic/v1/"])
)
def test_no_target_leaves_the_table(tail: bytes, head: str) -> None:
    try:
        found = policy.check_target(b"GET", head.encode() + tail)
    except ErrorReply:
        return

    assert found.path == "/v1/models" or found.path.startswith("/v1/models/")
    assert ".." not in found.path and "//" not in found.path and not set("%\\?#; ") & set(found.path)


def test_length_beside_a_transfer_coding_is_refused() -> None:
    with pytest.raises(ErrorReply) as caught:
        policy.body_headers(b"POST", [(b"content-length", b"2"), (b"transfer-encoding", b"chunked")])

    assert caught.value.status == 400


def test_length_over_the_limit_is_refused() -> None:
    with pytest.raises(ErrorReply) as caught:
        policy.body_headers(b"POST", [(b"content-length", b"%d" % (limits.BODY_BYTES + 1))])

    assert caught.value.status == 413


@pytest.mark.parametrize("headers", [[(b"content-length", b"1")], [(b"transfer-encoding", b"chunked")]])
def test_get_with_a_body_is_refused(headers: list[policy.Header]) -> None:
    with pytest.raises(ErrorReply):
        policy.body_headers(b"GET", headers)


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

    sent = policy.request_headers(given_headers, [], provider="anthropic", endpoint=ENDPOINT, secret=SECRET)

    assert sent == [
        (b"host", b"api.anthropic.com"),
        (b"anthropic-version", b"2023-06-01"),
        (b"x-api-key", SECRET.reveal()),
    ]


def test_headers_of_an_answer_are_cleaned() -> None:
    headers = [
        (b"content-type", b"text/event-stream"),
        (b"request-id", b"req_1"),
        (b"retry-after", b"7"),
        (b"connection", b"x-hop, close"),
        (b"x-hop", b"1"),
        (b"set-cookie", b"a=b"),
        (b"location", b"https://evil.example/"),
        (b"transfer-encoding", b"chunked"),
        (b"content-length", b"99"),
        (b"x-echo", b"Bearer SK-ANT-0123456789 "),
    ]

    passed = policy.response_headers(headers, SECRET)

    assert [name for name, _ in passed] == [b"content-type", b"request-id", b"retry-after"]


def test_secret_does_not_show_itself() -> None:
    assert "0123" not in repr(SECRET) + str(SECRET) + f"{SECRET}"
