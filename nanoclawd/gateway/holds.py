"""Requests about which a person is asked: they wait here; the router is told of them, and tells the answer.

Nothing of it outlives this process: the router has the question and its answer. Who asks for the same waits
for the same answer; one that allows it once is for one of them.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from nanoclawd.asking import Request
from nanoclawd.gateway import limits
from nanoclawd.policy import Decision, Denied

NOT_ASKED = "The router could not be asked whether a person allows this. Nothing was sent; try again later."


@dataclass(eq=False, kw_only=True, slots=True)
class Hold:
    """What requests that are alike wait for."""

    request: Request
    sha256: str
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    waiters: list[asyncio.Future[Decision]] = field(default_factory=list)
    pending: str = NOT_ASKED  #: what is said if no answer comes

    def settle(self, decision: Decision) -> None:
        """Let all go with the same decision."""
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(decision)


class Holds:
    """All that wait, of all sessions. `decide` tells what the policy of an agent says at that moment."""

    def __init__(self, decide: Callable[[Request], Decision]) -> None:
        self._decide = decide
        self._holds: dict[str, Hold] = {}  #: by hash
        self._places: Counter[str] = Counter()  #: taken, by agent
        self._changed = asyncio.Event()

    @contextmanager
    def place(self, agent: str) -> Iterator[None]:
        """Take one of the places for as long as the block runs. Raises Denied."""
        if self._places[agent] >= limits.HELD_PER_AGENT or self._places.total() >= limits.HELD:
            message = (
                f"{self._places[agent]} requests of this agent wait for a person's answer, "
                f"{self._places.total()} of all; there is no room for more."
            )
            raise Denied(429, "too-many-held", message, ("retry-after", "60"))
        self._places[agent] += 1
        try:
            yield
        finally:
            self._places[agent] -= 1
            if not self._places[agent]:
                del self._places[agent]

    async def wait(self, request: Request, timeout_s: float) -> Decision:
        """Return the answer to `request`. Raises Denied if none comes in time."""
        sha256 = request.sha256
        hold = self._holds.setdefault(sha256, Hold(request=request, sha256=sha256))
        waiter: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        hold.waiters.append(waiter)
        self._changed.set()
        try:
            async with asyncio.timeout(timeout_s):
                return await waiter
        except TimeoutError:
            raise Denied(403, "not-answered", hold.pending) from None
        finally:
            hold.waiters.remove(waiter)
            if not hold.waiters:
                self._forget(hold)

    async def read(self, known: Collection[str]) -> tuple[list[Hold], list[str]]:
        """Wait until the holds differ from those `known`; return some new ones, and ids of those gone."""
        while True:
            holds = {hold.id: hold for hold in self._holds.values()}
            new = [hold for id, hold in holds.items() if id not in known][: limits.HOLDS_AT_ONCE]
            gone = [id for id in known if id not in holds]
            if new or gone:
                return new, gone
            self._changed.clear()
            await self._changed.wait()

    def note_pending(self, id: str, sha256: str, message: str) -> bool:
        """Take over what is said if no answer comes; False if nothing waits for one."""
        if (hold := self._find(id, sha256)) is None:
            return False
        hold.pending = message
        return True

    def answer(self, id: str, sha256: str, *, allowed: bool, message: str) -> bool:
        """Let go what waits, if it is still what was asked about and no rule decides by now.

        What is allowed is one request: others that are the same are told so.
        """
        if (hold := self._find(id, sha256)) is None:
            return False
        self._forget(hold)
        if (now := self._decide(hold.request)).reason != "ask":
            hold.settle(now)
            return False
        first = next((waiter for waiter in hold.waiters if not waiter.done()), None)
        if allowed and first is not None:
            first.set_result(Decision(True, 0, hold.request.rule(), "approved", message))
            message = "A person allowed this once, and another request that is the same has used that up."
        hold.settle(Decision(False, 0, None, "denied", message))
        return first is not None

    def decide_again(self) -> None:
        """Policies have changed: let go what rules decide now."""
        for hold in list(self._holds.values()):
            if (now := self._decide(hold.request)).reason != "ask":
                self._forget(hold)
                hold.settle(now)

    def close(self) -> None:
        """Let all go, since this process ends."""
        message = "The gateway ends while this waits for a person's answer. Nothing was sent; ask again."
        for hold in list(self._holds.values()):
            self._forget(hold)
            hold.settle(Decision(False, 0, None, "restarting", message))

    def _find(self, id: str, sha256: str) -> Hold | None:
        hold = self._holds.get(sha256)
        return hold if hold is not None and hold.id == id else None

    def _forget(self, hold: Hold) -> None:
        """Who asks for the same from now on asks anew. Harmless if repeated."""
        if self._holds.get(hold.sha256) is hold:
            del self._holds[hold.sha256]
            self._changed.set()
