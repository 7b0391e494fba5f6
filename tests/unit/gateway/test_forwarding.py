"""Requests on their way: what passes, how soon, and how it looks when something breaks."""

from __future__ import annotations

import asyncio
from asyncio import StreamReader as Reader
from asyncio import StreamWriter as Writer
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanoclawd import credentials
from nanoclawd.errors import ConfigError
from nanoclawd.gateway import limits
from nanoclawd.gateway.redact import Redactor
from nanoclawd.ids import CredentialName
from nanoclawd.policy import Rule
from tests.support.varlink_peer import eventually
from tests.unit.gateway.harness import (
    AGENT,
    KEY,
    OK,
    POST,
    SESSION,
    Handler,
    Reply,
    bench,
    listen,
    post,
    read_chunk,
    read_head,
    read_reply,
    read_request,
)

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def answer(data: bytes, *, wait_body: bool = True) -> Handler:
    async def handler(reader: Reader, writer: Writer) -> None:
        while True:
            await (read_request(reader) if wait_body else read_head(reader))
            writer.write(data)
            await writer.drain()

    return handler


def ask(directory: Path, request: bytes, reply: bytes = OK) -> Reply:
    async def main() -> Reply:
        async with bench(directory, answer(reply)) as table:
            return await table.ask(request)

    return asyncio.run(main())


def test_request_gets_the_key_and_its_own_headers(directory: Path) -> None:
    seen = []

    async def handler(reader: Reader, writer: Writer) -> None:
        seen.append(await read_request(reader))
        writer.write(OK)

    async def main() -> Reply:
        async with bench(directory, handler) as table:
            return await table.ask(
                post(
                    b'{"model": "m"}',
                    path=b"/anthropic/v1/messages?beta=true",
                    headers=b"X-Api-Key: agent\r\nAuthorization: Bearer agent\r\nCookie: a=b\r\n"
                    b"Anthropic-Version: 2023-06-01\r\n",
                )
            )

    reply = asyncio.run(main())

    line, headers, body = seen[0]
    assert line == "POST /v1/messages?beta=true HTTP/1.1"
    assert body == b'{"model": "m"}'
    assert [name for name, _ in headers] == [
        b"host",
        b"anthropic-version",
        b"accept-encoding",
        b"x-api-key",
        b"content-length",
    ]
    assert (b"accept-encoding", b"identity") in headers
    assert (b"x-api-key", KEY) in headers
    assert (reply.status, reply.body) == (200, b"{}")


def test_chunked_body_passes(directory: Path) -> None:
    seen = b""

    async def handler(reader: Reader, writer: Writer) -> None:
        nonlocal seen
        await read_head(reader)
        while not seen.endswith(b"\r\n\r\n"):
            seen += await reader.read(1)
        writer.write(OK)

    async def main() -> Reply:
        async with bench(directory, handler) as table:
            request = (
                POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nT: x\r\n\r\n"
            )
            return await table.ask(request)

    assert asyncio.run(main()).status == 200
    assert seen.endswith(b"\r\n0\r\n\r\n") and b"x=y" not in seen  # no trailers, no extensions


def test_body_passes_while_it_comes(directory: Path) -> None:
    async def main() -> None:
        first = asyncio.Event()

        async def handler(reader: Reader, writer: Writer) -> None:
            await read_head(reader)
            assert await reader.readexactly(1) == b"a"
            first.set()
            assert await reader.readexactly(1) == b"b"
            writer.write(OK)

        async with bench(directory, handler) as table:
            reader, writer = await table.connect()
            writer.write(POST + b"Content-Length: 2\r\n\r\na")
            await first.wait()
            writer.write(b"b")
            assert (await read_reply(reader)).status == 200

    asyncio.run(main())


