"""Attached channel adapters: who gets which delivery, and what happens to one that nobody reported."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from nanoclawd import journal, limits, queue
from nanoclawd.db import Database, Row, Transaction, now_ms
from nanoclawd.errors import Unavailable
from nanoclawd.queue import SessionRow
from nanoclawd.wire import Json


@dataclass(eq=False, slots=True)
class Outlet:
    """One Attach() call: what it wants, and what waits to be written to it."""

    channel: str
    chat: str | None
    event: str | None
    #: Deliveries and activity in order; None ends the stream.
    queue: asyncio.Queue[Json | None] = field(default_factory=lambda: asyncio.Queue(limits.STREAM_QUEUE))
    #: True once all that was pending has been handed over: from then on new deliveries come by themselves.
    live: bool = False
    unreported: set[str] = field(default_factory=set)

    def wants(self, channel: str, chat: str, event: str | None) -> bool:
        return (
            self.channel == channel
            and self.chat in (None, chat)
            and (self.event is None or self.event == event)
        )


class Outlets:
    """All attached adapters of all channels."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._outlets: list[Outlet] = []
        self._released = asyncio.Event()
        self._due: set[str] = set()
        self._returned: set[str] = set()  #: keys that nobody has any more, still leased in the database
        self._timers: dict[str, asyncio.TimerHandle] = {}  #: one a channel, for what is due first

    def attach(self, outlet: Outlet) -> None:
        """Register an adapter; it gets something as soon as it calls next()."""
        self._outlets.append(outlet)

    async def next(self, outlet: Outlet) -> Json | None:
        """Return what the adapter gets next, or None if it is to be cut off. Raises Unavailable."""
        if not outlet.live and outlet.queue.empty():
            await self._catch_up(outlet)
        return await outlet.queue.get()

    def detach(self, outlet: Outlet) -> None:
        """Forget an adapter; what nobody else has and it did not report goes back to the queue."""
        self._outlets.remove(outlet)
        self._give_back(
            outlet.channel,
            [
                key
                for key in outlet.unreported
                if not any(key in other.unreported for other in self._outlets)
            ],
        )

    def _give_back(self, channel: str, keys: list[str]) -> None:
        if keys:
            self._returned.update(keys)
            self._wake(channel)

    async def run(self) -> None:
        """Hand what came back to the queue to whoever is attached, until cancelled."""
        while True:
            await self._released.wait()
            self._released.clear()
            due, self._due = self._due, set()
            returned, self._returned = self._returned, set()
            try:
                if returned:
                    await self._release(returned)
                    returned = set()
                for outlet in [o for o in self._outlets if o.channel in due and o.live]:
                    await self._catch_up(outlet)
            except Unavailable:  # logged by the database
                self._returned |= returned
                for channel in due:
                    self.retry_at(channel, now_ms() + int(limits.STORE_AGAIN_S * 1000))

    async def _release(self, keys: set[str]) -> None:
        def release(tx: Transaction) -> None:
            now = now_ms()
            for key in keys:
                tx.all("release_delivery", key=key, not_before=now, reason=None)

        await self._db.write(release)

    def claim(self, tx: Transaction, session: SessionRow, event: str | None) -> list[Row]:
        """Within a write that published for `session`: lease it if an adapter is there to take it."""
        if any(o.live and o.wants(session.channel, session.chat, event) for o in self._outlets):
            return queue.claim_deliveries(tx, session.channel, chat=session.chat, event=event)
        return []

    def publish(self, rows: list[Row]) -> None:
        """After that write: queue the leased deliveries for every adapter that wants them."""
        for row in rows:
            takers = [
                outlet
                for outlet in self._outlets
                if outlet.live and outlet.wants(row["channel"], row["chat"], row["in_reply_to"])
            ]
            for outlet in takers:
                self._put(outlet, row)
            if not takers:  # the adapter for which it was leased has left meanwhile
                self._give_back(row["channel"], [row["key"]])

    def report_activity(
        self, session: SessionRow, kind: str, text: str = "", event: str | None = None
    ) -> None:
        """Tell adapters what an agent does; those that are behind miss it."""
        activity = {
            "chat": session.chat,
            "thread": session.thread,
            "agent": session.agent,
            "kind": kind,
            "text": text,
            "inReplyTo": event,
        }
        for outlet in self._outlets:
            if (
                outlet.wants(session.channel, session.chat, event)
                and outlet.queue.qsize() < limits.STREAM_QUEUE // 2
            ):
                outlet.queue.put_nowait({"activity": activity, "delivery": None})

    def reported(self, key: str) -> None:
        """A delivery has come to its end: nobody needs to report it any more."""
        for outlet in self._outlets:
            outlet.unreported.discard(key)

    def retry_at(self, channel: str, not_before: int) -> None:
        """Have a released delivery handed over again when it is due."""
        loop = asyncio.get_running_loop()
        at = loop.time() + max(0.0, (not_before - now_ms()) / 1000)
        known = self._timers.get(channel)
        if known is not None:
            if known.when() <= at:
                return
            known.cancel()
        self._timers[channel] = loop.call_at(at, self._timer_ended, channel)

    def _timer_ended(self, channel: str) -> None:
        del self._timers[channel]
        self._wake(channel)

    def _wake(self, channel: str) -> None:
        self._due.add(channel)
        self._released.set()

    async def _catch_up(self, outlet: Outlet) -> None:
        """Queue what is pending, as much as fits; the rest when that has been read."""
        room = (limits.STREAM_QUEUE - outlet.queue.qsize()) // 2

        def claim(tx: Transaction) -> list[Row]:
            rows = queue.claim_deliveries(
                tx, outlet.channel, chat=outlet.chat, event=outlet.event, limit=room
            )
            # Writes are in order: what is published after one that found nothing more is handed over by
            # itself.
            outlet.live = len(rows) < room
            return rows

        rows = await self._db.write(claim)
        if outlet not in self._outlets:  # it left meanwhile
            self._give_back(outlet.channel, [row["key"] for row in rows])
            return
        for row in rows:
            self._put(outlet, row)
        (waiting,) = await self._db.read("next_retry", channel=outlet.channel, now=now_ms())
        if waiting["not_before"] is not None:
            self.retry_at(outlet.channel, waiting["not_before"])

    def _put(self, outlet: Outlet, row: Row) -> None:
        delivery = {
            "key": row["key"],
            "chat": row["chat"],
            "thread": row["thread"],
            "agent": row["agent"],
            "kind": row["kind"],
            "text": row["body"],
            "inReplyTo": row["in_reply_to"],
        }
        outlet.unreported.add(row["key"])
        try:
            outlet.queue.put_nowait({"delivery": delivery, "activity": None})
        except asyncio.QueueFull:
            # It reads too slowly for what its chat gets. Hanging up is safe: what it has not reported comes
            # again.
            journal.warning("adapter-too-slow", "hanging up", channel=outlet.channel, chat=outlet.chat)
            outlet.live = False
            while not outlet.queue.empty():
                outlet.queue.get_nowait()
            outlet.queue.put_nowait(None)
