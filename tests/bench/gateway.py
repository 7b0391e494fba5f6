"""What the gateway costs: a small call, a large answer, the first byte; direct, by route, by tunnel."""

from __future__ import annotations

import asyncio
import sys
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from nanoclawd import paths
from nanoclawd.ids import AgentName, SessionName
from nanoclawd.policy import Rule, to_json
from tests.bench import host
from tests.bench.adapter import agent, attach, control, deliver, open_channel
from tests.bench.figures import Figure, distribution, ratio, single

CTL = "nanoclawctl"
AGENT = AgentName("bench_gateway")
LARGE_BYTES = 128 << 20
#: GET /small, /large or /stream, over and over. In a process of its own.
SERVER = f"""
import asyncio
async def serve(reader, writer):
    try:
        while head := await reader.readuntil(b"\\r\\n\\r\\n"):
            path = head.split()[1]
            size = 2 if path.endswith(b"/small") else {LARGE_BYTES}
            if path.endswith(b"/stream"):
                writer.write(b"HTTP/1.1 200 OK\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n2\\r\\nab\\r\\n")
                await asyncio.sleep(0.005)
                writer.write(b"0\\r\\n\\r\\n")
                continue
            writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % size)
            while size:
                piece = min(size, 65536)
                writer.write(bytes(piece))
                await writer.drain()
                size -= piece
    except (asyncio.IncompleteReadError, OSError):
        writer.close()
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""

Connect = Callable[[], Awaitable[tuple[StreamReader, StreamWriter]]]


async def measure(quick: bool) -> AsyncIterator[Figure]:
    rounds = 50 if quick else 200
    settings = paths.config() / "nanoclaw.toml"
    before = settings.read_text() if settings.exists() else None
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVER, stdout=asyncio.subprocess.PIPE
    )
    assert server.stdout is not None
    port = int(await server.stdout.readline())
    settings.write_text(
        f'[[routes]]\nname = "bench"\nendpoint = "http://127.0.0.1:{port}"\ncredential = "bench"\n'
    )
    try:
        await host.run(CTL, "secret", "set", "bench", input=b"bench-key")
        await host.systemctl("reload", host.ROUTER)
        async with _session(port) as socket:
            ways: dict[str, tuple[str, Connect]] = {
                "direct": ("", lambda: asyncio.open_connection("127.0.0.1", port)),
                "by route": ("/r/bench", lambda: asyncio.open_unix_connection(socket)),
                "by tunnel": ("", lambda: _tunnel(socket, port)),
            }
            small = {way: await _small(way, *how, rounds) for way, how in ways.items()}
            for way, figure in small.items():
                yield figure
                if way != "direct":
                    yield ratio(f"… {way}, ratio to direct", figure, small["direct"])
            for way, how in ways.items():
                yield await _large(way, *how)
            for way, how in ways.items():
                yield await _first_byte(way, *how, rounds // 2)
    finally:
        server.kill()
        await server.wait()
        if before is None:
            settings.unlink()
        else:
            settings.write_text(before)
        await host.run(CTL, "secret", "remove", "bench", "--yes")
        await host.systemctl("reload", host.ROUTER)


@asynccontextmanager
async def _session(port: int) -> AsyncIterator[str]:
    """Give the gateway's socket of a session whose agent may ask the server, by route and by tunnel."""
    async with agent(AGENT) as name, attach() as adapter, AsyncExitStack() as stack:
        for rule in (Rule(route="bench", per_minute=60_000), Rule(host="127.0.0.1", port=port)):
            await control("AddRule", name=name, rule=to_json(rule))
        await deliver(await open_channel(stack), name, "gateway", "gateway", "hello")
        await adapter.wait_reply("gateway")
        found = await control("ListSessions", agent=name)
        session = SessionName(found["session"]["session"])
        yield str(paths.session_runtime(AGENT, session) / "gateway.sock")


async def _tunnel(socket: str, port: int) -> tuple[StreamReader, StreamWriter]:
    reader, writer = await asyncio.open_unix_connection(socket)
    writer.write(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: x\r\n\r\n" % port)
    answer = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in answer:
        raise RuntimeError(f"no tunnel: {answer!r}")
    return reader, writer


async def _ask(reader: StreamReader, writer: StreamWriter, path: str) -> None:
    """Send a request and read the head of its answer."""
    writer.write(b"GET %s HTTP/1.1\r\nHost: bench\r\n\r\n" % path.encode())
    answer = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in answer:
        raise RuntimeError(f"{path}: {answer!r}")


async def _small(way: str, prefix: str, connect: Connect, rounds: int) -> Figure:
    reader, writer = await connect()
    taken = []
    for _ in range(rounds + 1):  # the first one does not count
        began = time.monotonic()
        await _ask(reader, writer, f"{prefix}/small")
        await reader.readexactly(2)
        taken.append((time.monotonic() - began) * 1000)
    writer.close()
    return distribution(f"gateway: a small call, {way}", "ms", taken[1:])


async def _large(way: str, prefix: str, connect: Connect) -> Figure:
    reader, writer = await connect()
    began, left = time.monotonic(), LARGE_BYTES
    await _ask(reader, writer, f"{prefix}/large")
    while left:
        left -= len(await reader.read(1 << 18))
    taken_s = time.monotonic() - began
    writer.close()
    return single(f"gateway: a large answer, {way}", "MB/s", LARGE_BYTES / 1e6 / taken_s)


async def _first_byte(way: str, prefix: str, connect: Connect, rounds: int) -> Figure:
    reader, writer = await connect()
    taken = []
    for _ in range(rounds + 1):
        began = time.monotonic()
        await _ask(reader, writer, f"{prefix}/stream")
        await reader.readexactly(1)
        taken.append((time.monotonic() - began) * 1000)
        await reader.readuntil(b"\r\n0\r\n\r\n")
    writer.close()
    return distribution(f"gateway: first byte of a stream, {way}", "ms", taken[1:])
