"""io.nanoclaw.Channel: what a channel adapter may ask of the router."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from nanoclawd import journal, limits, outbox, paths, queue
from nanoclawd.channels import Channel, Channels
from nanoclawd.commands import unescape
from nanoclawd.db import Database, Transaction, now_ms
from nanoclawd.errors import Refused
from nanoclawd.idl import read_interface
from nanoclawd.ids import TERMINAL
from nanoclawd.outbox import Delivery
from nanoclawd.outlets import Outlet, Outlets
from nanoclawd.pairing import Pairings
from nanoclawd.queue import Event, SessionRow, session_row
from nanoclawd.registry import Registry
from nanoclawd.routing import Arrival, Taken, add_chat, find_chat, reconsider, take, take_back
from nanoclawd.sandbox import Check, require
from nanoclawd.server import Call, Method, Service
from nanoclawd.sessions import Sessions
from nanoclawd.states import ChatState, DeliveryState
from nanoclawd.wire import Json

if TYPE_CHECKING:  # it needs, by way of answers about people, us
    from nanoclawd.chat_control import ChatControl

INTERFACE = "io.nanoclaw.Channel"
T = TypeVar("T")


class ChannelService:
    def __init__(
        self,
        *,
        db: Database,
        registry: Registry,
        sessions: Sessions,
        outlets: Outlets,
        pairings: Pairings,
        channels: Channels,
    ) -> None:
        self._db = db
        self._registry = registry
        self._sessions = sessions
        self._turns = sessions.turns
        self._outlets = outlets
        self._pairings = pairings
        #: Who sees to what is said to the router itself; set before a call comes.
        self.chat_control: ChatControl
        self._channels = channels
        self.service = Service(
            interface=read_interface(paths.INTERFACES / f"{INTERFACE}.varlink"),
            methods={
                "Announce": Method(handler=self._announce),
                "ReportHealth": Method(handler=self._report_health),
                "ReportSandbox": Method(handler=self._report_sandbox),
                "Deliver": Method(handler=self._deliver),
                "Invite": Method(handler=self._invite),
                "React": Method(handler=self._react),
                "Retract": Method(handler=self._retract),
                "Attach": Method(handler=self._attach, more=True),
                "ReportPart": Method(handler=self._report_part),
                "ReportSent": Method(handler=self._report_sent),
                "ReportFailed": Method(handler=self._report_failed),
                "StopTurn": Method(handler=self._stop_turn),
            },
        )

    async def _announce(self, call: Call) -> Json:
        channel = _channel(call)
        for name in (call.parameters["adapter"], *call.parameters["accounts"]):
            _check_name("adapter, accounts", name, empty=False)
        await self._channels.announce(channel, **call.parameters)
        return {"channel": channel.name}

    async def _report_health(self, call: Call) -> Json:
        text = _line(call.parameters["text"])[: limits.HEALTH_CHARACTERS]
        await self._channels.report_health(_channel(call), call.parameters["state"], text)
        return {}

    async def _report_sandbox(self, call: Call) -> Json:
        channel = _channel(call)
        channel.sandbox = [Check(**check) for check in call.parameters["checks"]]
        if self._registry.settings.require_sandbox:
            require(channel.sandbox)
        return {}

    async def _deliver(self, call: Call) -> Json:
        channel = _announced(call)
        parameters = {"channel": channel.name, **call.parameters}
        for name in ("chat", "event", "sender"):
            _check_name(name, parameters[name], empty=False)
        for name in ("thread", "agent"):
            _check_name(name, parameters[name] or "")
        size = len(parameters["text"].encode())
        if size > limits.TEXT_BYTES:
            raise Refused(
                f"the message is {size} bytes long, and {limits.TEXT_BYTES} is the limit",
                hint="put long material into a file in the agent's workspace",
            )
        if not parameters["text"].strip():
            raise Refused("the message is empty")
        if parameters["revision"] < 0:
            raise Refused("revision: must not be negative")
        event = Event(**{name: parameters[name] for name in Event.__dataclass_fields__})
        taken = await self.chat_control.take(self._arrival(event, parameters))
        if taken is None:
            taken = await self._take(replace(event, text=unescape(event.text)), parameters)
        for session in taken.sessions:
            self._sessions.wake(session)
            if hint := self._sessions.explain_hold(session.agent):
                self._outlets.report_activity(session.agent, event.place, "queued", hint, [event.event])
        return {"outcome": taken.outcome, "message": taken.message, "duplicate": taken.duplicate}

    async def _take(self, event: Event, parameters: Json) -> Taken:
        def first(taken: Taken) -> SessionRow | None:
            # A session that lives already gets its turn in the same commit.
            return taken.sessions[0] if taken.sessions else None

        if event.channel == TERMINAL:
            # Whoever may open this socket is the owner. A broken agent is refused while somebody reads why.
            agent = self._registry.config(_required_agent(parameters["agent"], event)).name

            def store(tx: Transaction) -> Taken:
                taken = Taken()
                taken.add(*queue.enqueue(tx, agent, event))
                return taken

            return await self._turns.write(store, first)
        if self._pairings.is_code(event.channel, event.text):
            self._outlets.publish(await self.decide(partial(self._pair, event=event)))
            return Taken()
        arrival = self._arrival(event, parameters)
        return await self._turns.write(lambda tx: take(tx, arrival), first)

    def _pair(self, tx: Transaction, event: Event) -> list[Delivery]:
        """Link the sender of a code to whom it was made for, and say so, if it is any good."""
        self._pairings.pair(tx, event)
        return self._outlets.claim(tx)

    async def decide(self, operation: Callable[[Transaction], T]) -> T:
        """Run a write about people or chats, and in the same let messages go that waited for it."""
        result, sessions = await self._db.write(lambda tx: (operation(tx), reconsider(tx)))
        for session in sessions:
            self._sessions.wake(session)
        return result

    async def _invite(self, call: Call) -> Json:
        for name in ("chat", "sender"):
            _check_name(name, call.parameters[name], empty=False)
        channel, chat = _announced(call).name, call.parameters["chat"]
        title = _shown(call.parameters["title"])
        direct = call.parameters["kind"] == "direct"

        def invite(tx: Transaction) -> ChatState:
            row = find_chat(tx, channel, chat, direct=direct, title=title)
            row = row or add_chat(tx, channel, chat, direct=direct, title=title)
            return ChatState.BLOCKED if row is None else ChatState(row["state"])

        return {"state": await self._db.write(invite)}

    def _arrival(self, event: Event, parameters: Json) -> Arrival:
        return Arrival(
            event=event,
            agent=parameters["agent"] or "",
            mentioned=bool(parameters["mentioned"]),
            program=parameters["writer"] == "program" or self._channels.is_own(event.sender),
            sender_name=_shown(parameters["senderName"]),
            direct=parameters["kind"] == "direct",
            title=_shown(parameters["title"]),
        )

    async def _react(self, call: Call) -> Json:
        parameters = call.parameters
        for name in ("chat", "event", "target", "sender", "reaction"):
            _check_name(name, parameters[name], empty=False)
        _check_name("thread", parameters["thread"])
        names = ("chat", "thread", "event", "sender")
        said = {name: parameters[name] for name in names}
        event = Event(channel=_announced(call).name, revision=0, text=parameters["reaction"], **said)
        outcome = await self.chat_control.react(event, parameters["target"], removed=parameters["removed"])
        return {"outcome": outcome, "duplicate": False}

    async def _retract(self, call: Call) -> Json:
        place = [call.parameters[name] for name in ("chat", "thread", "event")]
        channel = _channel(call).name
        return {"unseen": await self._db.write(lambda tx: take_back(tx, channel, *place))}

    async def _attach(self, call: Call) -> Json:
        for name in ("chat", "event"):
            if call.parameters[name] is not None:
                _check_name(name, call.parameters[name], empty=False)
        outlet = Outlet(_announced(call).name, call.parameters["chat"], call.parameters["event"])
        self._outlets.attach(outlet)
        try:
            while (item := await self._outlets.next(outlet)) is not None:
                await call.send(item)
        finally:
            self._outlets.detach(outlet)
        raise Refused("too much was waiting for this adapter", hint="attach again")

    async def _report_sent(self, call: Call) -> Json:
        key, receipt = call.parameters["key"], call.parameters["receipt"]
        _check_name("receipt", receipt)
        await self._end(_channel(call).name, key, DeliveryState.SENT, receipt=receipt)
        return {}

    async def _report_part(self, call: Call) -> Json:
        channel, key, parts = _channel(call).name, call.parameters["key"], call.parameters["parts"]
        receipt = call.parameters["receipt"]
        _check_name("receipt", receipt)
        if not 0 < parts <= limits.TEXT_BYTES:
            raise Refused("parts: must be the number of parts that the platform has taken so far")

        def report(tx: Transaction) -> None:
            if not tx.all("report_part", channel=channel, key=key, parts=parts, receipt=receipt):
                outbox.find(tx, channel, key)

        await self._db.write(report)
        self._outlets.reported(key, ended=False)
        return {}

    async def _report_failed(self, call: Call) -> Json:
        parameters = call.parameters
        channel, key = _channel(call).name, parameters["key"]
        reason = " ".join(parameters["reason"].split())[:500]
        _channel(call).last_error = reason

        def release(tx: Transaction) -> int | None:
            """Put it back, if it is worth another attempt; returns when that is due."""
            row = outbox.find(tx, channel, key)
            if not parameters["retryable"] or row["attempts"] >= limits.DELIVERY_ATTEMPTS:
                return None
            after_s = max(0.0, min(parameters["retryAfterSeconds"] or 0.0, limits.RETRY_AFTER_MAX_S))
            wait_ms = max(queue.backoff_ms(max(1, row["attempts"])), int(after_s * 1000))
            not_before = now_ms() + wait_ms
            if not tx.all("release_delivery", key=key, not_before=not_before, reason=reason):
                return 0  # it is nobody's any more
            text = f"{reason}, retrying in {wait_ms / 1000:.0f} s"
            outbox.tell(tx, journal.warning, "delivery-failed", row, text)
            return not_before

        not_before = await self._db.write(release)
        if not_before is None:
            await self._end(channel, key, DeliveryState.DEAD, reason=reason)
            return {}
        self._outlets.reported(key)
        if not_before:
            self._outlets.retry_at(channel, not_before)
        return {}

    async def _end(
        self,
        channel: str,
        key: str,
        state: DeliveryState,
        *,
        receipt: str | None = None,
        reason: str | None = None,
    ) -> None:
        """End a delivery, unless it had ended before, and hand over the next of its chat."""

        def end(tx: Transaction) -> list[Delivery]:
            row = outbox.end(tx, channel, key, state=state, receipt=receipt, reason=reason)
            return [] if row is None else self._outlets.claim(tx, (channel, row["chat"], row["thread"]))

        deliveries = await self._db.write(end)
        self._outlets.reported(key)
        self._outlets.publish(deliveries)

    async def _stop_turn(self, call: Call) -> Json:
        where = {"channel": _channel(call).name, **call.parameters}
        stopped = False
        for row in await self._db.read("busy_sessions", **where):
            stopped |= await self._turns.stop_turn(session_row(row), tuple(where.values()))
        return {"stopped": stopped}


def _channel(call: Call) -> Channel:
    """Return the channel whose listener took the call."""
    channel: Channel = call.caller.identity
    return channel


def _announced(call: Call) -> Channel:
    """The same. Raises Refused unless the adapter has said what it can do."""
    channel = _channel(call)
    if channel.announced is None and channel.name != TERMINAL:
        raise Refused("the adapter has not said what it can do", hint="call Announce() first")
    return channel


def _required_agent(name: str | None, event: Event) -> str:
    if name is None:
        raise Refused(f"chat '{event.chat}' of the terminal belongs to no agent", hint="name the agent")
    return name


def _shown(name: str | None) -> str:
    """Return what somebody chose to be called as a short line: nobody's messages wait for a better one."""
    return _line((name or "")[: limits.NAME_BYTES])


def _line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _check_name(name: str, value: str, *, empty: bool = True) -> None:
    if len(value.encode()) > limits.NAME_BYTES:
        raise Refused(f"{name}: is longer than {limits.NAME_BYTES} bytes")
    if not value and not empty:
        raise Refused(f"{name}: must not be empty")
    if not value.isprintable():
        raise Refused(f"{name}: holds a control character")
