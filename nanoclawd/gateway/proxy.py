"""One connection of an agent: its requests are checked, sent on with the key, and answered piece by piece.

At most one read's worth of data waits in either direction: who does not read stops the other side, and no
more.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import h11

from nanoclawd import journal
from nanoclawd.credentials import Secret
from nanoclawd.errors import NanoclawError
from nanoclawd.gateway import limits, policy
from nanoclawd.gateway.http import Stream, deadline
from nanoclawd.gateway.replies import AgentGone, ErrorReply
from nanoclawd.gateway.upstream import Upstream

if TYPE_CHECKING:
    from nanoclawd.gateway.sessions import Session

HUNG_UP = 499  #: in the journal only: the agent went before its answer was complete


@dataclass(slots=True)
class Exchange:
    """What the journal gets to know of one request: never content."""

    started: float
    provider: str | None = None
    method: str = "-"
    path: str = "-"
    status: int = 0
    reason: str | None = None  #: why it did not end well
    received_bytes: int = 0  #: body, from the agent
    sent_bytes: int = 0  #: body, to the agent
    is_head_sent: bool = False


class AgentConnection:
    """Serves one accepted socket until it ends."""

    _stream: Stream

    def __init__(self, session: Session) -> None:
        self.session = session
        self.is_busy = False  #: a request is being answered
        self.is_last = False  #: hang up after the present request
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.HEADER_BYTES)

    async def serve(self, sock: socket.socket) -> None:
        """Answer requests on `sock`, which is ours, until the agent hangs up, or must be hung up on."""
        # asyncio's streams are safe here: they unlink the path of a listener, not of a connection.
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=limits.CHUNK_BYTES)
        self._stream = Stream(self._http, reader, writer)
        try:
            while await self._serve_one():
                pass
            writer.close()  # what is written still goes out
            async with asyncio.timeout(limits.LINGER_S):
                await writer.wait_closed()
        except (AgentGone, OSError):
            pass  # nobody is left to be told
        finally:
            self._stream.abort()

    async def _serve_one(self) -> bool:
        """Answer one request; False if the connection is to end."""
        exchange = Exchange(started=time.monotonic())
        try:
            request = await self._request()
            if request is None:
                return False
            exchange.started = time.monotonic()
            exchange.method = request.method.decode("ascii", "replace")[:16]
            exchange.path = request.target.partition(b"?")[0].decode("ascii", "replace")[:128]
            await self._answer(request, exchange)
        except ErrorReply as error:
            exchange.status, exchange.reason = exchange.status or error.status, error.reason
            if exchange.is_head_sent:
                return False  # no end of the body: the agent must see that it is not whole
            await self._send_error(error, exchange)
        except AgentGone:
            exchange.status, exchange.reason = HUNG_UP, "agent-hung-up"
            return False
        except h11.LocalProtocolError as exc:  # a bug of ours, but no reason to cut off all other agents
            journal.error("protocol-bug", repr(exc), agent=self.session.agent, session=self.session.name)
            exchange.reason = "bug"
            return False
        finally:
            self.is_busy = False
            if exchange.status:
                self.session.log(exchange)
        if self.is_last or not self._stream.is_done:
            await self._linger()
            return False
        self._http.start_next_cycle()
        return True

    async def _request(self) -> h11.Request | None:
        """Return the next request's head, or None if there is none. Raises ErrorReply."""
        if not self._http.trailing_data[0]:
            try:
                async with asyncio.timeout(limits.KEEP_ALIVE_S):
                    data = await self._stream.reader.read(limits.CHUNK_BYTES)
            except OSError:
                return None
            if not data:
                return None
            self._http.receive_data(data)
        self.is_busy = True
        await self.session.check_rate()
        async with deadline(limits.HEADERS_S, 408, "slow-headers", "The request's headers came too slowly."):
            event = await self._event()
        assert isinstance(event, h11.Request)
        if event.http_version != b"1.1":
            raise ErrorReply(505, "http-version", "Only HTTP/1.1 is spoken here.")
        # h11 counts only while it waits for more; what came in one read may be longer.
        if sum(len(name) + len(value) + 4 for name, value in event.headers) > limits.HEADER_BYTES:
            raise ErrorReply(431, "malformed", "The request's headers are too long.")
        return event

    async def _event(self) -> h11.Event:
        """Return what the agent sent next. Raises ErrorReply if it is no HTTP, AgentGone if it broke off."""
        try:
            return await self._stream.receive()
        except h11.RemoteProtocolError as exc:
            status = exc.error_status_hint if exc.error_status_hint in (431, 501) else 400
            raise ErrorReply(status, "malformed", f"The request is not valid HTTP: {exc}.") from exc
        except OSError as exc:
            raise AgentGone from exc

    async def _answer(self, request: h11.Request, exchange: Exchange) -> None:
        gateway = self.session.gateway
        target = policy.check_target(request.method, request.target)
        exchange.provider = target.provider
        headers = list(request.headers)
        body = policy.body_headers(request.method, headers)
        provider = gateway.provider(target.provider)
        try:
            secret = await gateway.keys.get(provider.credential)
        except NanoclawError as exc:
            message = f"The gateway has no usable key for {provider.name}: {exc}."
            raise ErrorReply(401, f"credential-{exc.code}", message) from exc
        upstream = await gateway.pool.connect(provider.endpoint)
        try:
            if self._http.they_are_waiting_for_100_continue:
                await self._send(h11.InformationalResponse(status_code=100, headers=[]))
            path = provider.endpoint.path + target.path + (f"?{target.query}" if target.query else "")
            sent = policy.request_headers(
                headers, body, provider=provider.name, endpoint=provider.endpoint, secret=secret
            )
            head = h11.Request(method=request.method, target=path.encode(), headers=sent)
            await self._exchange(upstream, head, exchange, secret)
        except BaseException:
            upstream.abort()
            raise
        gateway.pool.put_back(upstream)

    async def _exchange(
        self, upstream: Upstream, head: h11.Request, exchange: Exchange, secret: Secret
    ) -> None:
        """Pass the body on and the answer back at once: an endpoint may refuse before it has read all."""
        try:
            async with asyncio.TaskGroup() as tasks:
                uploading = tasks.create_task(self._upload(upstream, head, exchange), name="upload")
                await self._download(upstream, exchange, secret)
                uploading.cancel()
        except BaseExceptionGroup as group:
            # Both ends may fail in the same moment; a bug goes first.
            expected = (ErrorReply, AgentGone)
            raise min(group.exceptions, key=lambda exc: isinstance(exc, expected)) from None

    async def _upload(self, upstream: Upstream, head: h11.Request, exchange: Exchange) -> None:
        """Pass the body on, then watch the agent: if it hangs up, nobody needs the answer (and its cost)."""
        async with deadline(limits.BODY_S, 408, "slow-body", "The request's body came too slowly."):
            await self._pass_body(upstream, head, exchange)
        try:
            data = await self._stream.reader.read(limits.CHUNK_BYTES)
        except OSError:
            data = b""
        if not data:
            raise AgentGone
        self._http.receive_data(data)  # the next request, early; it waits

    async def _pass_body(self, upstream: Upstream, head: h11.Request, exchange: Exchange) -> None:
        event: h11.Event = head
        while True:
            try:
                await upstream.ask(event)
            except OSError:
                return  # the endpoint takes no more; its answer, or the lack of one, says why
            if isinstance(event, h11.EndOfMessage):
                return
            async with asyncio.timeout(limits.BODY_SILENCE_S):
                event = await self._event()
            if isinstance(event, h11.Data):
                exchange.received_bytes += len(event.data)
                if exchange.received_bytes > limits.BODY_BYTES:
                    raise policy.too_large()
                event = h11.Data(data=bytes(event.data))
            else:
                event = h11.EndOfMessage()  # without trailers

    async def _download(self, upstream: Upstream, exchange: Exchange, secret: Secret) -> None:
        answer = await upstream.answer()
        if 300 <= answer.status_code < 400:
            message = (
                f"The endpoint redirects ({answer.status_code}), and the gateway does not follow. "
                "Correct endpoint= in nanoclaw.toml."
            )
            raise ErrorReply(502, "endpoint-redirects", message)
        exchange.status = answer.status_code
        headers = policy.response_headers(list(answer.headers), secret)
        if self.is_last:
            headers.append((b"connection", b"close"))
        await self._send(h11.Response(status_code=answer.status_code, headers=headers), exchange)
        while (data := await upstream.piece()) is not None:
            exchange.sent_bytes += len(data)
            await self._send(h11.Data(data=data))
        await self._send(h11.EndOfMessage())

    async def _send_error(self, error: ErrorReply, exchange: Exchange) -> None:
        body = error.body()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), *error.headers]
        if self._http.their_state is not h11.DONE:  # what is left of its body is not worth the wait
            headers.append(("connection", "close"))
        exchange.sent_bytes = len(body)
        await self._send(h11.Response(status_code=error.status, headers=headers), exchange)
        await self._send(h11.Data(data=body))
        await self._send(h11.EndOfMessage())

    async def _send(self, event: h11.Event, exchange: Exchange | None = None) -> None:
        """Send a part of the answer; with `exchange` its head. Raises AgentGone."""
        if exchange is not None:
            exchange.is_head_sent = True
        try:
            await self._stream.send(event, stall_s=limits.AGENT_STALL_S)
        except OSError as exc:
            raise AgentGone from exc

    async def _linger(self) -> None:
        """Read what still comes, for a while: a close with unread data could take the answer with it."""
        with contextlib.suppress(OSError):
            async with asyncio.timeout(limits.LINGER_S):
                await self._stream.writer.drain()
                self._stream.writer.write_eof()
                left = limits.LINGER_BYTES
                while left > 0 and (data := await self._stream.reader.read(limits.CHUNK_BYTES)):
                    left -= len(data)
