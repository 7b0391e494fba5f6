"""One request on its way to a server, and the answer on its way back, piece by piece and both at once.

At most one read's worth of data waits in either direction: who does not read stops the other side, and no
more.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import h11

from nanoclawd.gateway import limits
from nanoclawd.gateway.exchange import Exchange
from nanoclawd.gateway.headers import response_headers
from nanoclawd.gateway.http import deadline
from nanoclawd.gateway.redact import Redactor
from nanoclawd.gateway.replies import AgentGone
from nanoclawd.gateway.upstream import Upstream
from nanoclawd.gateway.usage import Meter
from nanoclawd.policy import Denied

if TYPE_CHECKING:
    from nanoclawd.gateway.proxy import AgentConnection

REDIRECTS = (301, 302, 303, 307, 308)


class Forward:
    """Joins an agent's connection with a server's for one request."""

    def __init__(
        self,
        agent: AgentConnection,
        upstream: Upstream,
        exchange: Exchange,
        *,
        redactor: Redactor | None = None,
        meter: Meter | None = None,
    ) -> None:
        """`redactor` is of a route, whose answers may hold its credential; `meter` of one that costs."""
        self._agent = agent
        self._upstream = upstream
        self._exchange = exchange
        self._redactor = redactor
        self._meter = meter

    async def run(self, head: h11.Request) -> None:
        """Send `head` and the agent's body, and pass the answer back. Raises Denied, AgentGone.

        The answer passes at once: a server may refuse before it has read all.
        """
        await self._agent.send_continue()
        try:
            async with asyncio.TaskGroup() as tasks:
                uploading = tasks.create_task(self._upload(head), name="upload")
                await self._download()
                uploading.cancel()
        except BaseExceptionGroup as group:
            # Both ends may fail in the same moment; a bug goes first.
            expected = (Denied, AgentGone)
            raise min(group.exceptions, key=lambda exc: isinstance(exc, expected)) from None

    async def _upload(self, head: h11.Request) -> None:
        """Pass the body on, then watch the agent: if it hangs up, nobody needs the answer (and its cost)."""
        async with deadline(limits.BODY_S, 408, "slow-body", "The request's body came too slowly."):
            await self._pass_body(head)
        await self._agent.watch()

    async def _pass_body(self, head: h11.Request) -> None:
        event: h11.Event = head
        while True:
            try:
                await self._upstream.ask(event)
            except OSError:
                return  # the server takes no more; its answer, or the lack of one, says why
            if isinstance(event, h11.EndOfMessage):
                return
            async with asyncio.timeout(limits.BODY_SILENCE_S):
                event = await self._agent.event()
            if isinstance(event, h11.Data):
                self._exchange.count(len(event.data), 0)
                event = h11.Data(data=bytes(event.data))
                if self._meter is not None:
                    self._meter.ask(event.data)
            else:
                event = h11.EndOfMessage()  # without trailers
                if self._meter is not None:
                    self._meter.sent()
                    self._agent.session.gateway.ledger.look_again(self._agent.session.agent)

    async def _download(self) -> None:
        answer = await _answer(self._upstream, self._meter)
        headers = list(answer.headers)
        if self._redactor is not None:
            self._check_answer(answer.status_code, headers, self._redactor)
        if self._exchange.method != "HEAD":
            for name, value in headers:
                if name == b"content-length":
                    self._exchange.expect(int(value))
        headers = response_headers(headers, is_route=self._redactor is not None)
        if self._redactor is not None:
            headers = [each for each in headers if not any(map(self._redactor.holds, each))]
        self._exchange.status = answer.status_code
        await self._agent.send_head(answer.status_code, headers, self._exchange)
        while (data := await self._upstream.piece()) is not None:
            if self._meter is not None:
                self._meter.feed(data)
            await self._pass(data if self._redactor is None else self._redactor.feed(data))
        if self._redactor is not None:
            await self._pass(self._redactor.end())
        await self._agent.send(h11.EndOfMessage())

    async def _pass(self, data: bytes) -> None:
        if data:
            self._exchange.count(0, len(data))
            await self._agent.send(h11.Data(data=data))

    def _check_answer(self, status: int, headers: list[tuple[bytes, bytes]], redactor: Redactor) -> None:
        if status in REDIRECTS:
            message = (
                f"The endpoint redirects ({status}), and the gateway does not follow. "
                "Correct endpoint= in nanoclaw.toml."
            )
            raise Denied(502, "endpoint-redirects", message)
        encoded = any(name == b"content-encoding" and value != b"identity" for name, value in headers)
        if encoded and redactor.has_secrets:
            message = "The endpoint's answer is compressed, so that nobody could find the credential in it."
            raise Denied(502, "endpoint-encoding", message)


async def _answer(upstream: Upstream, meter: Meter | None) -> h11.Response:
    answer = await upstream.answer()
    if meter is not None:
        meter.answer(answer.status_code, dict(answer.headers).get(b"content-type", b""))
    return answer


async def hear_out(upstream: Upstream, meter: Meter) -> None:
    """Read on, after the agent has hung up, until the endpoint has told what that will cost."""
    with contextlib.suppress(Denied, TimeoutError):
        async with asyncio.timeout(limits.HEAR_OUT_S):
            if meter.is_open and upstream.http.their_state is h11.SEND_RESPONSE:
                await _answer(upstream, meter)
            while meter.is_open and (data := await upstream.piece()) is not None:
                meter.feed(data)
