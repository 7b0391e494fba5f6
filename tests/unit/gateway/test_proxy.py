"""Tunnels, requests as to any proxy, and routes of nanoclaw.toml: what passes, and what an attack gets."""

from __future__ import annotations

import asyncio
import socket
from asyncio import StreamReader as Reader
from asyncio import StreamWriter as Writer
from dataclasses import replace
from pathlib import Path

import pytest

from nanoclawd import credentials
from nanoclawd.gateway import limits
from nanoclawd.ids import CredentialName
from nanoclawd.policy import Policy, Rule, Rules
from tests.unit.gateway.harness import (
    AGENT,
    HANDLER_PORT,
    MODEL_ONLY,
    OK,
    Bench,
    Handler,
    Reply,
    bench,
    read_head,
    read_reply,
    read_request,
)

HERE = Rule(host="127.0.0.1", port=HANDLER_PORT)
NAMED = Rule(host="localhost", port=HANDLER_PORT, addresses=("127.0.0.0/8", "::1"))
GITHUB = """
[[routes]]
name = "github"
endpoint = "http://127.0.0.1:PORT/api"
credential = "github"
methods = ["GET", "POST", "HEAD"]
headers = ["X-Api-Version"]
"""


GET = b"GET http://127.0.0.1:PORT/ HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\n\r\n"


def keep(seen: list[tuple[str, list[tuple[bytes, bytes]], bytes]], answer: bytes = OK) -> Handler:
    async def handler(reader: Reader, writer: Writer) -> None:
        while True:
            seen.append(await read_request(reader))
            writer.write(answer)

    return handler


async def echo(reader: Reader, writer: Writer) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.write(b"bye")


async def connect(table: Bench, target: bytes | None = None) -> tuple[int, Reader, Writer]:
    reader, writer = await table.connect()
    target = target or b"127.0.0.1:%d" % table.port
    writer.write(b"CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n" % (target, target))
    line, _ = await read_head(reader)
    return int(line.split()[1]), reader, writer


def ask(
    directory: Path, request: bytes, *rules: Rule, settings: str = "", answer: bytes = OK
) -> tuple[Reply, list[tuple[str, list[tuple[bytes, bytes]], bytes]]]:
    """Return the answer to `request`, in which PORT stands for the server's, and what the server saw."""
    seen: list[tuple[str, list[tuple[bytes, bytes]], bytes]] = []

    async def main() -> Reply:
        async with bench(directory, keep(seen, answer), rules=rules, settings=settings) as table:
            return await table.ask(request.replace(b"PORT", b"%d" % table.port))

    return asyncio.run(main()), seen


# --- tunnels ----------------------------------------------------------------------------------------


def test_tunnel_passes_bytes_both_ways_until_both_ends_have_ended(directory: Path) -> None:
    async def main() -> bytes:
        async with bench(directory, echo, rules=(HERE,)) as table:
            status, reader, writer = await connect(table)
            assert status == 200
            sent = b"\x16\x03\x01" + bytes(range(256)) * 4000
            writer.write(sent)
            writer.write_eof()
            received = await reader.read(-1)
            assert received[:-3] == sent
            return received[-3:]

    assert asyncio.run(main()) == b"bye"


def test_bytes_that_come_with_the_request_pass_too(directory: Path) -> None:
    async def main() -> bytes:
        async with bench(directory, echo, rules=(HERE,)) as table:
            reader, writer = await table.connect()
            where = b"127.0.0.1:%d" % table.port
            writer.write(b"CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\nearly" % (where, where))
            writer.write_eof()
            await read_head(reader)
            return await reader.read(-1)

    assert asyncio.run(main()) == b"earlybye"


def test_request_for_a_tunnel_has_no_body(directory: Path) -> None:
    request = b"CONNECT 127.0.0.1:PORT HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"

    reply, seen = ask(directory, request, HERE)

    assert (reply.status, seen) == (400, [])


def test_name_is_resolved_here_and_its_address_must_be_named(directory: Path) -> None:
    async def main(rule: Rule) -> int:
        async with bench(directory, echo, rules=(rule,)) as table:
            return (await connect(table, b"localhost:%d" % table.port))[0]

    assert asyncio.run(main(NAMED)) == 200
    directory.joinpath("gateway.sock").unlink()
    assert asyncio.run(main(replace(NAMED, addresses=()))) == 403