def test_event_arrives_before_the_next_one_is_sent(directory: Path) -> None:
    async def main() -> None:
        go_on = asyncio.Event()

        async def handler(reader: Reader, writer: Writer) -> None:
            await read_request(reader)
            writer.write(STREAM + b"a\r\nevent: 1\n\n\r\n")
            await go_on.wait()
            writer.write(b"a\r\nevent: 2\n\n\r\n0\r\n\r\n")

        async with bench(directory, handler) as table:
            reader, writer = await table.connect()
            writer.write(post())
            _, headers = await read_head(reader)
            assert (b"transfer-encoding", b"chunked") in headers
            assert await read_chunk(reader) == b"event: 1\n\n"
            go_on.set()
            assert await read_chunk(reader) == b"event: 2\n\n"
            assert await read_chunk(reader) == b""

    asyncio.run(main())


def test_second_request_needs_no_second_connection(directory: Path) -> None:
    async def main() -> int:
        async with bench(directory, answer(OK)) as table:
            await table.ask(post())
            reader, writer = await table.connect()
            for _ in range(3):
                writer.write(post())
                assert (await read_reply(reader)).status == 200
            return len(table.connections)

    assert asyncio.run(main()) == 1


def test_pipelined_requests_are_answered_in_order(directory: Path) -> None:
    async def main() -> list[bytes]:
        async def handler(reader: Reader, writer: Writer) -> None:
            while True:
                body = (await read_request(reader))[2]
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

        async with bench(directory, handler) as table:
            reader, writer = await table.connect()
            writer.write(post(b"1") + post(b"2") + post(b"3"))
            return [(await read_reply(reader)).body for _ in range(3)]

    assert asyncio.run(main()) == [b"1", b"2", b"3"]


def test_connection_that_the_endpoint_closed_is_not_used_again(directory: Path) -> None:
    async def main() -> int:
        async def handler(reader: Reader, writer: Writer) -> None:
            await read_request(reader)
            writer.write(OK)  # and hang up, without having said so

        async with bench(directory, handler) as table:
            for _ in range(3):
                assert (await table.ask(post())).status == 200
                # The endpoint's end of the connection is closed; let the gateway see it.
                await asyncio.wait([task for task in table.connections if task])
                idle = [task for task in asyncio.all_tasks() if task.get_name() == "idle-upstream"]
                if idle:
                    await asyncio.wait(idle)
            return len(table.connections)

    assert asyncio.run(main()) == 3


@pytest.mark.parametrize("when", ["with it", "later"])
def test_answer_that_nobody_asked_for_is_nobodys(directory: Path, when: str) -> None:
    forged = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged"

    async def main() -> list[bytes]:
        answered = asyncio.Event()

        async def handler(reader: Reader, writer: Writer) -> None:
            await read_request(reader)
            writer.write(OK + (forged if when == "with it" else b""))
            await answered.wait()
            if when == "later":
                writer.write(forged)
            await read_request(reader)
            writer.write(OK)

        def waits() -> bool:
            return any(task.get_name() == "idle-upstream" for task in asyncio.all_tasks())

        async with bench(directory, handler) as table:
            bodies = [(await table.ask(post())).body]
            answered.set()
            await eventually(lambda: not waits())  # the connection was given up
            return [*bodies, (await table.ask(post())).body]

    assert asyncio.run(main()) == [b"{}", b"{}"]


def test_request_is_never_sent_twice(directory: Path) -> None:
    received = []

    async def handler(reader: Reader, writer: Writer) -> None:
        received.append(await read_request(reader))
        if len(received) == 1:
            writer.write(OK)
            received.append(await read_request(reader))  # and hang up without an answer

    async def main() -> Reply:
        async with bench(directory, handler) as table:
            await table.ask(post())
            return await table.ask(post())

    reply = asyncio.run(main())

    assert len(received) == 2
    assert (reply.status, reply.error["type"]) == (502, "api_error")


@pytest.mark.parametrize("status", [b"429 Too Many Requests", b"529 Overloaded", b"400 Bad Request"])
def test_error_of_the_endpoint_passes_as_it_is(directory: Path, status: bytes) -> None:
    sent = b"HTTP/1.1 %s\r\nRetry-After: 7\r\nContent-Length: 12\r\n\r\n" % status + b'{"error": 1}'

    reply = ask(directory, post(), sent)

    assert reply.status == int(status[:3])
    assert reply.header(b"retry-after") == b"7"
    assert reply.body == b'{"error": 1}'


