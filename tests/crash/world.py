"""One conversation from its beginning to its check: the router lives and dies, all else goes on."""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import shutil
import socket
import tempfile
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nanoclawd.errors import NanoclawError
from tests.crash.check import answered_events, check
from tests.crash.life import MESSAGE_BYTES, Orders, send
from tests.crash.people import Adapter, Person
from tests.crash.points import Kind
from tests.crash.record import Fault, Record
from tests.crash.runner import Runner
from tests.crash.script import AGENTS, Plan
from tests.support.router import SystemdDouble

SETTLE_S = 15.0  #: a conversation takes a tenth of a second; only one that fails reaches this
POLL_S = 0.001
UNSURE_S = 0.5


@dataclass(frozen=True, slots=True)
class Death:
    """One life of the router that ended at a point."""

    point: int
    kind: Kind
    what: str

    def __str__(self) -> str:
        return f"at point {self.point}, {self.kind}{f' ({self.what})' if self.what else ''}"


@dataclass(slots=True)
class Outcome:
    plan: Plan
    deaths: list[Death]
    faults: list[tuple[Fault, str]]
    points: int  #: of the last life, which was not killed
    log: str = ""  #: what the router said, if there are faults


async def converse(plan: Plan, fork_server: socket.socket, base: Path) -> Outcome:
    """Run one conversation in a new directory below `base`, and check it."""
    root = Path(tempfile.mkdtemp(dir=base))
    try:
        world = World(plan, root, fork_server)
        await world.run()
        faults = world.record.faults + check(world.record, world.database, deaths=len(world.deaths))
        log = (root / "log").read_text(errors="replace")
        if "Traceback" in log:
            faults.append((Fault.OTHER, "the router's log has a traceback"))
        return Outcome(plan, world.deaths, faults, world.points, log if faults else "")
    finally:
        shutil.rmtree(root)


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(sock, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(sock)


class World:
    """What outlives the router: systemd with its containers and fd store, the channel's socket, people."""

    def __init__(self, plan: Plan, root: Path, fork_server: socket.socket) -> None:
        self.record = Record(plan)
        self.deaths: list[Death] = []
        self.points = 0  #: of the last life
        self._plan, self._root, self._fork_server = plan, root, fork_server
        for variable in ("RUNTIME_DIR", "STATE_HOME", "CONFIG_HOME"):
            (root / variable).mkdir()
            os.environ[f"XDG_{variable}"] = str(root / variable)
        self.database = root / "STATE_HOME/nanoclaw/nanoclaw.db"
        self._channel = root / "channel.sock"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._channel))
        self._listener.listen(128)
        self._fd_store: dict[str, int] = {}
        self._leaving = asyncio.Event()
        self._systemd = SystemdDouble()
        self._systemd.program = lambda container: Runner(container, self.record, self._leaving).run()
        self._systemd.on_unit_change = lambda change: self._tell("event", "on_unit_change", change)
        self._link: socket.socket | None = None  #: to the router that lives
        self._calls: set[asyncio.Task[None]] = set()
        self._stopped = False

    async def run(self) -> None:
        """Return when all has been said and done, or that takes too long; what is wrong is in the record."""
        adapter = Adapter(self.record, self._channel)
        try:
            async with asyncio.timeout(SETTLE_S), asyncio.TaskGroup() as tasks:
                adapting = tasks.create_task(adapter.run(), name="adapter")
                tasks.create_task(self._live(), name="lives")
                making_sure = tasks.create_task(self._make_sure(), name="making sure")
                await self._talk()
                making_sure.cancel()
                adapting.cancel()
                await self._stop()
        except* TimeoutError:
            open_ = [marker for marker in self.record.messages if not self.record.has_ended(marker)]
            self.record.fault(Fault.OTHER, f"no end after {SETTLE_S} s; open: {open_}")
        except* Exception:
            self.record.fault(Fault.OTHER, traceback.format_exc())
        finally:
            await self._systemd.end_all()
            await self._close()
        for failure in self._systemd.failures:
            self.record.fault(Fault.OTHER, "".join(traceback.format_exception(failure)))

    async def _talk(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for chat in self._plan.chats:
                person = Person(chat, self.record, self._channel)
                tasks.create_task(person.talk(), name=chat.name)
        await self.record.until(self.record.all_ended)

    async def _make_sure(self) -> None:
        """Look up what the router took of runners that were ended before they heard of it."""
        while True:
            await asyncio.sleep(UNSURE_S)
            if self.record.unsure:
                self.record.finished |= self.record.unsure & answered_events(self.database)
                self.record.note()

    async def _stop(self) -> None:
        """Have the runners leave, and end the router when nothing of a session is left."""
        self._leaving.set()
        try:
            while not self._stopped:
                if not self._orphans():
                    self._tell("stop")
                await asyncio.sleep(POLL_S)
        except asyncio.CancelledError:  # it took too long
            for orphan in self._orphans():
                self.record.fault(Fault.ORPHAN, orphan)
            raise

    def _orphans(self) -> list[str]:
        """Return what there is of sessions."""
        directories = (self._root / "RUNTIME_DIR").glob("nanoclaw/agents/*")
        return [
            *(f"unit {unit}" for unit in filter(self._systemd.is_running, self._systemd.containers)),
            *(f"listener {name} in the fd store" for name in self._fd_store),
            *(f"directory {directory}" for directory in directories),
        ]

    # --- lives of the router -----------------------------------------------------------------------

    async def _live(self) -> None:
        for kill_at in itertools.chain(self._plan.kills, itertools.repeat(None)):
            died = len(self.deaths)
            status = await self._live_once(kill_at)
            if self._stopped:
                break
            if len(self.deaths) == died:
                self.record.fault(Fault.OTHER, f"the router ended by itself, with status {status}")
                break

    async def _live_once(self, kill_at: int | None) -> int:
        """Begin a life and return its exit status."""
        link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        loop = asyncio.get_running_loop()
        orders = Orders(
            root=self._root,
            kill_at=kill_at,
            agents=[*AGENTS],
            chats=[
                (chat.id, chat.agent, None if chat.asks else chat.sender)
                for chat in self._plan.chats
                if chat.channel == "test"
            ],
            slots=self._plan.slots,
            stored=[*self._fd_store],
        )
        with link:
            with theirs:
                fds = (theirs.fileno(), self._listener.fileno(), *self._fd_store.values())
                send(self._fork_server, orders, *fds)
            self._link = link
            loop.add_reader(link, self._hear, link)
            try:
                await _readable(self._fork_server)
                while self._hear(link):  # its last words
                    pass
            finally:
                self._link = None
                loop.remove_reader(link)
                link.close()  # which ends it, if we were cancelled
                status: int = pickle.loads(self._fork_server.recv(MESSAGE_BYTES))
        return os.waitstatus_to_exitcode(status)

    def _hear(self, link: socket.socket) -> bool:
        """Take one message of the router; return whether there was one."""
        try:
            data, fds, _, _ = socket.recv_fds(link, MESSAGE_BYTES, 1, socket.MSG_DONTWAIT)
        except (BlockingIOError, ConnectionResetError):
            return False
        if not data:
            return False
        match pickle.loads(data):
            case "call", number, method, args, more:
                asked = partial(getattr(self._systemd, method), *args, **more)
                call = asyncio.create_task(self._call(link, number, asked), name=method)
                self._calls.add(call)
                call.add_done_callback(self._calls.discard)
            case "store", name:
                self._forget(name)
                (self._fd_store[name],) = fds
            case "forget", name:
                self._forget(name)
            case "died", point, kind, what:
                self.deaths.append(Death(point, kind, what))
            case "stopped", points:
                self._stopped, self.points = True, points
        return True

    async def _call(self, link: socket.socket, number: int, asked: Callable[[], Awaitable[Any]]) -> None:
        """Do what systemd was asked for, also when the router has died meanwhile."""
        value = error = None
        try:
            value = await asked()
        except NanoclawError as exc:
            error = exc
        if link is self._link:
            self._tell("answer", number, error, value)

    def _tell(self, *message: object) -> None:
        if self._link is not None:
            with suppress(ConnectionError):  # it has just died
                send(self._link, message)

    def _forget(self, name: str) -> None:
        if name in self._fd_store:
            os.close(self._fd_store.pop(name))

    async def _close(self) -> None:
        if self._calls:
            await asyncio.wait(self._calls)
        for name in [*self._fd_store]:
            self._forget(name)
        self._listener.close()
