"""A router for tests: the real database, sessions, outlets and services on real sockets, without systemd.

There is no user manager of systemd outside the nested machine, so SystemdDouble stands in for it: it "starts
a unit" by running a scripted runner as a task, which speaks the real protocol to the session's real
host.sock. RegistryDouble stands in for agents' files and units. All the rest is what nanoclawd runs.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

import pytest

from nanoclawd import __main__ as nanoclawd
from nanoclawd import channels, containers, limits, paths, people
from nanoclawd.agent_post import AgentPost
from nanoclawd.agent_service import AgentService
from nanoclawd.agents import AgentConfig
from nanoclawd.answers import Answers
from nanoclawd.approvals import Approvals
from nanoclawd.asks import Asks
from nanoclawd.audit import Audit
from nanoclawd.budget import NO_LIMITS
from nanoclawd.cards import Cards
from nanoclawd.channel_service import ChannelService
from nanoclawd.channels import Announcement, Capabilities, Channel, Channels
from nanoclawd.chat_control import ChatControl
from nanoclawd.db import Database, Row, Transaction
from nanoclawd.errors import ConfigError, Failed, NotFound
from nanoclawd.filestore import FileStore
from nanoclawd.gateway_link import GatewayLink
from nanoclawd.guard import Guard, Handler
from nanoclawd.hold_link import HoldLink
from nanoclawd.ids import AgentName, ChannelName, SessionName
from nanoclawd.killswitch import SLICE
from nanoclawd.messages import session_row
from nanoclawd.outlets import Outlets
from nanoclawd.pairing import Pairings
from nanoclawd.people_control import PeopleControl
from nanoclawd.policy import Policy, Rule, with_rule
from nanoclawd.privileges import Action, Privileges
from nanoclawd.registry import Agent, Registry
from nanoclawd.routing import add_chat, find_chat
from nanoclawd.server import Server
from nanoclawd.sessions import Sessions
from nanoclawd.settings import parse_settings
from nanoclawd.sockets import bind_listener
from nanoclawd.systemd import LoadedUnit, Systemd, UnitChange
from nanoclawd.usage import Usage
from nanoclawd.wire import Json, VarlinkError
from tests.support.varlink_peer import WAIT_S, Peer, eventually

AGENT = "io.nanoclaw.Agent"
CHANNEL = "io.nanoclaw.Channel"


class Container:
    """What a scripted runner sees of its world: its unit's name, and host.sock."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        agent, _, session = unit.removeprefix("nanoclaw-").removesuffix(".service").partition("@")
        runtime = paths.session_runtime(AgentName(agent), SessionName(session))
        self.socket = runtime / "host.sock"
        self.ready = asyncio.Event()  #: READY=1
        self.turns: list[Json] = []
        self._peers: list[Peer] = []
        self.calls: Peer
        self.stream: Peer

    async def connect(self, *, hello: bool = True) -> Peer:
        peer = await Peer.connect(self.socket)
        self._peers.append(peer)
        if hello:
            await peer.call(f"{AGENT}.Hello", {"protocol": 1, "version": "test"})
        return peer

    async def work(self) -> None:
        """Ask for work on a new connection."""
        self.stream = await self.connect()
        await self.stream.send(f"{AGENT}.Work", more=True)

    async def begin(self) -> None:
        """Do what each runner does first."""
        await self.work()
        self.calls = await self.connect()
        self.ready.set()

    async def take(self) -> Json:
        """Return the next turn. Waits without an end, as a runner does."""
        while True:
            work = await self.next()
            if work["turn"] is not None:
                turn: Json = work["turn"]
                self.turns.append(turn)
                return turn

    async def next(self) -> Json:
        data = await self.stream.reader.readuntil(b"\0")
        self.stream.reader._buffer[:0] = data  # type: ignore[attr-defined]  # let receive() check it, now in time
        return await self.stream.result()

    async def call(self, method: str, parameters: Json | None = None, **flags: bool) -> Json:
        return await self.calls.call(f"{AGENT}.{method}", parameters, **flags)

    async def finish(self, turn: Json, *replies: str, outcome: str = "answered") -> Json:
        return await self.call("FinishTurn", {"turn": turn["id"], "outcome": outcome, "replies": [*replies]})

    async def fail(self, turn: Json, *, retryable: bool = True, after_s: float | None = None) -> Json:
        error = {
            "code": "internal",
            "message": "it broke",
            "retryable": retryable,
            "retryAfterSeconds": after_s,
        }
        return await self.call(
            "FinishTurn", {"turn": turn["id"], "outcome": "failed", "replies": [], "error": error}
        )

    async def close(self) -> None:
        for peer in self._peers:
            await peer.close()