def test_redirect_is_not_followed(directory: Path) -> None:
    reply = ask(
        directory, post(), b"HTTP/1.1 307 Go\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
    )

    assert reply.status == 502
    assert "redirects" in reply.error["message"]
    assert reply.header(b"location") is None


def test_key_does_not_come_back_in_headers(directory: Path) -> None:
    echo = (
        b"HTTP/1.1 200 OK\r\nX-Echo: key="
        + KEY.upper()
        + b"\r\nSet-Cookie: a=b\r\nContent-Length: 2\r\n\r\n{}"
    )

    reply = ask(directory, post(), echo)

    assert [name for name, _ in reply.headers] == [b"content-length"]


def test_key_does_not_come_back_in_a_body(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feed, fed = Redactor.feed, asyncio.Event()

    def noted(self: Redactor, data: bytes) -> bytes:
        fed.set()
        return feed(self, data)

    monkeypatch.setattr(Redactor, "feed", noted)

    async def handler(reader: Reader, writer: Writer) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n[" % (len(KEY) + 2) + KEY[:7])
        await writer.drain()
        await fed.wait()  # so that it comes in two pieces
        writer.write(KEY[7:] + b"]")

    async def main() -> Reply:
        async with bench(directory, handler) as table:
            return await table.ask(post())

    assert asyncio.run(main()).body == b"[" + b"*" * len(KEY) + b"]"


@pytest.mark.parametrize(
    "answered",
    [
        b"HTTP/1.1 401 %s\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 401 No\r\nContent-Length: LENGTH\r\n\r\n%s",
        b"HTTP/1.1 401 No\r\nTransfer-Encoding: chunked\r\n\r\n2;%s=%s\r\n{}\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: x\r\n\r\n2\r\n{}\r\n0\r\nX: %s\r\n\r\n",
        b"HTTP/1.1 103 %s\r\nLink: %s\r\n\r\n" + OK,
        b"HTTP/1.1 302 Go\r\nLocation: http://a.example/?%s\r\nContent-Length: LENGTH\r\n\r\n%s",
        b"HTTP/1.1 200 OK\r\nX-%s: 1\r\nContent-Type: x/%s\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 401 No\r\nWWW-Authenticate: %s\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: %s\x00\r\n\r\n",
        b"%s\r\n\r\n",
    ],
)
def test_key_comes_back_nowhere_in_an_answer(
    directory: Path, answered: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    answered = answered.replace(b"%s", KEY).replace(b"LENGTH", b"%d" % len(KEY))

    async def main() -> bytes:
        async with bench(directory, answer(answered)) as table, asyncio.timeout(20):
            reader, writer = await table.connect()
            writer.write(post(headers=b"Connection: close\r\n"))
            return await reader.read()

    said = asyncio.run(main())
    told = capfd.readouterr()

    assert said.startswith(b"HTTP/1.1 ") and KEY not in said
    assert KEY.decode() not in told.out + told.err


def test_answer_in_which_a_key_could_hide_is_refused(directory: Path) -> None:
    reply = ask(
        directory, post(), b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}"
    )

    assert (reply.status, reply.error["type"]) == (502, "api_error")


def test_informational_answers_are_skipped(directory: Path) -> None:
    assert ask(directory, post(), b"HTTP/1.1 103 Hints\r\nLink: </x>\r\n\r\n" + OK).status == 200


@pytest.mark.parametrize(
    "data",
    [
        STREAM + b"5\r\nhello\r\n",
        STREAM + b"5\r\nhello\r\nnonsense\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello",
    ],
)
def test_stream_that_breaks_off_has_no_end(directory: Path, data: bytes) -> None:
    async def main() -> None:
        async def handler(reader: Reader, writer: Writer) -> None:
            await read_request(reader)
            writer.write(data)

        async with bench(directory, handler) as table:
            reader, writer = await table.connect()
            writer.write(post())
            with pytest.raises(asyncio.IncompleteReadError):
                await read_reply(reader)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("data", "status"),
    [(b"", 502), (b"SSH-2.0-x\r\n\r\n", 502), (b"HTTP/1.1 200", 502), (b"HTTP/1.1 101 Up\r\n\r\n", 502)],
)
def test_endpoint_without_an_answer(directory: Path, data: bytes, status: int) -> None:
    async def handler(reader: Reader, writer: Writer) -> None:
        await read_request(reader)
        writer.write(data)

    async def main() -> Reply:
        async with bench(directory, handler) as table:
            return await table.ask(post())

    assert asyncio.run(main()).status == status


def test_endpoint_whose_headers_do_not_end_is_given_up(directory: Path) -> None:
    async def handler(reader: Reader, writer: Writer) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2 * limits.ENDPOINT_HEADER_BYTES)
        await reader.read()

    async def main() -> Reply:
        async with bench(directory, handler) as table:
            return await table.ask(post())

    assert asyncio.run(main()).status == 502


