"""What became of requests, until the router has it for its audit trail. Bounded, and no request waits.

Whoever asks for the same again and again is told of in sums, and whoever asks for much in rougher ones: what
is kept for an agent does not grow with what it asks for. What has no room gets a number all the same, so
that the router sees how much is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import islice

from nanoclawd import journal
from nanoclawd.gateway import limits
from nanoclawd.gateway.exchange import Exchange
from nanoclawd.ids import AgentName, SessionName
from nanoclawd.rates import Rate
from nanoclawd.wire import Json


@dataclass(slots=True)
class _Sum:
    """What else is like a request, until some time has passed."""

    timer: asyncio.TimerHandle
    record: Json | None = None


class Trail:
    def __init__(self) -> None:
        self.life = secrets.token_hex(8)  #: this gateway's; numbers begin anew in each
        self._number = 0
        self._waiting: deque[Json] = deque()
        self._changed = asyncio.Event()
        self._rates: dict[AgentName, Rate] = {}
        self._sums: dict[Hashable, _Sum] = {}

    def add(self, agent: AgentName, session: SessionName, exchange: Exchange) -> None:
        """Record what became of one request."""
        record = {"agent": agent, "session": session, **exchange.record(), "at": time.time(), "count": 1}
        sizes = ("at", "upBytes", "downBytes")
        same = tuple(value for key, value in record.items() if key not in sizes)
        if same in self._sums:
            self._add_up(same, record)
            return
        rate = self._rates.setdefault(agent, Rate(limits.RECORDS_PER_S, limits.RECORDS_BURST))
        if rate.take():
            rate.take(-1)  # not a debt: it is in the sum
            rough = (agent, session, record["event"], record["rule"], record["reason"])
            # A rule that matched is a person's, and so are the names in it.
            names = ("method", "host", "path", *(() if record["rule"] else ("route", "credential")))
            self._add_up(rough, {**record, **dict.fromkeys(names, ""), "status": 0})
            return
        self._put(record)
        if record["event"] == "denied":
            self._open(same)

    async def read(self, after: int) -> list[Json]:
        """Forget records up to the number `after`, and return the next ones; wait until there are some."""
        while self._waiting and self._waiting[0]["number"] <= after:
            self._waiting.popleft()
        self._changed.set()
        while not self._waiting:
            self._changed.clear()
            await self._changed.wait()
        return list(islice(self._waiting, limits.RECORDS_AT_ONCE))

    async def hand_over(self) -> None:
        """Return when the router has everything, or after a while without it."""
        for key in list(self._sums):
            self._close(key)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limits.HAND_OVER_S):
                while self._waiting:
                    self._changed.clear()
                    await self._changed.wait()
        if self._waiting:
            text = "the router is away, and so they are not in its audit trail"
            journal.warning("records-lost", text, records=len(self._waiting))

    def _open(self, key: Hashable) -> _Sum:
        timer = asyncio.get_running_loop().call_later(limits.SUM_S, self._close, key)
        self._sums[key] = _Sum(timer)
        return self._sums[key]

    def _add_up(self, key: Hashable, record: Json) -> None:
        total = self._sums.get(key) or self._open(key)
        if total.record is not None:
            for number in ("upBytes", "downBytes", "count"):
                record[number] += total.record[number]
        total.record = record

    def _close(self, key: Hashable) -> None:
        total = self._sums.pop(key)
        total.timer.cancel()
        if total.record is not None:
            self._put(total.record)

    def _put(self, record: Json) -> None:
        self._number += 1
        if len(self._waiting) < limits.RECORDS:
            self._waiting.append({"number": self._number, **record})
            self._changed.set()
