"""A gateway on real sockets, with an endpoint whose every byte a test decides."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nanoclawd.budget import NO_LIMITS, Budget, Spent, today
from nanoclawd.gateway.sessions import Gateway, Session
from nanoclawd.gateway.upstream import make_tls
from nanoclawd.ids import AgentName, SessionName
from nanoclawd.policy import Policy, Rule, Rules, Unknown
from nanoclawd.settings import parse_settings

AGENT, SESSION = AgentName("berta"), SessionName("s1")
KEY = b"sk-ant-test-0123456789"
MODEL_ONLY: Rules = (Rule(route="anthropic"),)
HANDLER_PORT = 1  #: in rules: the port of the handler

#: Answers one connection of the gateway; it reads requests with read_request().
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

POST = b"POST /anthropic/v1/messages HTTP/1.1\r\nHost: gateway\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


def post(body: bytes = b"{}", *, headers: bytes = b"", path: bytes = b"/anthropic/v1/messages") -> bytes:
    return (
        b"POST %s HTTP/1.1\r\nHost: gateway\r\nContent-Length: %d\r\n%s\r\n" % (path, len(body), headers)
        + body
    )


@dataclass
class Reply:
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key == name), None)

    @property
    def error(self) -> dict[str, str]:
        document = json.loads(self.body)
        assert document["type"] == "error"
        error: dict[str, str] = document["error"]
        return error


async def read_head(reader: asyncio.StreamReader) -> tuple[str, list[tuple[bytes, bytes]]]:
    """Return the first line and the headers, their names in lower case."""
    lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[:-2]
    pairs = [line.partition(b":") for line in lines[1:]]
    return lines[0].decode(), [(name.lower(), value.strip()) for name, _, value in pairs]


async def read_request(reader: asyncio.StreamReader) -> tuple[str, list[tuple[bytes, bytes]], bytes]:
    """Return request line, headers and body of what the gateway sent."""
    line, headers = await read_head(reader)
    return line, headers, await _read_body(reader, headers)


async def read_reply(reader: asyncio.StreamReader) -> Reply:
    """Return the next answer; raises IncompleteReadError if it breaks off."""
    line, headers = await read_head(reader)
    return Reply(int(line.split()[1]), headers, await _read_body(reader, headers))


async def _read_body(reader: asyncio.StreamReader, headers: list[tuple[bytes, bytes]]) -> bytes:
    named = dict(headers)
    if named.get(b"transfer-encoding") == b"chunked":
        body = b""
        while piece := await read_chunk(reader):
            body += piece
        return body
    return await reader.readexactly(int(named.get(b"content-length", b"0")))


async def read_chunk(reader: asyncio.StreamReader) -> bytes:
    size = int(await reader.readuntil(b"\r\n"), 16)
    return (await reader.readexactly(size + 2))[:-2]


@dataclass
class Bench:
    """What a test has in its hands."""

    gateway: Gateway
    path: Path  #: the session's socket
    port: int  #: of the endpoint
    #: One a connection to the endpoint.
    connections: list[asyncio.Task[Any] | None] = field(default_factory=list)
    _open: list[asyncio.StreamWriter] = field(default_factory=list)

    @property
    def session(self) -> Session:
        return self.gateway.sessions[AGENT, SESSION]

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_unix_connection(self.path)
        self._open.append(writer)
        return reader, writer

    async def ask(self, request: bytes) -> Reply:
        """Send `request` on a connection of its own; return the answer."""
        reader, writer = await self.connect()
        writer.write(request)
        async with asyncio.timeout(20):
            return await read_reply(reader)

    async def close(self) -> None:
        for writer in self._open:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def listen(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen(128)
    return sock


@contextlib.asynccontextmanager
async def bench(
    directory: Path,
    handler: Handler | None,
    *,
    settings: str = "",
    tls: ssl.SSLContext | None = None,
    rules: Rules = MODEL_ONLY,
    budget: Budget = NO_LIMITS,
    unknown: Unknown = Unknown.DENY,
) -> AsyncIterator[Bench]:
    """Run a gateway with one session, forwarding to `handler` (None: to a port where nobody listens).

    With `tls` the endpoint speaks TLS, as https://localhost. In `settings` PORT stands
    for its port, in `rules` HANDLER_PORT.
    """

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert handler is not None
        table.connections.append(asyncio.current_task())
        try:
            await handler(reader, writer)
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    if handler is None:
        server.close()
        await server.wait_closed()
    endpoint = f"https://localhost:{port}" if tls else f"http://127.0.0.1:{port}"
    rules = tuple(replace(rule, port=port) if rule.port == HANDLER_PORT else rule for rule in rules)
    settings = settings.replace("PORT", str(port)) or f'[providers.anthropic]\nendpoint = "{endpoint}"\n'
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        gateway = Gateway(tasks, make_tls())
        gateway.settings = parse_settings(settings)
        path = directory / "gateway.sock"
        gateway.ledger.set_budget(AGENT, budget, today(), Spent(), {})
        gateway.set_policy(AGENT, Policy(rules=rules, unknown=unknown))
        gateway.attach(AGENT, SESSION, listen(path))
        table = Bench(gateway, path, port)
        try:
            yield table
        finally:
            await table.close()
            await gateway.drain()
            server.close()
            await server.wait_closed()
            if handlers := [task for task in table.connections if task]:
                await asyncio.wait(handlers)