def test_endpoint_that_only_says_that_it_goes_on_is_given_up(directory: Path) -> None:
    async def handler(reader: Reader, writer: Writer) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n" * (limits.INFORMATIONAL + 1))
        await reader.read()

    async def main() -> Reply:
        async with bench(directory, handler) as table:
            return await table.ask(post())

    assert asyncio.run(main()).status == 502


def test_refused_connection(directory: Path) -> None:
    async def main() -> Reply:
        async with bench(directory, None) as table:
            return await table.ask(post())

    reply = asyncio.run(main())

    assert (reply.status, reply.error["type"]) == (502, "api_error")
    assert "127.0.0.1" in reply.error["message"]


def test_unknown_host(directory: Path) -> None:
    async def main() -> Reply:
        elsewhere = '[providers.anthropic]\nendpoint = "https://nowhere.invalid"\n'
        async with bench(directory, None, settings=elsewhere) as table:
            return await table.ask(post())

    reply = asyncio.run(main())

    assert reply.status == 502
    assert "nowhere.invalid" in reply.error["message"]


@pytest.mark.parametrize(
    ("limit", "data"),
    [("ANSWER_S", b""), ("ANSWER_S", b"HTTP/1.1 100 Continue\r\n\r\n"), ("ANSWER_S", b"HTTP")],
)
def test_silent_endpoint(directory: Path, monkeypatch: pytest.MonkeyPatch, limit: str, data: bytes) -> None:
    monkeypatch.setattr(limits, limit, 0.05)

    async def handler(reader: Reader, writer: Writer) -> None:
        await read_request(reader)
        writer.write(data)
        await reader.read()

    async def main() -> Reply:
        async with bench(directory, handler) as table:
            return await table.ask(post())

    reply = asyncio.run(main())

    assert (reply.status, reply.error["type"]) == (504, "timeout_error")


def test_endpoint_may_answer_before_it_has_read_all(directory: Path) -> None:
    early = b"HTTP/1.1 413 Large\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"

    async def main() -> Reply:
        async with bench(directory, answer(early, wait_body=False)) as table:
            reader, writer = await table.connect()
            writer.write(POST + b"Content-Length: 1000\r\n\r\nx")
            return await read_reply(reader)

    assert asyncio.run(main()).status == 413


def test_agent_that_hangs_up_ends_the_request(directory: Path) -> None:
    async def main() -> None:
        gone = asyncio.Event()

        async def handler(reader: Reader, writer: Writer) -> None:
            await read_request(reader)
            writer.write(STREAM + b"5\r\nhello\r\n")
            await reader.read()
            gone.set()

        async with bench(directory, handler) as table:
            reader, writer = await table.connect()
            writer.write(post())
            await reader.readuntil(b"hello")
            writer.close()
            await gone.wait()

    asyncio.run(main())


def test_agent_that_does_not_read_stops_its_endpoint(directory: Path) -> None:
    async def main() -> tuple[int, int]:
        size = 64 << 20
        sent = 0
        stalled = asyncio.Event()

        async def handler(reader: Reader, writer: Writer) -> None:
            nonlocal sent
            await read_request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
            while sent < size:
                writer.write(b"x" * 65536)
                sent += 65536
                try:
                    async with asyncio.timeout(0.5):
                        await writer.drain()
                except TimeoutError:
                    stalled.set()
                    await writer.drain()

        async with bench(directory, handler) as table:
            reader, writer = await table.connect()
            writer.write(post())
            await stalled.wait()
            at_stall = sent
            other = await table.ask(post(path=b"/anthropic/v1/none"))
            assert other.status == 403  # nobody else waits
            _, headers = await read_head(reader)
            assert (b"content-length", b"%d" % size) in headers
            left = size
            while left:
                left -= len(await reader.read(1 << 20))
            return at_stall, sent

    at_stall, sent = asyncio.run(main())

    assert at_stall < 32 << 20
    assert sent == 64 << 20


