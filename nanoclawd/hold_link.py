"""The router's side of holds: it is told of each request that waits at the gateway, and tells the answer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from nanoclawd import asking, journal, limits, paths, varlink
from nanoclawd.approvals import Approvals
from nanoclawd.asking import Request
from nanoclawd.errors import Refused, Unavailable
from nanoclawd.idl import read_interface
from nanoclawd.wire import Json, VarlinkError, WireError

_INTERFACE = read_interface(paths.INTERFACES / "io.nanoclaw.Gateway.varlink")
_ANSWER_S = 10.0


@dataclass(frozen=True, slots=True)
class _Hold:
    id: str
    request: Request


class HoldLink:
    """run() must run while there is a gateway."""

    def __init__(self, approvals: Approvals) -> None:
        self._approvals = approvals
        self._waiting: dict[str, _Hold] = {}  #: at the gateway, by hash; without those that were answered
        self._answering = asyncio.Lock()  #: nothing is answered twice

    async def run(self) -> None:
        """Ask about what waits, until the gateway hangs up; it tells all of it again after that."""
        try:
            connection = await varlink.connect(paths.gateway_socket())
            try:
                await self._keep_reading(connection)
            finally:
                connection.close()
        except Unavailable:
            return  # the connection that keeps it supplied tells
        except (VarlinkError, WireError) as exc:
            hint = "'systemctl --user restart nanoclaw-gateway' starts one that should"
            journal.error("holds-not-read", f"the gateway does not tell what waits: {exc}; {hint}")
        finally:
            self._waiting.clear()

    async def _keep_reading(self, connection: varlink.Connection) -> None:
        known: list[str] = []
        while True:
            method = f"{_INTERFACE.name}.ReadHolds"
            reply = await varlink.call(connection, method, {"known": known}, more=True)
            # It has credentials and the Internet; what it says must not harm more than itself.
            read = _INTERFACE.check_reply("ReadHolds", reply)
            if not read["holds"] and not read["gone"]:
                raise WireError("holds", "must not be empty")
            known = [id for id in known if id not in read["gone"]]
            self._waiting = {key: hold for key, hold in self._waiting.items() if hold.id in known}
            for told in read["holds"]:
                known.append(told["id"])
                try:
                    request = asking.from_json(told["request"])
                except ValueError as exc:
                    raise WireError("holds.request", str(exc)) from None
                if request.sha256 != told["sha256"] or len(known) > limits.HOLDS:
                    raise WireError("holds", "are too many, or a hash is not that of its request")
                self._waiting[request.sha256] = _Hold(told["id"], request)
                await self.ask(request.sha256)

    async def ask(self, sha256: str) -> bool:
        """Ask about what waits under that hash, or let it go if that was allowed; return whether it went."""
        async with self._answering:
            if (hold := self._waiting.get(sha256)) is None:
                return False
            try:
                answer, message = await self._approvals.ask(hold.request)
            except (Unavailable, Refused) as exc:
                journal.warning("approval-not-stored", f"{exc}, nobody is asked", agent=hold.request.agent)
                return False
            return bool(answer) and await self._answer(hold, answer, message)

    def waits(self, sha256: str) -> bool:
        return sha256 in self._waiting

    async def deny(self, sha256: str, message: str) -> None:
        """Refuse what waits under that hash. Harmless if there is nothing."""
        async with self._answering:
            if (hold := self._waiting.get(sha256)) is not None:
                await self._answer(hold, "denied", message)

    async def _answer(self, hold: _Hold, answer: str, message: str) -> bool:
        """Tell the gateway; return whether it has sent the request."""
        if answer != "pending":
            del self._waiting[hold.request.sha256]
        told: Json = {"id": hold.id, "sha256": hold.request.sha256, "answer": answer, "message": message}
        try:
            connection = await varlink.connect(paths.gateway_socket())
            try:
                async with asyncio.timeout(_ANSWER_S):
                    reply = await varlink.call(connection, f"{_INTERFACE.name}.AnswerHold", told)
            finally:
                connection.close()
            taken = _INTERFACE.check_reply("AnswerHold", reply)["taken"]
        except (Unavailable, VarlinkError, WireError, TimeoutError) as exc:
            text = f"{exc!r}; the agent has to ask again"
            journal.warning("hold-not-answered", text, agent=hold.request.agent)
            return False
        return answer == "allowed" and bool(taken)
