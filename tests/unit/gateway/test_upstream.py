"""Connections to servers: which address is tried, and that none is left open, whenever we give up."""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
from asyncio import StreamReader, StreamWriter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from nanoclawd.gateway.upstream import Pool, make_tls
from nanoclawd.routes import Endpoint
from tests.support.varlink_peer import eventually
from tests.unit.gateway.test_tls import certificate

assert certificate  # a fixture
TURNS = 40  #: of the event loop; a connection with TLS needs some 15 here


def with_server(work: Callable[[Pool, int], Awaitable[None]], tls: ssl.SSLContext | None = None) -> None:
    """Have `work` connect to a port of 127.0.0.1; fails if one of its connections stays."""
    open_now: set[StreamWriter] = set()

    async def serve(reader: StreamReader, writer: StreamWriter) -> None:
        open_now.add(writer)
        try:
            await reader.read()
        except OSError:
            pass
        finally:
            writer.close()
            open_now.discard(writer)

    async def main() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
        async with asyncio.TaskGroup() as tasks:
            pool = Pool(tasks, make_tls())
            await work(pool, server.sockets[0].getsockname()[1])
            pool.close()
        await eventually(lambda: not open_now)
        server.close()
        await server.wait_closed()

    asyncio.run(main())


@pytest.mark.parametrize("is_secure", [False, True])
def test_connection_that_nobody_waits_for_any_more_is_closed(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, is_secure: bool
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)

    async def work(pool: Pool, port: int) -> None:
        endpoint = Endpoint(tls=is_secure, host="localhost", port=port, path="")
        for turns in range(TURNS):
            connecting = asyncio.ensure_future(pool.connect(endpoint))
            for _ in range(turns):
                await asyncio.sleep(0)
            connecting.cancel()
            await asyncio.wait([connecting])
            if not connecting.cancelled():
                connecting.result().abort()
            gc.collect()  # what was forgotten warns, and that fails the test

    with_server(work, tls if is_secure else None)


def test_address_that_does_not_answer_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    connect = asyncio.open_connection

    async def open_connection(host: str, port: int, **options: object) -> object:
        tried.append(host)
        return await connect(host, port, **options)  # type: ignore[arg-type]  # what upstream.py gives

    def getaddrinfo(host: str, port: int, *_: object, **__: object) -> list[object]:
        found = ("127.0.0.9", "127.0.0.1") if host == "api.example" else (host,)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    monkeypatch.setattr(asyncio, "open_connection", open_connection)
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    async def work(pool: Pool, port: int) -> None:
        for _ in range(3):
            (await pool.connect(Endpoint(tls=False, host="api.example", port=port, path=""))).abort()

    with_server(work)

    assert tried == ["127.0.0.9", "127.0.0.1", "127.0.0.1", "127.0.0.1"]