def test_missing_key_tells_what_to_do(directory: Path) -> None:
    credentials.remove(CredentialName("anthropic"))

    reply = ask(directory, post(b"x" * 100_000))

    assert (reply.status, reply.error["type"]) == (401, "authentication_error")
    assert "nanoclawctl secret set anthropic" in reply.error["message"]


def test_new_key_counts_from_the_next_request_on(directory: Path) -> None:
    seen = []

    async def handler(reader: Reader, writer: Writer) -> None:
        while True:
            seen.append(dict((await read_request(reader))[1])[b"x-api-key"])
            writer.write(OK)

    async def main() -> None:
        async with bench(directory, handler) as table:
            await table.ask(post())
            credentials.write(CredentialName("anthropic"), b"sk-second")
            await table.ask(post())
            credentials.remove(CredentialName("anthropic"))
            assert (await table.ask(post())).status == 401
            credentials.write(CredentialName("anthropic"), b"sk-third")
            await table.ask(post())

    asyncio.run(main())

    assert seen == [KEY, b"sk-second", b"sk-third"]


def test_key_that_is_no_header_value_is_not_used(directory: Path) -> None:
    credentials.write(CredentialName("anthropic"), b"sk-1\r\nX-Evil: 1")

    assert ask(directory, post()).status == 401


