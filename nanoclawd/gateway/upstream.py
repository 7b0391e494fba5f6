"""Connections to servers: opened; those to endpoints of routes also kept for the next request, or given up.

A request is never sent twice: what an endpoint did with one that it did not answer is unknown. A kept
connection is watched, so that one which the endpoint has closed is not used; in the rest of cases the
agent's SDK tries again.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Sequence

import h11

from nanoclawd.gateway import limits
from nanoclawd.gateway.http import Stream, deadline
from nanoclawd.policy import Denied, authority
from nanoclawd.routes import Endpoint


class Upstream(Stream):
    """One open connection to a server. Whoever has it ends it by abort() or Pool.put_back()."""

    watch: asyncio.Task[None]  #: while it waits in the pool
    endpoint: Endpoint  #: if it came from the pool

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        http = h11.Connection(h11.CLIENT, max_incomplete_event_size=limits.ENDPOINT_HEADER_BYTES)
        super().__init__(http, reader, writer)

    async def ask(self, event: h11.Event) -> None:
        """Send a part of the request. Raises Denied if nothing of it is taken, OSError at a hang-up."""
        try:
            await self.send(event, stall_s=limits.ENDPOINT_STALL_S)
        except TimeoutError:
            raise Denied(504, "endpoint-stalled", "The endpoint takes no data.") from None

    async def answer(self) -> h11.Response:
        """Return the head of the answer. Raises Denied."""
        async with deadline(limits.ANSWER_S, 504, "endpoint-silent", "The endpoint did not answer in time."):
            for _ in range(limits.INFORMATIONAL):
                if isinstance(event := await self._event(), h11.Response):
                    return event
        raise Denied(502, "endpoint-answer", "The endpoint's answer cannot be read.")

    async def piece(self) -> bytes | None:
        """Return the next piece of the answer's body, None at its end. Raises Denied if it breaks."""
        async with deadline(limits.SILENCE_S, 504, "endpoint-silent", "The endpoint fell silent."):
            event = await self._event()
        return bytes(event.data) if isinstance(event, h11.Data) else None

    def start_again(self) -> bool:
        """Get ready for a next request; False if the connection cannot carry one."""
        if not self.is_done:
            return False
        self.http.start_next_cycle()
        return not self.http.trailing_data[0] and not self.reader.at_eof()

    async def _event(self) -> h11.Event:
        try:
            return await self.receive()
        except h11.RemoteProtocolError as exc:
            raise Denied(502, "endpoint-answer", "The endpoint does not speak HTTP.") from exc
        except OSError as exc:
            message = "The endpoint hung up before its answer was complete."
            raise Denied(502, "endpoint-broke-off", message) from exc


class Pool:
    """Connections that wait for a next request. Its tasks live in `tasks`; close() ends all that wait."""

    def __init__(self, tasks: asyncio.TaskGroup, tls: ssl.SSLContext) -> None:
        self._tasks = tasks
        self._tls = tls
        self._idle: dict[Endpoint, list[Upstream]] = {}
        #: The address that answered: where IPv6 leads nowhere, only the first connection waits for it.
        self._used_last: dict[Endpoint, str] = {}

    async def connect(self, endpoint: Endpoint) -> Upstream:
        """Return a connection, by preference the one used last. Raises Denied."""
        while waiting := self._idle.get(endpoint):
            upstream = waiting.pop()
            upstream.watch.cancel()
            try:
                await asyncio.wait([upstream.watch])
            except asyncio.CancelledError:
                upstream.abort()
                raise
            if upstream.watch.cancelled() and not upstream.reader.at_eof():
                return upstream
            upstream.abort()
        # Not checked: a person named the endpoint, and it has to show its certificate.
        addresses = await _look_up(endpoint)
        addresses.sort(key=lambda address: address != self._used_last.get(endpoint))
        reader, writer = await dial(
            endpoint.host, endpoint.port, addresses, tls=self._tls if endpoint.tls else None
        )
        self._used_last[endpoint] = writer.get_extra_info("peername")[0]
        upstream = Upstream(reader, writer)
        upstream.endpoint = endpoint
        return upstream

    def put_back(self, upstream: Upstream) -> None:
        """Keep `upstream`, whose answer was read to its end, for the next request if it can carry one."""
        waiting = self._idle.setdefault(upstream.endpoint, [])
        if len(waiting) >= limits.POOL_SIZE or not upstream.start_again():
            upstream.abort()
            return
        upstream.watch = self._tasks.create_task(self._watch(upstream), name="idle-upstream")
        waiting.append(upstream)

    def close(self) -> None:
        """Close what waits."""
        for waiting in self._idle.values():
            for upstream in waiting:
                upstream.watch.cancel()
                upstream.abort()
        self._idle.clear()

    async def _watch(self, upstream: Upstream) -> None:
        """Wait until the endpoint hangs up or says what nobody asked for, or for too long; then give up."""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(limits.POOL_IDLE_S):
                await upstream.reader.read(1)
        upstream.abort()
        with contextlib.suppress(KeyError, ValueError):  # taken out or closed meanwhile
            self._idle[upstream.endpoint].remove(upstream)


async def dial(
    host: str, port: int, addresses: Sequence[str], *, tls: ssl.SSLContext | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to the first of `addresses` that takes it: never the name once more. Raises Denied.

    One after the other: asyncio's race of addresses, when cancelled, forgets the socket that had won.
    """
    problem: OSError = TimeoutError()
    addresses = addresses[: limits.ADDRESSES]
    for address in addresses:
        try:
            async with asyncio.timeout(limits.CONNECT_S / len(addresses)):
                reader, writer = await asyncio.open_connection(
                    address, port, limit=limits.CHUNK_BYTES, ssl=tls, server_hostname=host if tls else None
                )
                return reader, _kept_alive(writer)
        except OSError as exc:
            problem = exc
    raise _no_connection(authority(host, port), host, problem) from problem


async def _look_up(endpoint: Endpoint) -> list[str]:
    """Return the endpoint's addresses. Raises Denied."""
    try:
        async with asyncio.timeout(limits.CONNECT_S):
            found = await asyncio.get_running_loop().getaddrinfo(
                endpoint.host, endpoint.port, type=socket.SOCK_STREAM
            )
    except OSError as exc:
        raise _no_connection(endpoint.authority, endpoint.host, exc) from exc
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _kept_alive(writer: asyncio.StreamWriter) -> asyncio.StreamWriter:
    raw = writer.get_extra_info("socket")
    # A long answer is silent for minutes: keep address translation on the way awake, and find the dead.
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    return writer


def _no_connection(at: str, host: str, exc: OSError) -> Denied:
    match exc:
        case TimeoutError():
            return Denied(504, "connect-timeout", f"No connection to {at} within {limits.CONNECT_S:.0f} s.")
        case ssl.SSLCertVerificationError():
            message = f"The certificate of {at} is not valid: {exc.verify_message}."
            return Denied(502, "tls-certificate", message)
        case ssl.SSLError():
            return Denied(502, "tls", f"No TLS with {at}: {exc.reason}.")
        case socket.gaierror():
            return Denied(502, "dns", f"The name {host} cannot be resolved: {exc.strerror}.")
    return Denied(502, "connect", f"No connection to {at}: {exc.strerror or exc}.")


def make_tls() -> ssl.SSLContext:
    """Return the context for all endpoints: the system's authorities, names checked, TLS 1.2 or newer."""
    tls = ssl.create_default_context()
    tls.minimum_version = ssl.TLSVersion.TLSv1_2
    tls.set_alpn_protocols(["http/1.1"])
    return tls