def test_rule_that_wants_a_method_is_not_served_by_a_tunnel(directory: Path) -> None:
    request = b"CONNECT 127.0.0.1:PORT HTTP/1.1\r\nHost: x\r\n\r\n"

    reply, _ = ask(directory, request, replace(HERE, methods=("GET",)))

    assert reply.status == 403
    assert "only a route serves it" in reply.error["message"]


@pytest.mark.parametrize(
    ("rule", "up", "down"),
    [(replace(HERE, max_up_bytes=1000), 1001, 0), (replace(HERE, max_down_bytes=1000), 1, 1001)],
)
def test_tunnel_ends_at_its_bytes(directory: Path, rule: Rule, up: int, down: int) -> None:
    async def handler(reader: Reader, writer: Writer) -> None:
        await reader.read(1)
        writer.write(b"x" * down)
        received.append(len(await reader.read(-1)))

    received: list[int] = []

    async def main() -> bytes:
        async with bench(directory, handler, rules=(rule,)) as table:
            _, reader, writer = await connect(table)
            writer.write(b"y" * up)
            return await reader.read(-1)

    assert len(asyncio.run(main())) <= 1000
    assert sum(received) <= 1000


@pytest.mark.parametrize(("way", "sent"), [("idle", b"x"), ("idle", b""), ("late", b"x")])
def test_tunnel_ends_when_nothing_comes_or_its_time_is_over(
    directory: Path, monkeypatch: pytest.MonkeyPatch, way: str, sent: bytes
) -> None:
    if way == "idle":
        monkeypatch.setattr(limits, "TUNNEL_IDLE_S", 0.5)
    rule = replace(HERE, timeout_seconds=3600 if way == "idle" else 1)

    async def main() -> bytes:
        async with bench(directory, echo, rules=(rule,)) as table, asyncio.timeout(20):
            _, reader, writer = await connect(table)
            writer.write(sent)
            return await reader.read(-1)

    assert asyncio.run(main()) == sent