Program = Callable[[Container], Awaitable[None]]


async def echo(container: Container) -> None:
    """Answer everything, for ever."""
    await container.begin()
    while True:
        turn = await container.take()
        await container.finish(turn, *(f"echo: {message['text']}" for message in turn["messages"]))


class Ends(Exception):
    """A script raises it to end its unit with systemd's `result`."""

    def __init__(self, result: str, status: int = 0) -> None:
        super().__init__(result)
        self.result, self.status = result, status


class SystemdDouble:
    """Has the methods of Systemd that the router uses; see the module's docstring."""

    def __init__(self) -> None:
        self.on_unit_change: Callable[[UnitChange], None] = lambda change: None
        self.programs: list[Program] = []  #: of the next starts; then `program`
        self.program: Program = echo
        self.containers: dict[str, Container] = {}  #: running, or the last that ran
        self.starts: list[str] = []
        self.stops: list[str] = []
        self.most_at_once = 0
        self.failures: list[Exception] = []
        self.manager = 1  #: another one after a reboot
        self.ending = False
        self.slice_active = False
        self.slice_job = False
        self.slice_looks = 0  #: how often its state was asked for while it was inactive
        self._running: dict[str, asyncio.Task[None]] = {}
        self.adapters: set[str] = set()  #: units of channels that are up

    async def start_unit(self, unit: str, *, mode: str = "replace") -> None:
        if unit == SLICE:
            self.start_slice()
            return
        if mode == "fail" and self.slice_job:
            raise Failed("systemd: Transaction is destructive.")
        if unit.startswith("nanoclaw-channel@"):
            self.starts.append(unit)
            self.adapters.add(unit)
            return
        self.start_slice()  # as its Slice= implies
        self.starts.append(unit)
        if unit in self._running:
            return
        program = self.programs.pop(0) if self.programs else self.program
        container = self.containers[unit] = Container(unit)
        self._tell(unit, active_state="activating")
        running = asyncio.create_task(self._run(program, container), name=f"double of {unit}")
        self._running[unit] = running
        self.most_at_once = max(self.most_at_once, len(self._running))
        ready = asyncio.create_task(container.ready.wait())
        await asyncio.wait((ready, running), return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if not container.ready.is_set():
            raise Failed(f"StartUnit of {unit}: failed")
        self._tell(unit, active_state="active")

    async def _run(self, program: Program, container: Container) -> None:
        result = "success"
        try:
            await program(container)
            if not container.ready.is_set():
                result = "protocol"
        except asyncio.CancelledError:
            pass
        except Ends as exc:
            result = exc.result
            self.on_unit_change(UnitChange(unit=container.unit, exit_status=exc.status))
        except (OSError, EOFError):
            result = "signal"
        except Exception as exc:  # what a script asserts
            last_words = {"message": "the database is closed", "hint": ""}  # of a router that ends
            if not (isinstance(exc, VarlinkError) and exc.parameters == last_words):
                self.failures.append(exc)
            result = "exit-code"
        self._tell(container.unit, active_state="deactivating")
        await container.close()
        del self._running[container.unit]
        if result != "success":
            self._tell(container.unit, result=result)
        self._tell(container.unit, active_state="inactive" if result == "success" else "failed")

    def _tell(self, unit: str, *, active_state: str | None = None, result: str | None = None) -> None:
        self.on_unit_change(UnitChange(unit=unit, active_state=active_state, result=result))

    def is_running(self, unit: str) -> bool:
        return unit in self._running

    async def stop_unit(self, unit: str) -> None:
        if unit == SLICE:
            await self.stop_slice()
            return
        self.stops.append(unit)
        self.adapters.discard(unit)
        await self.end(unit)

    def start_slice(self) -> None:
        """What `systemctl start` does, whoever asks for it."""
        if not self.slice_active:
            self.slice_active = True
            self._tell(SLICE, active_state="active")

    async def stop_slice(self) -> None:
        """The same for `systemctl stop`."""
        self.announce_job()
        await self.end_all()
        self.slice_active = False
        self._tell(SLICE, active_state="inactive")
        self.announce_job(over=True)

    def announce_job(self, *, over: bool = False) -> None:
        """The slice has got a job, or has none any more."""
        self.slice_job = not over
        self.on_unit_change(UnitChange(unit=SLICE, job=self.slice_job))

    async def has_job(self, unit: str) -> bool:
        assert unit == SLICE
        return self.slice_job

    async def started_at(self) -> int:
        return self.manager

    async def is_ending(self) -> bool:
        return self.ending

    async def end(self, unit: str) -> None:
        """End a unit without the router's asking, e.g. because its last process is gone."""
        if (task := self._running.get(unit)) is not None:
            task.cancel()
            await asyncio.wait((task,))

    async def end_all(self) -> None:
        for unit in list(self._running):
            await self.end(unit)

    async def reset_failed(self, unit: str) -> None:
        pass

    async def unit_property(self, unit: str, interface: str, name: str) -> Any:
        assert (interface, name) == ("Unit", "ActiveState")
        if unit == SLICE and not self.slice_active:  # asked for, it is loaded, and soon forgotten again
            self.slice_looks += 1
            asyncio.get_running_loop().call_soon(lambda: self._tell(SLICE, active_state="inactive"))
            return "inactive"
        if unit == SLICE:
            return "active"
        return "active" if unit in self._running else "inactive"

    async def list_units(self, patterns: list[str]) -> list[LoadedUnit]:
        return [
            LoadedUnit(name=unit, load_state="loaded", active_state="active", sub_state="running", path="/")
            for unit in (*self._running, *self.adapters)
            if any(fnmatch(unit, pattern) for pattern in patterns)
        ]


async def killed(container: Container) -> None:
    """A program's end by signal."""
    raise Ends("signal")


class RegistryDouble:
    """Agents without files and units."""

    def __init__(self) -> None:
        self.agents: dict[str, AgentConfig] = {}
        self.held: set[str] = set()
        self.settings = parse_settings("")
        self.add("berta")

    def add(self, name: str) -> None:
        self.agents[name] = AgentConfig(name=AgentName(name), provider="echo")

    def names(self) -> list[str]:
        return sorted(self.agents)

    def summary(self) -> str:
        return f"{len(self.agents)} agents"

    def find(self, name: str) -> Agent | None:
        if name not in self.agents:
            return None
        return Agent(name=AgentName(name), config=self.agents[name], index=0, held=name in self.held)

    def get(self, name: str) -> Agent:
        if (agent := self.find(name)) is None:
            raise NotFound(f"no agent named '{name}'", hint="there are others")
        return agent

    def config(self, name: str) -> AgentConfig:
        self.get(name)
        if name == "broken":
            raise ConfigError("agents/broken.toml:1: is broken", hint="repair it")
        return self.agents[name]

    async def add_rule(self, name: str, rule: Rule, *, last: bool = False) -> Agent:
        config = self.agents[name]
        self.agents[name] = replace(config, policy=with_rule(config.policy, rule, last=last))
        return self.get(name)

    def privileges(self, name: str) -> Privileges:
        config = self.agents.get(name)
        return config.guard.or_default(self.settings.guard) if config else self.settings.guard

    async def set_table(self, name: str, table: str, changes: Json) -> Agent:
        config = self.get(name).config
        assert config is not None
        values = {table: replace(getattr(config, table), **changes)}
        self.agents[name] = replace(config, **values)
        return self.get(name)

    def policy(self, name: str) -> Policy:
        return self.agents[name].all_policy if name in self.agents else Policy()

    def instructions(self, name: str) -> str:
        return "Be brief."

    def may_run(self, name: str) -> bool:
        return name in self.agents and name not in self.held

    async def ensure_unit(self, name: str) -> None:
        self.config(name)


class Adapter:
    """A channel adapter: one connection streams, the other reports."""

    def __init__(self, stream: Peer, calls: Peer) -> None:
        self.stream, self.calls = stream, calls
        self.activity: list[str] = []

    async def delivery(self) -> Json:
        """Return the next delivery, and collect activity that comes before it."""
        while True:
            item = await self.stream.result()
            if item["delivery"] is not None:
                delivery: Json = item["delivery"]
                return delivery
            if item["chat"] is None:
                self.activity.append(item["activity"]["kind"])

    async def sent(self, delivery: Json) -> None:
        parameters = {"key": delivery["key"], "receipt": "r"}
        assert await self.calls.call(f"{CHANNEL}.ReportSent", parameters) == {}

    async def failed(self, delivery: Json, *, retryable: bool, after_s: float | None = None) -> None:
        await self.calls.call(
            f"{CHANNEL}.ReportFailed",
            {
                "key": delivery["key"],
                "reason": "no\nconnection",
                "retryable": retryable,
                "retryAfterSeconds": after_s,
            },
        )

    async def reply(self) -> str:
        """Return the text of the next delivery, and report it as sent."""
        delivery = await self.delivery()
        await self.sent(delivery)
        return cast(str, delivery["text"])

    async def close(self) -> None:
        await self.stream.close()
        await self.calls.close()


def announce(tx: Transaction, **capabilities: bool | int) -> None:
    """Have the adapter of the channel "test" have said that it can do something, and nothing else."""
    said = {**Capabilities().shown, **capabilities}
    row = {"name": "test", "adapter": "t", "capabilities": json.dumps(said), "accounts": "[]", "now": 0}
    tx.all("announce_channel", **row)


#: As WireChat() has them.
WIRING: Json = {
    "engagement": "mention",
    "pattern": "",
    "sticky_seconds": 600,
    "priority": 0,
    "exclusive": 0,
    "session_mode": "thread",
    "access": "strict",
    "keep_context": 0,
}


def wire(tx: Transaction, channel: str, chat: str, agent: str, *senders: str, **values: Any) -> int:
    """Have an agent listen in a chat, and all `senders` be the owner's accounts; returns the chat's
    number.
    """
    place = {"direct": values.pop("direct", False), "title": ""}
    row = find_chat(tx, channel, chat, **place) or add_chat(tx, channel, chat, **place)
    assert row is not None
    tx.all("set_chat_state", id=row["id"], state="open")
    tx.all("set_wiring", chat=row["id"], agent=agent, **{**WIRING, **values})
    for sender in senders:
        people.link(tx, people.find_person(tx, people.OWNER), channel, sender, how="linked")
    return int(row["id"])


class Router:
    """One life of the router; see Place.router()."""

    def __init__(self, place: Place, slots: int) -> None:
        self.place = place
        self.started = asyncio.Event()
        self.peers: list[Peer] = []
        self.db: Database
        self.sessions: Sessions
        self.channel: Server
        self.channel_task: asyncio.Task[None]
        self.outlets: Outlets
        self.audit: Audit
        self.usage: Usage
        self.gateway: GatewayLink
        self.pairings: Pairings
        self.files: FileStore
        self._tasks: asyncio.TaskGroup
        self.channels: ChannelService
        self.channel_list: Channels
        self.approvals: Approvals
        self.guard: Guard
        self.people: PeopleControl
        self.answers: Answers
        self.holds: HoldLink
        self._slots = slots
        self._wired: set[tuple[str, ...]] = set()

    async def run(self) -> None:
        place = self.place
        place.channel.parent.mkdir(parents=True, exist_ok=True)
        self.db = db = await Database.open(paths.state() / "nanoclaw.db")
        systemd, registry = cast(Systemd, place.systemd), cast(Registry, place.registry)
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                tasks.create_task(db.run(), name="database")
                if place.capabilities:
                    await db.write(lambda tx: announce(tx, **place.capabilities))
                for chat, agent, sender in place.wired:
                    access = {"access": "ask", "engagement": "every"} if sender is None else {}
                    await self.wire(chat, agent, *filter(None, (sender,)), **access)
                self.outlets = outlets = Outlets(db)
                self.audit = Audit(db)
                self.usage = Usage(db, lambda agent: place.budget)
                self.approvals = Approvals(db=db, registry=registry)
                await self.approvals.load()
                self.holds = HoldLink(self.approvals)
                self.gateway = GatewayLink(
                    self.approvals.policy, self.audit.take_over, self.usage, [self.holds.run]
                )
                self.approvals.on_expiry = self.gateway.change
                self.sessions = Sessions(
                    db=db,
                    systemd=systemd,
                    registry=registry,
                    outlets=outlets,
                    gateway=self.gateway,
                    tasks=tasks,
                    slots=self._slots,
                )
                wake = self.sessions.wake
                self.guard = Guard(db=db, registry=registry, outlets=outlets, wake=wake)
                parts: dict[str, Any] = {
                    "db": db,
                    "registry": registry,
                    "sessions": self.sessions,
                    "outlets": outlets,
                }
                self.pairings = Pairings()
                self.files = FileStore(db)
                await self.files.prepare()
                more: dict[str, Any] = {"files": self.files, "asks": Asks(db)}
                agents = AgentService(**parts, **more, guard=self.guard, approvals=self.approvals)
                self.guard.handlers |= place.handlers
                self.sessions.containers.service = agents.service
                self.channel_list = Channels(db, systemd, tasks)
                more |= {"pairings": self.pairings, "channels": self.channel_list}
                self.channels = ChannelService(**parts, **more)
                self.channel_list.service = self.channels.service
                shared: dict[str, Any] = {"db": db, "registry": registry}
                self.people = PeopleControl(
                    **shared, outlets=outlets, pairings=self.pairings, channels=self.channels
                )
                self.answers = Answers(
                    **shared,
                    approvals=self.approvals,
                    guard=self.guard,
                    holds=self.holds,
                    gateway=self.gateway,
                    audit=self.audit,
                    people=self.people,
                )
                self.channels.chat_control = ChatControl(
                    **shared,
                    sessions=self.sessions,
                    outlets=outlets,
                    usage=self.usage,
                    answers=self.answers,
                )
                listeners = {name: sock.dup() for name, sock in place.fd_store.items()}
                place.open += listeners.values()
                attempts = registry.settings.attempts
                kept = {name: listeners.pop(name) for name in [*listeners] if name.startswith("channel.")}
                await nanoclawd._recover(db, systemd, self.sessions, listeners, attempts=attempts)
                await self.channel_list.load(kept)
                await self.start_waiting()
                tasks.create_task(outlets.run(), name="outlets")
                tasks.create_task(self.guard.run(), name="guard")
                known = place.registry.names
                post = AgentPost(db=db, outlets=outlets, wake=wake, known=lambda name: name in known())
                if place.agents_talk:
                    tasks.create_task(post.run(), name="agent post")
                tasks.create_task(Cards(db, outlets).run(), name="cards")
                test = Channel(name=ChannelName("test"), announced=Announcement())
                self.channel = Server(
                    self.channels.service,
                    place.listener,
                    identity=test,
                    max_fds=limits.FILES_PER_MESSAGE,
                    trusted=False,
                )
                self.channel_task = tasks.create_task(self.channel.run(), name="channel")
                self.started.set()
        finally:
            await db.close()

    async def wire(self, chat: str, agent: str, *senders: str, channel: str = "test", **values: Any) -> None:
        """Have an agent listen in a chat, unless it does, and all `senders` be the owner's accounts."""
        await self.db.write(lambda tx: wire(tx, channel, chat, agent, *senders, **values))

    async def start_waiting(self) -> None:
        for row in await self.db.read("find_work"):
            self.sessions.wake(session_row(row))

    async def peer(self, channel: str = "test") -> Peer:
        """Return a connection to the socket of a channel: of "test", of the terminal, or one with a file."""
        match channel:
            case "test":
                path = self.place.channel
            case "terminal":
                path = self._serve_terminal()
            case _:
                path = paths.channel_socket(ChannelName(channel))
        peer = await Peer.connect(path)
        self.peers.append(peer)
        return peer

    def _serve_terminal(self) -> Path:
        path = paths.terminal_socket()
        if not path.exists():
            path.parent.mkdir(parents=True)
            listener = bind_listener(path, foreign=False)
            self.place.open.append(listener)
            server = Server(self.channels.service, listener, identity=self.channel_list.terminal)
            self._tasks.create_task(server.run(), name="terminal")
        return path

    async def deliver(self, text: str, **more: Any) -> Json:
        """Hand over a message of a person; each call is another event unless `event` says otherwise."""
        channel = more.pop("channel", "test")
        parameters = {
            "chat": "chat",
            "thread": "",
            "event": f"e{next(self.place.events)}",
            "revision": 0,
            "sender": "someone",
            "text": text,
            "agent": "berta",
            **more,
        }
        place = (channel, parameters["chat"], parameters["agent"], parameters["sender"])
        if all(place) and place not in self._wired:
            self._wired.add(place)
            channel, chat, agent, sender = place
            await self.wire(chat, agent, sender, channel=channel)
        peer = await self.peer(channel)
        try:
            return await peer.call(f"{CHANNEL}.Deliver", parameters)
        finally:
            await peer.close()

    async def stop_turn(self, chat: str = "chat") -> bool:
        peer = await self.peer()
        reply = await peer.call(f"{CHANNEL}.StopTurn", {"chat": chat, "thread": ""})
        return cast(bool, reply["stopped"])

    async def attach(self, chat: str | None = None, event: str | None = None) -> Adapter:
        """Return an adapter that has been handed all that was pending."""
        adapter = Adapter(await self.peer(), await self.peer())
        known = list(self.outlets._outlets)
        await adapter.stream.send(f"{CHANNEL}.Attach", {"chat": chat, "event": event}, more=True)
        await eventually(lambda: [o for o in self.outlets._outlets if o not in known])
        (outlet,) = [o for o in self.outlets._outlets if o not in known]
        await eventually(lambda: outlet.live or outlet.queue.qsize() or outlet.unreported)
        return adapter

    async def inbox(self) -> list[Row]:
        return list(await self.db._reader.execute_fetchall("SELECT * FROM inbox ORDER BY seq"))

    async def outbox(self) -> list[Row]:
        return list(await self.db._reader.execute_fetchall("SELECT * FROM outbox ORDER BY seq"))

    async def states(self) -> list[str]:
        return [row["state"] for row in await self.inbox()]

    async def settled(self) -> None:
        """Return when every message has ended."""
        async with asyncio.timeout(WAIT_S):
            while await self.db.read("find_work"):  # noqa: ASYNC110
                await asyncio.sleep(0.001)


class Place:
    """What outlives a router: directories, the channel's listener, systemd with its fd store, agents."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        for variable in ("RUNTIME_DIR", "STATE_HOME", "CONFIG_HOME", "DATA_HOME"):
            (root / variable).mkdir()
            patch.setenv(f"XDG_{variable}", str(root / variable))
        patch.delenv("NOTIFY_SOCKET", raising=False)
        self.systemd = SystemdDouble()
        self.registry = RegistryDouble()
        self.budget = NO_LIMITS  #: of all agents
        self.handlers: dict[Action, Handler] = {}  #: of actions that were held, in place of the real ones
        self.fd_store: dict[str, socket.socket] = {}
        self.open: list[socket.socket] = []  #: of the router that runs
        for module in (channels, containers, nanoclawd):
            patch.setattr(module, "store_listener", self._store, raising=False)
            patch.setattr(module, "forget_listener", self._forget, raising=False)
        self.events = itertools.count(1)
        self.agents_talk = False  #: the channel "agent" has its adapter
        self.capabilities: dict[str, bool] = {}  #: of the channel "test"
        #: Chats of the channel "test", who listens there from the first, and whose account is the owner's.
        self.wired: list[tuple[str, str, str | None]] = []
        self.channel = root / "channel" / "socket"
        self.channel.parent.mkdir()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.channel))
        self.listener.listen(128)

    def _store(self, name: str, listener: socket.socket) -> None:
        self.open.append(listener)
        self.fd_store[name] = listener.dup()

    def _forget(self, name: str) -> None:
        if name in self.fd_store:
            self.fd_store.pop(name).close()

    @asynccontextmanager
    async def router(self, slots: int = 4) -> AsyncIterator[Router]:
        """Run a router while the body runs; fails if it ends by itself, as it does after a bug."""
        router = Router(self, slots)
        running = asyncio.create_task(router.run(), name="router")
        started = asyncio.create_task(router.started.wait())
        try:
            await asyncio.wait((started, running), return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
            yield router
            if running.done():
                running.result()
                raise AssertionError("the router ended")
        finally:
            for peer in router.peers:
                await peer.close()
            started.cancel()
            running.cancel()
            ended, _ = await asyncio.wait((running,), timeout=WAIT_S)
            assert ended, "the router does not stop"
            for listener in self.open:  # which the end of the process closes
                listener.close()
            self.open.clear()

    def run(self, body: Callable[[], Awaitable[None]]) -> None:
        """Run a test; fails if it leaves a task."""

        async def main() -> None:
            try:
                async with asyncio.timeout(2 * WAIT_S):
                    await body()
            finally:
                await self.systemd.end_all()
                if self.systemd.failures:
                    raise ExceptionGroup("scripted runners failed", self.systemd.failures)
            for _ in range(3):  # what was cancelled just now ends
                await asyncio.sleep(0)
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, left

        try:
            asyncio.run(main())
        finally:
            self.close()

    def close(self) -> None:
        """Close what systemd would have kept."""
        self.listener.close()
        for sock in self.fd_store.values():
            sock.close()
