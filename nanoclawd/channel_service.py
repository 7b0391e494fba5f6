"""io.nanoclaw.Channel: what a channel adapter may ask of the router."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from nanoclawd import journal, leases, limits, outbox, paths, queue
from nanoclawd.asks import Asks, Entitled, Said
from nanoclawd.channels import Channel, Channels
from nanoclawd.commands import unescape
from nanoclawd.db import Database, Transaction, now_ms
from nanoclawd.errors import NotFound, Refused
from nanoclawd.filestore import FileStore, Stored, add_rows, choose_files
from nanoclawd.idl import read_interface
from nanoclawd.ids import TERMINAL
from nanoclawd.messages import Event, SessionRow, session_row
from nanoclawd.outbox import Delivery
from nanoclawd.outlets import Outlet, Outlets
from nanoclawd.pairing import Pairings
from nanoclawd.reactions import Reactions
from nanoclawd.registry import Registry
from nanoclawd.routing import (
    Arrival,
    Outcome,
    Taken,
    add_chat,
    find_chat,
    may_talk,
    reconsider,
    take,
    take_back,
)
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
        files: FileStore,
        asks: Asks,
        channels: Channels,
    ) -> None:
        self._db = db
        self._registry = registry
        self._sessions = sessions
        self._turns = sessions.turns
        self._outlets = outlets
        self._pairings = pairings
        self._files = files
        self._asks, self._reactions = asks, Reactions(db=db, asks=asks)
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
                "OpenFile": Method(handler=self._open_file),
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
        fds = call.connection.take_fds()
        try:
            return await self._deliver_with(call, fds)
        finally:
            if fds:
                call.apart.close(*fds)

    async def _deliver_with(self, call: Call, fds: list[int]) -> Json:
        channel = _announced(call)
        parameters = call.parameters = {"channel": channel.name, **call.parameters}
        for name in ("chat", "event", "sender"):
            _check_name(name, parameters[name], empty=False)
        for name in ("thread", "agent", "inReplyTo"):
            _check_name(name, parameters[name] or "")
        files = parameters["files"] = parameters["files"] or []
        if len(files) != len(fds) or len(files) > limits.FILES_PER_MESSAGE:
            most = limits.FILES_PER_MESSAGE
            raise Refused(f"files: {len(files)} with {len(fds)} descriptors; at most {most}, with one each")
        size = len(parameters["text"].encode())
        if size > limits.TEXT_BYTES:
            raise Refused(
                f"the message is {size} bytes long, and {limits.TEXT_BYTES} is the limit",
                hint="put long material into a file in the agent's workspace",
            )
        if not parameters["text"].strip() and not files:
            raise Refused("the message is empty")
        if parameters["revision"] < 0:
            raise Refused("revision: must not be negative")
        event = Event(**{name: parameters[name] for name in Event.__dataclass_fields__})
        taken = None if files else await self.chat_control.take(self._arrival(event, parameters))
        if taken is None:
            event = replace(event, text=unescape(event.text))
            if files and not self._pairings.is_code(event.channel, event.text):
                taken = await self._take_with_files(call, event, fds)
            else:
                taken = await self._take(event, parameters)
        for session in taken.sessions:
            self._sessions.wake(session)
            if hint := self._sessions.explain_hold(session.agent):
                self._outlets.report_activity(session.agent, event.place, "queued", hint, [event.event])
        return {"outcome": taken.outcome, "message": taken.message, "duplicate": taken.duplicate}

    async def _take(self, event: Event, parameters: Json, stored: Sequence[Stored] = ()) -> Taken:
        """Have an event go where it must, with files that were copied for it."""
        if event.channel != TERMINAL and self._pairings.is_code(event.channel, event.text):
            self._outlets.publish(await self.decide(partial(self._pair, event=event)))
            return Taken()
        route = self._router_of(event, parameters)

        def take_all(tx: Transaction) -> Taken:
            taken = route(tx)
            if stored and _gets_files(taken):
                add_rows(tx, stored, agent=_agent_of(taken), event=event.key)
            return taken

        # A session that lives already gets its turn in the same commit.
        return await self._turns.write(take_all, _first_session)

    async def _take_with_files(self, call: Call, event: Event, fds: Sequence[int]) -> Taken:
        """The same, with files that are copied first: but not for somebody who is not heard."""
        taken = await self._foresee(self._router_of(event, call.parameters))
        if not _gets_files(taken):
            return await self._take(event, call.parameters)
        shown = call.parameters["files"]
        (count,) = await self._db.read("count_files", agent=_agent_of(taken))
        chosen, notes = choose_files(shown, count, held=not taken.sessions)
        text = "\n".join(filter(None, (event.text, *notes)))
        stored = await self._files.take(call.apart, [shown[n] for n in chosen], [fds[n] for n in chosen])
        kept = False
        try:
            taken = await self._take(replace(event, text=text), call.parameters, stored)
            kept = _gets_files(taken)
        finally:
            if kept:
                self._files.forget([file.id for file in stored])
            else:
                await self._files.drop(stored)
        return taken

    async def _foresee(self, route: Callable[[Transaction], Taken]) -> Taken:
        """Return what would become of an event."""

        def attempt(tx: Transaction) -> None:
            raise _Tried(route(tx))

        try:
            await self._db.write(attempt)
        except _Tried as tried:
            return tried.taken
        raise AssertionError("it was stored")

    def _router_of(self, event: Event, parameters: Json) -> Callable[[Transaction], Taken]:
        """Return the write that has an event go where it must."""
        said = Said(
            place=event.place,
            event=event.event,
            sender=event.sender,
            text=event.text,
            target=parameters["inReplyTo"],
        )
        may_answer = not parameters["files"] and parameters["writer"] != "program" and not event.revision

        def answer(tx: Transaction, entitled: Entitled) -> Taken | None:
            if not may_answer or tx.one("find_event", **event.key) is not None:
                return None
            taken = self._asks.take(tx, said, entitled)
            if taken is None:
                return None
            return Taken(outcome=Outcome.QUEUED, message=taken[0], duplicate=taken[1])

        if event.channel == TERMINAL:
            # Whoever may open this socket is the owner. A broken agent is refused while somebody reads why.
            agent = self._registry.config(_required_agent(parameters["agent"], event)).name

            def store(tx: Transaction) -> Taken:
                if (answered := answer(tx, lambda asking: asking == agent)) is not None:
                    return answered
                taken = Taken()
                taken.add(*queue.enqueue(tx, agent, event))
                return taken

            return store
        arrival = self._arrival(event, parameters)

        def route(tx: Transaction) -> Taken:
            entitled = partial(may_talk, tx, event.channel, event.chat, event.sender)
            return answer(tx, entitled) or take(tx, arrival)

        return route

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
        if event.channel == TERMINAL or self._channels.is_own(event.sender):
            return {"outcome": Outcome.DROPPED, "duplicate": False}
        outcome, duplicate = await self._reactions.take(
            event, parameters["target"], removed=parameters["removed"], chat_control=self.chat_control
        )
        return {"outcome": outcome, "duplicate": duplicate}

    async def _retract(self, call: Call) -> Json:
        place = [call.parameters[name] for name in ("chat", "thread", "event")]
        channel = _channel(call).name
        unseen = await self._db.write(lambda tx: take_back(tx, channel, *place))
        if unseen:
            await self._files.sweep()
        return {"unseen": unseen}

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

    async def _open_file(self, call: Call) -> Json:
        channel, key, number = _channel(call).name, call.parameters["key"], call.parameters["number"]
        if not await self._db.read("find_delivery", channel=channel, key=key):
            raise NotFound(f"no delivery {key[:80]!r} on channel '{channel}'")
        files = await self._db.read("files_of_delivery", key=key)
        if not 0 <= number < len(files):
            raise NotFound(f"delivery {key[:80]!r} has {len(files)} files, and no number {number}")
        call.fd = self._files.open(files[number])
        return {}

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
            elif receipt:
                tx.all("add_receipt", key=key, part=parts, channel=channel, receipt=receipt)

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
            wait_ms = max(leases.backoff_ms(max(1, row["attempts"])), int(after_s * 1000))
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


class _Tried(Exception):
    """Rolls back what was tried."""

    def __init__(self, taken: Taken) -> None:
        super().__init__()
        self.taken = taken


def _first_session(taken: Taken) -> SessionRow | None:
    return taken.sessions[0] if taken.sessions else None


def _gets_files(taken: Taken) -> bool:
    return not taken.duplicate and taken.outcome in (Outcome.QUEUED, Outcome.HELD)


def _agent_of(taken: Taken) -> str:
    """Return whose files are that come with it; of what is held nobody knows."""
    return taken.sessions[0].agent if taken.sessions else ""


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