def test_broken_configuration_refuses_all(directory: Path) -> None:
    async def main() -> Reply:
        async with bench(directory, answer(OK)) as table:
            table.gateway.settings = ConfigError("nanoclaw.toml:3: is wrong")
            return await table.ask(post())

    reply = asyncio.run(main())

    assert reply.status == 503
    assert "nanoclaw.toml:3" in reply.error["message"]


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}", 400),
        (POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
        (POST + b"Content-Length: -1\r\n\r\n", 400),
        (POST + b"Content-Length: +2\r\n\r\n{}", 400),
        (POST + b"Content-Length: 2, 3\r\n\r\n{}", 400),
        (POST + b"Content-Length: 0x2\r\n\r\n{}", 400),
        (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n", 501),
        (POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n", 400),
        (POST + b"Transfer-Encoding : chunked\r\n\r\n", 400),
        (POST + b"X: a\r\n folded\r\nTransfer-Encoding:\r\n chunked\r\nContent-Length: 2\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n+2\r\n{}\r\n0\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}}0\r\n\r\n", 400),
        (POST + b"Host: evil.example\r\n\r\n", 400),
        (b"POST /anthropic/v1/messages HTTP/1.1\r\n\r\n", 400),
        (b"POST /anthropic/v1/messages HTTP/1.0\r\nHost: a\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (POST + b"X: a\x00b\r\n\r\n", 400),
        (POST + b"X y: z\r\n\r\n", 400),
        (b"GARBAGE\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\r\n\r\n", 400),
        (POST + b"X: " + b"y" * limits.HEADER_BYTES + b"\r\n\r\n", 431),
        (POST + b"Content-Length: %d\r\n\r\n" % (Rule().max_up_bytes + 1), 413),
        (b"GET /anthropic/v1/models HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx", 400),
    ],
)
def test_malformed_request_is_refused(directory: Path, request_bytes: bytes, status: int) -> None:
    reply = ask(directory, request_bytes)

    assert reply.status == status
    assert reply.error["message"]
    assert reply.header(b"connection") == b"close"


def test_chunked_body_over_the_limit_is_refused(directory: Path) -> None:
    async def main() -> Reply:
        rules = (Rule(route="anthropic", max_up_bytes=100),)
        async with bench(directory, answer(OK), rules=rules) as table:
            chunk = b"40\r\n" + b"x" * 64 + b"\r\n"
            return await table.ask(POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 2 + b"0\r\n\r\n")

    assert asyncio.run(main()).status == 413


@pytest.mark.parametrize(
    ("limit", "request_bytes"),
    [
        ("HEADERS_S", b"POST /anth"),
        ("BODY_SILENCE_S", POST + b"Content-Length: 2\r\n\r\n{"),
        ("BODY_S", POST + b"Content-Length: 2\r\n\r\n{"),
    ],
)
def test_slow_agent_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch, limit: str, request_bytes: bytes
) -> None:
    monkeypatch.setattr(limits, limit, 0.05)

    reply = ask(directory, request_bytes)

    assert (reply.status, reply.error["type"]) == (408, "timeout_error")


def test_headers_without_end_are_refused(directory: Path) -> None:
    async def main() -> Reply:
        async with bench(directory, answer(OK)) as table, asyncio.timeout(20):
            reader, writer = await table.connect()
            writer.write(POST + b"X: ")
            for _ in range(limits.HEADER_BYTES // 1000 + 1):
                writer.write(b"y" * 1000)  # in reads of their own, all of them shorter than the limit
                await writer.drain()
                await asyncio.sleep(0)
            return await read_reply(reader)

    assert asyncio.run(main()).status == 431


def test_connection_without_a_request_is_closed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def handler(reader: Reader, writer: Writer) -> None:
        await read_request(reader)
        monkeypatch.setattr(limits, "KEEP_ALIVE_S", 0.05)  # not before: else it might not even get here
        writer.write(OK)
        await reader.read()

    async def main() -> None:
        async with bench(directory, handler) as table, asyncio.timeout(20):
            reader, writer = await table.connect()
            writer.write(post())
            assert (await read_reply(reader)).status == 200
            assert await reader.read() == b""
            reader, _ = await table.connect()
            assert await reader.read() == b""

    asyncio.run(main())


def test_agent_that_takes_nothing_is_given_up(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "AGENT_STALL_S", 0.05)

    async def main() -> None:
        async def handler(reader: Reader, writer: Writer) -> None:
            await read_request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (64 << 20))
            writer.write(b"x" * (64 << 20))
            await reader.read()

        async with bench(directory, handler) as table, asyncio.timeout(20):
            _, writer = await table.connect()
            writer.write(post())
            await eventually(lambda: table.connections)
            await asyncio.wait([task for task in table.connections if task])  # the gateway hung up

    asyncio.run(main())


def test_endpoint_that_takes_nothing_is_given_up(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ENDPOINT_STALL_S", 0.05)

    async def main() -> Reply:
        async def handler(reader: Reader, writer: Writer) -> None:
            await asyncio.Event().wait()

        async with bench(directory, handler) as table, asyncio.timeout(20):
            reply = await table.ask(post(b"x" * (16 << 20)))
            for task in table.connections:
                assert task is not None
                task.cancel()
            return reply

    assert asyncio.run(main()).status == 504


def test_endpoint_that_falls_silent_is_given_up(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SILENCE_S", 0.05)

    async def main() -> None:
        async def handler(reader: Reader, writer: Writer) -> None:
            await read_request(reader)
            writer.write(STREAM + b"5\r\nhello\r\n")
            await reader.read()

        async with bench(directory, handler) as table, asyncio.timeout(20):
            reader, writer = await table.connect()
            writer.write(post())
            with pytest.raises(asyncio.IncompleteReadError):
                await read_reply(reader)

    asyncio.run(main())


def test_refused_agent_that_stays_is_hung_up_on(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINGER_S", 0.05)

    async def main() -> None:
        async with bench(directory, answer(OK)) as table:
            reader, writer = await table.connect()
            writer.write(POST + b"Content-Length: -1\r\n\r\n")
            assert (await read_reply(reader)).status == 400
            await eventually(lambda: not table.session.open)

    asyncio.run(main())


def test_too_many_requests_are_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REQUESTS_BURST", 2)
    monkeypatch.setattr(limits, "REQUESTS_PER_S", 0.001)
    monkeypatch.setattr(limits, "TOO_FAST_S", 0.01)

    async def main() -> list[int]:
        async with bench(directory, answer(OK)) as table:
            return [(await table.ask(post())).status for _ in range(3)]

    assert asyncio.run(main()) == [200, 200, 429]


def test_connections_of_a_session_are_bounded(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CONNECTIONS", 2)

    async def main() -> None:
        async with bench(directory, answer(OK)) as table:
            held = [await table.connect() for _ in range(3)]
            for reader, writer in held[:2]:
                writer.write(post())
                await read_reply(reader)
            held[2][1].write(post())
            waiting = asyncio.ensure_future(read_reply(held[2][0]))
            await asyncio.wait([waiting], timeout=0.1)
            assert not waiting.done() and len(table.session.open) == 2
            held[0][1].close()
            assert (await waiting).status == 200

    asyncio.run(main())


def test_expect_continue(directory: Path) -> None:
    async def main() -> None:
        async with bench(directory, answer(OK)) as table:
            reader, writer = await table.connect()
            writer.write(POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")
            assert (await read_head(reader))[0].split()[1] == "100"
            writer.write(b"{}")
            assert (await read_reply(reader)).status == 200

    asyncio.run(main())


def test_attaching_again_leaves_open_connections_alone(directory: Path) -> None:
    async def main() -> None:
        async with bench(directory, answer(OK)) as table:
            reader, writer = await table.connect()
            writer.write(post())
            await read_reply(reader)
            second = directory / "second.sock"

            table.gateway.attach(AGENT, SESSION, listen(second))

            writer.write(post())
            assert (await read_reply(reader)).status == 200
            table.path = second
            assert (await table.ask(post())).status == 200
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_unix_connection(directory / "gateway.sock")

    asyncio.run(main())


def test_detaching_ends_listener_and_connections(directory: Path) -> None:
    async def main() -> None:
        async with bench(directory, answer(OK)) as table:
            reader, writer = await table.connect()
            writer.write(post())
            await read_reply(reader)

            table.gateway.detach(AGENT, SESSION)

            assert await reader.read() == b""
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_unix_connection(table.path)
            assert not table.gateway.sessions

    asyncio.run(main())


def test_stop_cuts_off_what_does_not_end(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DRAIN_S", 0.05)

    async def main() -> None:
        async def handler(reader: Reader, writer: Writer) -> None:
            await read_request(reader)
            writer.write(STREAM + b"5\r\nhello\r\n")
            await reader.read()

        async with bench(directory, handler) as table:
            reader, writer = await table.connect()
            idle, _ = await table.connect()
            writer.write(post())
            await reader.readuntil(b"hello\r\n")

            await table.gateway.drain()

            assert await reader.read() == b""
            assert await idle.read() == b""

    asyncio.run(main())


#: Pieces that make requests which are almost right.
PIECES = st.sampled_from(
    [
        b"POST ",
        b"GET ",
        b"/anthropic/v1/messages",
        b"/anthropic/v1/models",
        b" HTTP/1.1",
        b"\r\n",
        b"\n",
        b"\r",
        b"Host: a",
        b"CONNECT ",
        b"http://127.0.0.1:",
        b"a.example:443",
        b"/r/github/",
        b"%2e",
        b"Content-Length: ",
        b"Transfer-Encoding: chunked",
        b"Expect: 100-continue",
        b": ",
        b" ",
        b"0",
        b"Connection: close",
        b"Upgrade: websocket",
        b"5",
        b"hello",
        b"\r\n\r\n",
        b"\x00",
        b"\xff",
        b"?beta=true",
    ]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(PIECES, max_size=25).map(b"".join), min_size=1, max_size=6))
def test_nothing_that_an_agent_sends_stops_the_gateway(directory: Path, sent: list[bytes]) -> None:
    async def main() -> None:
        async with bench(directory, answer(OK)) as table:
            for data in sent:
                reader, writer = await table.connect()
                writer.write(POST[:-2] + data if data.startswith(b"\r\n") else data)
                writer.write_eof()
                async with asyncio.timeout(10):
                    reply = await reader.read()
                assert reply == b"" or reply.startswith(b"HTTP/1.1 ")
            assert (await table.ask(post())).status == 200
        table.path.unlink()

    asyncio.run(main())
