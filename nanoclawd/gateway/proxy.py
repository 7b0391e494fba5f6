"""One connection of an agent: each of its requests is understood, decided about, and carried out."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
import sys
from typing import TYPE_CHECKING

import h11

from nanoclawd import asking, journal, policy
from nanoclawd.asking import Request
from nanoclawd.errors import NanoclawError
from nanoclawd.gateway import limits, tunnel
from nanoclawd.gateway.exchange import HUNG_UP, Exchange
from nanoclawd.gateway.forward import Forward, hear_out
from nanoclawd.gateway.headers import Header, body_headers, plain_headers, route_headers
from nanoclawd.gateway.http import Stream, deadline
from nanoclawd.gateway.ledger import OverBudget
from nanoclawd.gateway.redact import Redactor
from nanoclawd.gateway.replies import AgentGone, render_error
from nanoclawd.gateway.upstream import Upstream
from nanoclawd.gateway.usage import Meter
from nanoclawd.policy import Ask, Decision, Denied, Rule, Way
from nanoclawd.routes import Route

if TYPE_CHECKING:
    from nanoclawd.gateway.sessions import Session


class AgentConnection:
    """Serves one accepted socket until it ends."""

    _stream: Stream

    def __init__(self, session: Session) -> None:
        self.session = session
        self.exchange: Exchange | None = None  #: a request that is being answered
        self.is_last = False  #: hang up after the present request
        self._events: list[h11.Event] = []  #: of the request that was read to ask a person, and not sent on
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
        exchange = Exchange()
        try:
            request = await self._request(exchange)
            if request is None:
                return False
            await self._answer(request, exchange)
        except Denied as error:
            exchange.status, exchange.reason = exchange.status or error.status, error.reason
            exchange.is_news = not isinstance(error, OverBudget) or error.is_news
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
        except asyncio.CancelledError:
            exchange.reason = exchange.reason or "cut-off"
            raise
        finally:
            self.exchange = None
            if exchange.status or exchange.ask:
                self.session.log(exchange)
        if self._http.our_state is h11.SWITCHED_PROTOCOL:
            return False
        if self.is_last or not self._stream.is_done:
            await self._linger()
            return False
        self._http.start_next_cycle()
        return True

    async def _request(self, exchange: Exchange) -> h11.Request | None:
        """Return the next request's head, or None if there is none. Raises Denied."""
        if not self._http.trailing_data[0]:
            try:
                async with asyncio.timeout(limits.KEEP_ALIVE_S):
                    data = await self._stream.reader.read(limits.CHUNK_BYTES)
            except OSError:
                return None
            if not data:
                return None
            self._http.receive_data(data)
        self.exchange = exchange
        self._events.clear()
        await self.session.check_rate()
        async with deadline(limits.HEADERS_S, 408, "slow-headers", "The request's headers came too slowly."):
            event = await self.event()
        assert isinstance(event, h11.Request)
        if event.http_version != b"1.1":
            raise Denied(505, "http-version", "Only HTTP/1.1 is spoken here.")
        # h11 counts only while it waits for more; what came in one read may be longer.
        if sum(len(name) + len(value) + 4 for name, value in event.headers) > limits.HEADER_BYTES:
            raise Denied(431, "malformed", "The request's headers are too long.")
        return event

    async def _answer(self, request: h11.Request, exchange: Exchange) -> None:
        method, target = request.method.decode("ascii"), request.target.decode("ascii")
        exchange.method, exchange.target = method[:16], target
        ask = exchange.ask = policy.parse_ask(method, target)
        decision = exchange.decision = self.session.decide(ask)
        headers = list(request.headers)
        if exchange.is_held:
            decision = exchange.decision = await self._ask_person(ask, headers)
        rule = decision.rule
        if not decision.allowed or rule is None:
            raise Denied(403, decision.reason, decision.message)
        self.session.check_rule_rate(rule)
        # What a request line and headers carry out counts too.
        exchange.count(len(target) + sum(len(name) + len(value) for name, value in headers), 0)
        late = f"The policy allows {rule.timeout_seconds} s for this."
        async with deadline(rule.seconds_left, 504, "timeout", late):
            match ask.way:
                case Way.ROUTE:
                    await self._answer_route(ask, rule, headers, exchange)
                case Way.PLAIN:
                    await self._answer_plain(ask, rule, headers, exchange)
                case Way.TUNNEL:
                    await self._answer_tunnel(ask, rule, exchange)

    async def _ask_person(self, ask: Ask, headers: list[Header]) -> Decision:
        """Wait for the answer to a request that no rule decides. Raises Denied, AgentGone."""
        session, holds = self.session, self.session.gateway.holds
        timeout_s = session.gateway.ask_seconds
        with holds.place(session.agent):
            request = await self._read_request(ask, headers)
            try:
                async with asyncio.TaskGroup() as tasks:
                    watching = tasks.create_task(self.watch(), name="watch")
                    decision = await holds.wait(request, timeout_s)
                    watching.cancel()
            except BaseExceptionGroup as group:
                expected = (Denied, AgentGone)
                raise min(group.exceptions, key=lambda exc: isinstance(exc, expected)) from None
        return decision

    async def _read_request(self, ask: Ask, headers: list[Header]) -> Request:
        """Return all of a request that a person is to be asked about; its body is kept for event()."""
        passed: list[Header] = []
        body = bytearray()
        if ask.way is Way.PLAIN:
            passed = plain_headers(headers, ask)
            body_headers(ask.method.encode(), headers, sys.maxsize)
            await self.send_continue()
            slow = "The request's body came too slowly."
            async with deadline(limits.BODY_SILENCE_S, 408, "slow-body", slow):
                while not isinstance(event := await self.event(), h11.EndOfMessage):
                    assert isinstance(event, h11.Data)
                    body += event.data
                    if len(body) > asking.BODY_BYTES:
                        raise _too_large_to_ask(f"a body of more than {asking.BODY_BYTES} bytes")
            self._events = [h11.Data(data=bytes(body)), event]
        request = Request(
            agent=self.session.agent,
            session=self.session.name,
            way=ask.way,
            method=ask.method,
            host=ask.host,
            port=ask.port,
            path=ask.path,
            target=ask.target,
            headers=tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in passed),
            body=base64.b64encode(body).decode(),
        )
        if len(request.canonical) > asking.REQUEST_CHARACTERS:
            raise _too_large_to_ask("such long headers")
        return request

    async def _answer_route(self, ask: Ask, rule: Rule, headers: list[Header], exchange: Exchange) -> None:
        gateway = self.session.gateway
        route = gateway.route(ask.route)
        route.check(ask)
        body = body_headers(ask.method.encode(), headers, rule.max_up_bytes)
        if route.usage is None or not route.is_metered(ask):
            return await self._forward_route(ask, route, headers, body, exchange)
        length = dict(body).get(b"content-length")
        meter = Meter(route.usage, size_bytes=rule.max_up_bytes if length is None else int(length))
        prices = gateway.require_settings().prices
        async with gateway.ledger.call(self.session.agent, self.session.name, meter, prices) as use:
            exchange.use = use
            await self._forward_route(ask, route, headers, body, exchange, meter)

    async def _forward_route(
        self,
        ask: Ask,
        route: Route,
        headers: list[Header],
        body: list[Header],
        exchange: Exchange,
        meter: Meter | None = None,
    ) -> None:
        gateway, secret = self.session.gateway, None
        if route.credential is not None:
            try:
                secret = await gateway.keys.get(route.credential)
                exchange.credential = route.credential
            except NanoclawError as exc:
                message = f"The gateway has no usable key for {route.name}: {exc}."
                raise Denied(401, f"credential-{exc.code}", message) from exc
        passed = [*route_headers(headers, route, secret), *body]
        secrets = () if secret is None else route.scheme.spellings(secret.reveal())
        upstream = await gateway.pool.connect(route.endpoint)
        try:
            path = route.endpoint.path + (ask.target if ask.target.startswith("/") else f"/{ask.target}")
            head = h11.Request(method=ask.method, target=path, headers=passed)
            await Forward(self, upstream, exchange, redactor=Redactor(secrets), meter=meter).run(head)
        except AgentGone:
            try:
                if meter is not None and gateway.ledger.is_bounded(self.session.agent):
                    await hear_out(upstream, meter)
            finally:
                upstream.abort()
            raise
        except BaseException:
            upstream.abort()
            raise
        gateway.pool.put_back(upstream)

    async def _answer_plain(self, ask: Ask, rule: Rule, headers: list[Header], exchange: Exchange) -> None:
        passed = plain_headers(headers, ask)
        passed += body_headers(ask.method.encode(), headers, rule.max_up_bytes)
        upstream = Upstream(*await self.session.dial(ask, rule))
        try:
            head = h11.Request(method=ask.method, target=ask.target, headers=passed)
            await Forward(self, upstream, exchange).run(head)
        finally:
            upstream.abort()

    async def _answer_tunnel(self, ask: Ask, rule: Rule, exchange: Exchange) -> None:
        if not isinstance(await self.event(), h11.EndOfMessage):
            raise Denied(400, "framing", "A CONNECT request has no body.")
        reader, writer = await self.session.dial(ask, rule)
        try:
            await self.send_head(200, [], exchange)
            exchange.status = 200
            agent = self._stream.reader, self._stream.writer
            await tunnel.relay(agent, (reader, writer), self._http.trailing_data[0], exchange.count)
            writer.close()  # what is written still goes out
            async with asyncio.timeout(limits.LINGER_S):
                await writer.wait_closed()
        except OSError:
            exchange.reason = "broke-off"
        finally:
            writer.transport.abort()

    # --- the agent's side, also for Forward --------------------------------------------------------

    async def event(self) -> h11.Event:
        """Return what the agent sent next. Raises Denied if it is no HTTP, AgentGone if it broke off."""
        if self._events:
            return self._events.pop(0)
        try:
            return await self._stream.receive()
        except h11.RemoteProtocolError as exc:
            status = exc.error_status_hint if exc.error_status_hint in (431, 501) else 400
            raise Denied(status, "malformed", f"The request is not valid HTTP: {exc}.") from exc
        except OSError as exc:
            raise AgentGone from exc

    async def watch(self) -> None:
        """Wait for what comes after the request. Raises AgentGone if it is the end."""
        try:
            data = await self._stream.reader.read(limits.CHUNK_BYTES)
        except OSError:
            data = b""
        if not data:
            raise AgentGone
        self._http.receive_data(data)  # the next request, early; it waits

    async def send_continue(self) -> None:
        """Have the agent send its body, if it waits for that. Raises AgentGone."""
        if self._http.they_are_waiting_for_100_continue:
            await self.send(h11.InformationalResponse(status_code=100, headers=[]))

    async def send_head(self, status: int, headers: list[Header], exchange: Exchange) -> None:
        """Send the head of the answer. Raises AgentGone."""
        if self.is_last:
            headers = [*headers, (b"connection", b"close")]
        exchange.is_head_sent = True
        await self.send(h11.Response(status_code=status, headers=headers))

    async def send(self, event: h11.Event) -> None:
        """Send a part of the answer. Raises AgentGone."""
        try:
            await self._stream.send(event, stall_s=limits.AGENT_STALL_S)
        except OSError as exc:
            raise AgentGone from exc

    async def _send_error(self, error: Denied, exchange: Exchange) -> None:
        body = render_error(error)
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), *error.headers]
        if self._http.their_state is not h11.DONE:  # what is left of its body is not worth the wait
            headers.append(("connection", "close"))
        exchange.down_bytes = len(body)
        # The reason in the status line too: of an answer to CONNECT, tools show nothing else.
        await self.send(h11.Response(status_code=error.status, reason=error.reason, headers=headers))
        await self.send(h11.Data(data=body))
        await self.send(h11.EndOfMessage())

    async def _linger(self) -> None:
        """Read what still comes, for a while: a close with unread data could take the answer with it."""
        with contextlib.suppress(OSError):
            async with asyncio.timeout(limits.LINGER_S):
                await self._stream.writer.drain()
                self._stream.writer.write_eof()
                left = limits.LINGER_BYTES
                while left > 0 and (data := await self._stream.reader.read(limits.CHUNK_BYTES)):
                    left -= len(data)


def _too_large_to_ask(what: str) -> Denied:
    message = (
        f"No rule decides about this, and a person is not asked about a request with {what}: add a rule."
    )
    return Denied(413, "too-large-to-ask", message)