def test_name_that_is_rebound_after_it_was_checked_leads_to_the_checked_address(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def getaddrinfo(host: str, port: int, *_: object, **__: object) -> list[object]:
        if host == "name.example":
            asked.append(host)
            host = "127.0.0.1" if len(asked) == 1 else "127.0.0.9"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    rule = Rule(host="name.example", port=HANDLER_PORT, addresses=("127.0.0.1",))

    async def main() -> int:
        async with bench(directory, echo, rules=(rule,)) as table:
            return (await connect(table, b"name.example:%d" % table.port))[0]

    assert asyncio.run(main()) == 200
    assert asked == ["name.example"]


def test_tunnel_lives_for_as_long_as_something_comes(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "TUNNEL_IDLE_S", 20)

    async def main() -> None:
        loop, ahead_s = asyncio.get_running_loop(), 0.0
        clock = loop.time
        monkeypatch.setattr(loop, "time", lambda: clock() + ahead_s)
        async with bench(directory, echo, rules=(HERE,)) as table:
            _, reader, writer = await connect(table)
            for _ in range(4):
                ahead_s += 12
                writer.write(b"x")
                assert await reader.readexactly(1) == b"x"

    asyncio.run(main())


def test_policy_that_changes_cuts_off_what_it_allows_no_more(directory: Path) -> None:
    async def main() -> None:
        async with bench(directory, echo, rules=(HERE,)) as table:
            _, reader, writer = await connect(table)
            writer.write(b"x")
            await reader.readexactly(1)
            here = replace(HERE, port=table.port)

            table.gateway.set_policy(AGENT, Policy(rules=(replace(here, max_up_bytes=7), *MODEL_ONLY)))
            writer.write(b"y")
            assert await reader.readexactly(1) == b"y"  # still allowed

            table.gateway.set_policy(AGENT, Policy(rules=(replace(here, deny=True),)))
            assert await reader.read() == b""

            table.gateway.set_policy(AGENT, Policy(rules=(replace(here, addresses=("10.0.0.0/8",)),)))
            _, reader, writer = await connect(table)
            table.gateway.set_policy(AGENT, Policy(rules=(here,)))
            assert await reader.read() == b""

            table.gateway.set_policy(AGENT, Policy(rules=()))
            assert (await connect(table))[0] == 403

    asyncio.run(main())


def test_tunnel_does_not_hold_up_the_gateways_stop(directory: Path) -> None:
    async def main() -> None:
        async with bench(directory, echo, rules=(HERE,)) as table:
            _, reader, _ = await connect(table)
            async with asyncio.timeout(limits.DRAIN_S / 2):
                await table.gateway.drain()
                assert await reader.read() == b""

    asyncio.run(main())


def test_agent_without_a_policy_may_nothing(directory: Path) -> None:
    async def main() -> list[int]:
        async with bench(directory, echo) as table:
            table.gateway.allowances.clear()
            plain = await table.ask(b"GET /anthropic/v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
            return [(await connect(table))[0], plain.status]

    assert asyncio.run(main()) == [403, 403]


def test_rate_of_a_rule(directory: Path) -> None:
    async def main() -> list[int]:
        async with bench(directory, echo, rules=(replace(HERE, per_minute=2),)) as table:
            return [(await connect(table))[0] for _ in range(3)]

    assert asyncio.run(main()) == [200, 200, 429]


def test_nobody_listens(directory: Path) -> None:
    async def main() -> int:
        async with bench(directory, None, rules=(HERE,)) as table:
            return (await connect(table))[0]

    assert asyncio.run(main()) == 502


# --- http://, as to any proxy -------------------------------------------------------------------------


def test_plain_request_passes_with_its_own_headers(directory: Path) -> None:
    request = (
        b"POST http://127.0.0.1:PORT/a%20b/c?d=%2e%2e&e HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\n"
        b"Authorization: Bearer own\r\nCookie: a=b\r\nProxy-Authorization: Basic x\r\n"
        b"Connection: close, X-Hop\r\n"
        b"X-Hop: 1\r\nTE: trailers\r\nUpgrade: h2c\r\nX-Mine: 1\r\nContent-Length: 3\r\n"
        b"X-HTTP-Method-Override: DELETE\r\nX-Original-URL: /admin\r\n\r\nabc"
    )
    answer = OK.replace(b"\r\n", b"\r\nSet-Cookie: c=d\r\nLocation: /x\r\nKeep-Alive: 5\r\n", 1)

    reply, seen = ask(directory, request, replace(HERE, methods=("POST",), path="/a b"), answer=answer)

    (line, headers, body) = seen[0]
    assert line == "POST /a%20b/c?d=%2e%2e&e HTTP/1.1"
    names = [b"host", b"authorization", b"cookie", b"x-mine", b"content-length"]
    assert [name for name, _ in headers] == names and body == b"abc"
    assert reply.status == 200
    assert reply.header(b"set-cookie") == b"c=d" and reply.header(b"location") == b"/x"
    assert reply.header(b"keep-alive") is None


def test_redirect_is_the_agents_to_follow_and_decided_again(directory: Path) -> None:
    answer = b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n"

    reply, seen = ask(
        directory,
        b"GET http://127.0.0.1:PORT/ HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\n\r\n",
        HERE,
        answer=answer,
    )

    assert (reply.status, len(seen)) == (302, 1)


@pytest.mark.parametrize(
    ("line", "headers"),
    [
        (b"GET http://127.0.0.1:PORT/private", b""),
        (b"GET http://127.0.0.1:PORT/pub/../private", b""),
        (b"GET http://127.0.0.1:PORT/pub/%2e%2e/private", b""),
        (b"GET http://127.0.0.1:PORT/publicity", b""),
        (b"POST http://127.0.0.1:PORT/pub", b""),
        (b"GET http://127.0.0.2:PORT/pub", b""),
        (b"GET http://127.0.0.1:1/pub", b""),
        (b"GET http://127.1:PORT/pub", b""),
        (b"GET http://2130706433:PORT/pub", b""),
        (b"GET http://[::ffff:127.0.0.1]:PORT/pub", b""),
        (b"GET http://x@127.0.0.1:PORT/pub", b""),
        (b"GET https://127.0.0.1:PORT/pub", b""),
        (b"TRACE http://127.0.0.1:PORT/pub", b""),
        (b"GET http://127.0.0.1:PORT/pub", b"Host: evil.example\r\n"),
        (b"GET http://127.0.0.1:PORT/pub", b"Host: 127.0.0.1:PORT\r\nHost: 127.0.0.1:PORT\r\n"),
        (b"GET http://127.0.0.1:PORT/pub", b"Host: 127.0.0.1:PORT\r\nContent-Length: 5\r\n"),
        (b"GET http://127.0.0.1:PORT/pub", b"Host: 127.0.0.1:PORT\r\nTransfer-Encoding: chunked\r\n"),
        (b"GET http://127.0.0.1:PORT/pub", b"Host: 127.0.0.1:PORT\r\nX: a\x00b\r\n"),
        (b"GET http://127.0.0.1:PORT/pub", b"Host: 127.0.0.1:PORT\r\nX: a\rInjected: 1\r\n"),
        (b"GET http://127.0.0.1:PORT/pub", b"Host: 127.0.0.1:PORT\r\nX : a\r\n"),
        (b"GET http://127.0.0.1:PORT/pub", b"Host: 127.0.0.1:PORT\r\n folded\r\n"),
        (b"CONNECT 127.0.0.1:PORT", b"Host: x\r\n"),
        (b"CONNECT 127.0.0.1:PORT", b"Host: x\r\nContent-Length: 5\r\n"),
        (b"CONNECT evil.example:443", b"Host: 127.0.0.1:PORT\r\n"),
    ],
)
def test_attack_does_not_reach_the_server(directory: Path, line: bytes, headers: bytes) -> None:
    pub = replace(HERE, methods=("GET",), path="/pub")
    host = b"" if b"Host:" in headers else b"Host: 127.0.0.1:PORT\r\n"

    reply, seen = ask(directory, line + b" HTTP/1.1\r\n" + host + headers + b"\r\n", pub, *MODEL_ONLY)

    assert reply.status in (400, 403, 405)
    assert not seen


def test_two_requests_in_one_are_decided_one_by_one(directory: Path) -> None:
    pub = replace(HERE, path="/pub")
    seen: list[tuple[str, list[tuple[bytes, bytes]], bytes]] = []

    async def main() -> list[int]:
        async with bench(directory, keep(seen), rules=(pub,)) as table:
            reader, writer = await table.connect()
            for path in (b"pub", b"private", b"pub/x"):
                where = b"127.0.0.1:%d" % table.port
                writer.write(b"GET http://%s/%s HTTP/1.1\r\nHost: %s\r\n\r\n" % (where, path, where))
            replies = [(await read_reply(reader)).status for _ in range(2)]
            assert await reader.read() == b""  # whoever was refused begins anew
            return replies

    assert asyncio.run(main()) == [200, 403]
    assert [line.split()[1] for line, _, _ in seen] == ["/pub"]


def test_what_headers_and_target_carry_out_counts(directory: Path) -> None:
    small = replace(HERE, max_up_bytes=500)
    secret = b"x" * 600

    for request in (
        b"GET http://127.0.0.1:PORT/?" + secret + b" HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\n\r\n",
        b"GET http://127.0.0.1:PORT/ HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nX: " + secret + b"\r\n\r\n",
    ):
        reply, seen = ask(directory, request, small)
        directory.joinpath("gateway.sock").unlink()
        assert (reply.status, seen) == (413, [])


def test_answer_that_says_it_is_larger_than_allowed_is_refused(directory: Path) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n" + b"x" * 2000

    reply, _ = ask(directory, GET, replace(HERE, max_down_bytes=1000), answer=answer)

    assert reply.status == 413


def test_answer_that_is_larger_than_allowed_has_no_end(directory: Path) -> None:
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"200\r\n" + b"x" * 512 + b"\r\n"

    async def main() -> None:
        handler = keep([], answer + b"200\r\n" + b"x" * 512 + b"\r\n0\r\n\r\n")
        async with bench(directory, handler, rules=(replace(HERE, max_down_bytes=1000),)) as table:
            with pytest.raises(asyncio.IncompleteReadError):
                await table.ask(GET.replace(b"PORT", b"%d" % table.port))

    asyncio.run(main())


# --- routes -------------------------------------------------------------------------------------------


@pytest.fixture
def token(directory: Path) -> bytes:
    credentials.write(CredentialName("github"), b"ada:ghp-0123456789")
    return b"ada:ghp-0123456789"


ROUTE: Rules = (Rule(route="github", path="/repos"),)


@pytest.mark.parametrize(
    ("more", "header"),
    [
        ("", (b"authorization", b"Bearer ada:ghp-0123456789")),
        ('scheme = "basic"\n', (b"authorization", b"Basic YWRhOmdocC0wMTIzNDU2Nzg5")),
        ('scheme = "plain"\nheader = "X-Token"\n', (b"x-token", b"ada:ghp-0123456789")),
    ],
)
def test_route_adds_its_credential(
    directory: Path, token: bytes, more: str, header: tuple[bytes, bytes]
) -> None:
    request = (
        b"GET /r/github/repos/x?page=2 HTTP/1.1\r\nHost: gateway\r\nAuthorization: own\r\nX-Token: own\r\n"
        b"Cookie: a=b\r\nX-Api-Version: 7\r\nX-Forwarded-Host: evil\r\n\r\n"
    )

    reply, seen = ask(directory, request, *ROUTE, settings=GITHUB + more)

    (line, headers, _) = seen[0]
    assert reply.status == 200
    assert line == "GET /api/repos/x?page=2 HTTP/1.1"
    assert header in headers
    assert [name for name, _ in headers] == [b"host", b"x-api-version", b"accept-encoding", header[0]]


def test_credential_of_an_agent_does_not_stand_beside_the_routes(directory: Path, token: bytes) -> None:
    request = b"GET /r/github/repos HTTP/1.1\r\nHost: gateway\r\nAuthorization: own\r\n\r\n"

    _, seen = ask(directory, request, *ROUTE, settings=GITHUB.replace("X-Api-Version", "Authorization"))

    assert [value for name, value in seen[0][1] if name == b"authorization"] == [b"Bearer " + token]


@pytest.mark.parametrize("scheme", ["bearer", "basic"])
def test_route_does_not_give_its_credential_back(directory: Path, token: bytes, scheme: str) -> None:
    said = [token, b"YWRhOmdocC0wMTIzNDU2Nzg5", b"ada%3aghp-0123456789"]
    said += [b"ghp-0123456789"] if scheme == "basic" else []  # the password alone
    text = b" ".join(said)
    answer = b"HTTP/1.1 200 OK\r\nX-Echo: %s\r\nContent-Length: %d\r\n\r\n%s" % (text, len(text), text)
    settings = GITHUB + f'scheme = "{scheme}"\n'

    reply, _ = ask(
        directory,
        b"GET /r/github/repos HTTP/1.1\r\nHost: x\r\n\r\n",
        *ROUTE,
        settings=settings,
        answer=answer,
    )

    assert reply.status == 200 and reply.header(b"x-echo") is None
    assert reply.body == b" ".join(b"*" * len(each) for each in said)


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"DELETE /r/github/repos/x", 405),  # the policy has it, the route does not
        (b"GET /r/github/user", 403),
        (b"GET /r/github/repos/../user", 400),
        (b"GET /r/github/repos/%2e%2e/user", 400),
        (b"GET /r/nothing/repos", 403),
        (b"GET /github/../r/github/user", 400),
        # Whoever may use the route may not so reach its host, nor use it by the host's name.
        (b"CONNECT 127.0.0.1:PORT", 403),
        (b"GET http://127.0.0.1:PORT/api/repos", 403),
        (b"GET http://github/repos", 403),
    ],
)
def test_route_serves_what_policy_and_route_name_and_nothing_else(
    directory: Path, token: bytes, line: bytes, status: int
) -> None:
    host = line.partition(b"//")[2].partition(b"/")[0] or b"gateway"
    reply, seen = ask(directory, line + b" HTTP/1.1\r\nHost: " + host + b"\r\n\r\n", *ROUTE, settings=GITHUB)

    assert (reply.status, seen) == (status, [])


def test_host_that_is_allowed_does_not_give_the_routes_credential(directory: Path, token: bytes) -> None:
    reply, seen = ask(directory, b"GET /r/github/repos HTTP/1.1\r\nHost: x\r\n\r\n", HERE, settings=GITHUB)

    assert (reply.status, seen) == (403, [])


def test_route_that_is_not_configured(directory: Path) -> None:
    reply, _ = ask(directory, b"GET /r/x/ HTTP/1.1\r\nHost: x\r\n\r\n", Rule(route="x"))

    assert reply.status == 404


def test_head_has_no_body(directory: Path, token: bytes) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n"

    async def main() -> tuple[str, list[tuple[bytes, bytes]]]:
        async with bench(directory, keep([], answer), rules=ROUTE, settings=GITHUB) as table:
            reader, writer = await table.connect()
            for _ in range(2):  # the connections can still be used
                writer.write(b"HEAD /r/github/repos HTTP/1.1\r\nHost: x\r\n\r\n")
                head = await read_head(reader)
            return head

    line, headers = asyncio.run(main())
    assert line.split()[1] == "200" and (b"content-length", b"7") in headers
