"""A tunnel: bytes both ways, counted, until both sides have ended, or too much, or nothing, has come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from nanoclawd.gateway import limits
from nanoclawd.gateway.http import deadline
from nanoclawd.policy import Denied

Side = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def relay(agent: Side, server: Side, early: bytes, count: Callable[[int, int], None]) -> None:
    """Pass everything on, `early` first, which has come from the agent already.

    `count` is told the bytes up and down before they pass; what it raises ends the tunnel, as do Denied for
    one that is idle, and OSError if a side breaks off.
    """
    loop = asyncio.get_running_loop()

    async def pass_on(
        source: asyncio.StreamReader, sink: asyncio.StreamWriter, up: int, data: bytes
    ) -> None:
        while data := data or await source.read(limits.CHUNK_BYTES):
            count(len(data) * up, len(data) * (1 - up))
            sink.write(data)
            await sink.drain()
            idle.reschedule(loop.time() + limits.TUNNEL_IDLE_S)
            data = b""
        sink.write_eof()

    try:
        async with (
            deadline(limits.TUNNEL_IDLE_S, 504, "idle", "Nothing came for too long.") as idle,
            asyncio.TaskGroup() as tasks,
        ):
            tasks.create_task(pass_on(agent[0], server[1], 1, early), name="up")
            tasks.create_task(pass_on(server[0], agent[1], 0, b""), name="down")
    except BaseExceptionGroup as group:
        # Both ends may fail in the same moment; a bug goes first.
        raise min(group.exceptions, key=lambda exc: isinstance(exc, Denied | OSError)) from None
