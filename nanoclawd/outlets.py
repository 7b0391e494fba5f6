"""Attached channel adapters: who gets which delivery, and what happens to one that nobody reported."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from nanoclawd import journal, limits, outbox
from nanoclawd.db import Database, Transaction, now_ms
from nanoclawd.errors import Unavailable
from nanoclawd.ids import AgentName
from nanoclawd.messages import Place
from nanoclawd.outbox import Delivery
from nanoclawd.states import ChatState
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
    deadline: asyncio.TimerHandle | None = None  #: by when it must report something

    def sees(self, channel: str, chat: str) -> bool:
        return self.channel == channel and self.chat in (None, chat)

    def wants(self, channel: str, chat: str, events: Collection[str]) -> bool:
        return self.sees(channel, chat) and (self.event is None or self.event in events)


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
        if outlet.deadline is not None:
            outlet.deadline.cancel()
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

    def is_attached(self, channel: str) -> bool:
        """Say whether somebody takes what is sent to any chat of a channel."""
        return any(o.channel == channel and o.chat is None for o in self._outlets)

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

    def claim(self, tx: Transaction, *places: Place) -> list[Delivery]:
        """Within a write: lease what is next in `places`, and wherever it has published something.

        One at a time, so that one that fails holds back the younger ones. Only who waits for the answer to
        one event gets that at once, whatever else waits in the chat.
        """
        return [
            delivery for place in dict.fromkeys((*places, *tx.places)) for delivery in self._claim(tx, place)
        ]

    def _claim(self, tx: Transaction, place: Place) -> list[Delivery]:
        takers = [outlet for outlet in self._outlets if outlet.live and outlet.sees(*place[:2])]
        claimed = []
        for outlet in takers:
            if outlet.event is not None:
                claimed += outbox.claim_due(
                    tx, outlet.channel, chat=place[1], event=outlet.event, limit=limits.STREAM_QUEUE // 2
                )
        if any(outlet.event is None for outlet in takers):
            claimed += outbox.claim_next(tx, *place)
        return claimed

    def publish(self, deliveries: Iterable[Delivery]) -> None:
        """After that write: queue the leased deliveries for every adapter that wants them."""
        for delivery in deliveries:
            takers = [
                outlet
                for outlet in self._outlets
                if outlet.live and outlet.wants(delivery.channel, delivery.chat, delivery.events)
            ]
            for outlet in takers:
                self._put(outlet, delivery)
            if not takers:  # the adapter for which it was leased has left meanwhile
                self._give_back(delivery.channel, [delivery.key])

    def report_activity(
        self, agent: AgentName, place: Place, kind: str, text: str = "", events: Collection[str] = ()
    ) -> None:
        """Tell adapters what an agent does; those that are behind miss it."""
        channel, chat, thread = place
        what = {"agent": agent, "kind": kind, "text": text, "events": list(events)}
        self._tell(channel, chat, events, {"activity": {"chat": chat, "thread": thread, **what}})

    def report_chat(self, channel: str, chat: str, state: ChatState) -> None:
        """Tell adapters what has been said about a chat; one that is away asks again, see Invite()."""
        self._tell(channel, chat, (), {"chat": {"chat": chat, "state": state}})

    def _tell(self, channel: str, chat: str, events: Collection[str], item: Json) -> None:
        for outlet in self._outlets:
            if outlet.wants(channel, chat, events) and outlet.queue.qsize() < limits.STREAM_QUEUE // 2:
                outlet.queue.put_nowait({"delivery": None, "activity": None, "chat": None, **item})

    def reported(self, key: str, *, ended: bool = True) -> None:
        """An adapter has reported a delivery; unless it has `ended`, a part of it only."""
        for outlet in self._outlets:
            if key in outlet.unreported:
                if ended:
                    outlet.unreported.remove(key)
                self._expect_report(outlet)

    def _expect_report(self, outlet: Outlet) -> None:
        if outlet.deadline is not None:
            outlet.deadline.cancel()
        outlet.deadline = None
        if outlet.unreported:
            loop = asyncio.get_running_loop()
            outlet.deadline = loop.call_later(limits.REPORT_S, self._hang_up, outlet, "it reports nothing")

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
        began = now_ms()  # what comes due while we claim is found by one of the two queries

        def claim(tx: Transaction) -> list[Delivery]:
            found = outbox.claim_due(tx, outlet.channel, chat=outlet.chat, event=outlet.event, limit=room)
            # Writes are in order: what is published after one that found nothing more is handed over by
            # itself.
            outlet.live = len(found) < room
            return found

        deliveries = await self._db.write(claim)
        if outlet not in self._outlets:  # it left meanwhile
            self._give_back(outlet.channel, [delivery.key for delivery in deliveries])
            return
        for delivery in deliveries:
            self._put(outlet, delivery)
        (waiting,) = await self._db.read("next_retry", channel=outlet.channel, now=began)
        if waiting["not_before"] is not None:
            self.retry_at(outlet.channel, waiting["not_before"])

    def _put(self, outlet: Outlet, delivery: Delivery) -> None:
        outlet.unreported.add(delivery.key)
        if outlet.deadline is None:
            self._expect_report(outlet)
        try:
            outlet.queue.put_nowait({"delivery": delivery.shown, "activity": None, "chat": None})
        except asyncio.QueueFull:
            self._hang_up(outlet, "it reads too slowly")

    def _hang_up(self, outlet: Outlet, reason: str) -> None:
        """Cut an adapter off. That is safe: what it has not reported comes again."""
        journal.warning(
            "adapter-too-slow", f"{reason}, hanging up", channel=outlet.channel, chat=outlet.chat
        )
        outlet.live = False
        while not outlet.queue.empty():
            outlet.queue.get_nowait()
        outlet.queue.put_nowait(None)
