"""HTTP/1.1 on a pair of streams, either side: h11 knows the protocol, this waits for the bytes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import h11

from nanoclawd.gateway import limits
from nanoclawd.policy import Denied


class Stream:
    """One connection. Whoever has it ends it by abort()."""

    def __init__(
        self, http: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.http, self.reader, self.writer = http, reader, writer

    async def send(self, event: h11.Event, *, stall_s: float) -> None:
        """Send an event. Raises OSError if the other side hung up, TimeoutError if it takes nothing."""
        self.writer.write(self.http.send(event) or b"")
        async with asyncio.timeout(stall_s):
            await self.writer.drain()

    async def receive(self) -> h11.Event:
        """Return what comes next. Raises h11.RemoteProtocolError if that is no HTTP, OSError at a break."""
        try:
            while (event := self.http.next_event()) is h11.NEED_DATA:
                self.http.receive_data(await self.reader.read(limits.CHUNK_BYTES))
        except h11.RemoteProtocolError as exc:
            if self.reader.at_eof():
                raise ConnectionResetError from exc
            raise
        if isinstance(event, h11.ConnectionClosed):
            raise ConnectionResetError
        assert isinstance(event, h11.Event)  # PAUSED comes only after the end
        return event

    @property
    def is_done(self) -> bool:
        """Whether request and answer are complete."""
        return self.http.our_state is h11.DONE and self.http.their_state is h11.DONE

    def abort(self) -> None:
        """Close at once. Harmless if repeated."""
        self.writer.transport.abort()


@contextlib.asynccontextmanager
async def deadline(seconds: float, status: int, reason: str, message: str) -> AsyncIterator[asyncio.Timeout]:
    """Raise that Denied when the block takes longer; its clock can be set anew."""
    try:
        async with asyncio.timeout(seconds) as clock:
            yield clock
    except TimeoutError:
        raise Denied(status, reason, message) from None
