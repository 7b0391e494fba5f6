"""Connections to model endpoints: opened, kept for the next request, given up.

A request is never sent twice: what an endpoint did with one that it did not answer is unknown. A kept
connection is watched, so that one which the endpoint has closed is not used; in the rest of cases the
agent's SDK tries again.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from dataclasses import dataclass

import h11

from nanoclawd.gateway import limits
from nanoclawd.gateway.replies import ErrorReply
from nanoclawd.settings import Endpoint


class Upstream:
    """One open connection to an endpoint. Whoever has it ends it by abort() or Pool.put_back()."""

    def __init__(
        self, endpoint: Endpoint, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.endpoint = endpoint
        self.reader = reader
        self._writer = writer
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=limits.ENDPOINT_HEADER_BYTES)

    async def send(self, event: h11.Event) -> None:
        """Send a part of the request.

        Raises ErrorReply if the endpoint takes nothing, OSError if it hung up.
        """
        data = self._http.send(event)
        if data:
            self._writer.write(data)
        try:
            async with asyncio.timeout(limits.ENDPOINT_STALL_S):
                await self._writer.drain()
        except TimeoutError:
            raise ErrorReply(504, "The endpoint takes no data.", reason="endpoint-stalled") from None

    async def answer(self) -> h11.Response:
        """Return the head of the answer. Raises ErrorReply."""
        try:
            async with asyncio.timeout(limits.ANSWER_S):
                for _ in range(limits.INFORMATIONAL):
                    event = await self._event()
                    if isinstance(event, h11.Response):
                        return event
        except TimeoutError:
            raise ErrorReply(504, "The endpoint did not answer in time.", reason="endpoint-silent") from None
        raise ErrorReply(502, "The endpoint's answer cannot be read.", reason="endpoint-answer")

    async def piece(self) -> bytes | None:
        """Return the next piece of the answer's body, or None at its end.

        Raises ErrorReply if it breaks off.
        """
        try:
            async with asyncio.timeout(limits.SILENCE_S):
                event = await self._event()
        except TimeoutError:
            raise ErrorReply(504, "The endpoint fell silent.", reason="endpoint-silent") from None
        return bytes(event.data) if isinstance(event, h11.Data) else None

    def start_again(self) -> bool:
        """Get ready for a next request; False if the connection cannot carry one."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return not self._http.trailing_data[0] and not self.reader.at_eof()

    def abort(self) -> None:
        """Close at once. Harmless if repeated."""
        self._writer.transport.abort()

    async def _event(self) -> h11.Event:
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                self._http.receive_data(await self.reader.read(limits.CHUNK_BYTES))
        except h11.RemoteProtocolError as exc:
            if self.reader.at_eof():
                raise ErrorReply(502, "The endpoint broke off.", reason="endpoint-broke-off") from exc
            raise ErrorReply(502, "The endpoint does not speak HTTP.", reason="endpoint-answer") from exc
        except OSError as exc:
            raise ErrorReply(502, "The endpoint broke off.", reason="endpoint-broke-off") from exc
        if isinstance(event, h11.ConnectionClosed):
            raise ErrorReply(502, "The endpoint hung up without an answer.", reason="endpoint-broke-off")
        assert isinstance(event, h11.Event)  # PAUSED comes only after the end
        return event


@dataclass(frozen=True, slots=True)
class _Idle:
    upstream: Upstream
    watch: asyncio.Task[None]


class Pool:
    """Connections that wait for a next request. Its tasks live in `tasks`; close() ends all that wait."""

    def __init__(self, tasks: asyncio.TaskGroup, tls: ssl.SSLContext) -> None:
        self._tasks = tasks
        self._tls = tls
        self._idle: dict[Endpoint, list[_Idle]] = {}

    async def connect(self, endpoint: Endpoint) -> Upstream:
        """Return a connection, by preference the one used last. Raises ErrorReply."""
        while waiting := self._idle.get(endpoint):
            idle = waiting.pop()
            idle.watch.cancel()
            try:
                await asyncio.wait([idle.watch])
            except asyncio.CancelledError:
                idle.upstream.abort()
                raise
            if idle.watch.cancelled() and not idle.upstream.reader.at_eof():
                return idle.upstream
            idle.upstream.abort()
        return await self._open(endpoint)

    def put_back(self, upstream: Upstream) -> None:
        """Keep `upstream`, whose answer was read to its end, for the next request if it can carry one."""
        waiting = self._idle.setdefault(upstream.endpoint, [])
        if len(waiting) >= limits.POOL_SIZE or not upstream.start_again():
            upstream.abort()
            return
        waiting.append(_Idle(upstream, self._tasks.create_task(self._watch(upstream), name="idle-upstream")))

    def close(self) -> None:
        """Close what waits."""
        for waiting in self._idle.values():
            for idle in waiting:
                idle.watch.cancel()
                idle.upstream.abort()
        self._idle.clear()

    async def _watch(self, upstream: Upstream) -> None:
        """Wait until the endpoint hangs up or says what nobody asked for, or for too long; then give up."""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(limits.POOL_IDLE_S):
                await upstream.reader.read(1)
        upstream.abort()
        waiting = self._idle.get(upstream.endpoint, [])
        waiting[:] = [idle for idle in waiting if idle.upstream is not upstream]

    async def _open(self, endpoint: Endpoint) -> Upstream:
        at = f"{endpoint.host}:{endpoint.port}"
        try:
            async with asyncio.timeout(limits.CONNECT_S):
                reader, writer = await asyncio.open_connection(
                    endpoint.host,
                    endpoint.port,
                    ssl=self._tls if endpoint.tls else None,
                    limit=limits.CHUNK_BYTES,
                    happy_eyeballs_delay=0.25,
                )
        except TimeoutError as exc:
            raise ErrorReply(
                504, f"No connection to {at} within {limits.CONNECT_S:.0f} s.", reason="connect-timeout"
            ) from exc
        except ssl.SSLCertVerificationError as exc:
            raise ErrorReply(
                502, f"The certificate of {at} is not valid: {exc.verify_message}.", reason="tls-certificate"
            ) from exc
        except ssl.SSLError as exc:
            raise ErrorReply(502, f"No TLS with {at}: {exc.reason}.", reason="tls") from exc
        except socket.gaierror as exc:
            raise ErrorReply(
                502, f"The name {endpoint.host} cannot be resolved: {exc.strerror}.", reason="dns"
            ) from exc
        except OSError as exc:
            why = exc.strerror or str(exc)
            raise ErrorReply(502, f"No connection to {at}: {why}.", reason="connect") from exc
        raw = writer.get_extra_info("socket")
        # A long answer is silent for minutes; this keeps address translation on the way awake and finds the
        # dead.
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        return Upstream(endpoint, reader, writer)


def make_tls() -> ssl.SSLContext:
    """Return the context for all endpoints: the system's authorities, names checked, TLS 1.2 or newer."""
    tls = ssl.create_default_context()
    tls.minimum_version = ssl.TLSVersion.TLSv1_2
    tls.set_alpn_protocols(["http/1.1"])
    return tls
