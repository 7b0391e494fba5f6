"""One life of the router, in a process of its own that dies at a point; and the server that forks it.

All that the router is made of is real but for systemd and the registry: the driver's process plays systemd,
since containers and the fd store must outlive the router.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from nanoclawd import __main__ as nanoclawd
from nanoclawd import limits, people, sessions
from nanoclawd.access import Role, Standing
from nanoclawd.db import Row, Transaction
from nanoclawd.errors import Unavailable
from nanoclawd.guard import Handler
from nanoclawd.privileges import Action
from nanoclawd.systemd import UnitChange
from tests.crash.points import Kind, Points, inject
from tests.support.router import Place, RegistryDouble, Router

MESSAGE_BYTES = 1 << 18
FDS = 128
LET_IN_S = 0.003  #: how often the owner looks who waits
FAILED = 70  #: exit status of a router that ended by itself

#: What takes seconds in earnest takes milliseconds here.
LIMITS = {"BACKOFF_FIRST_S": 0.004, "STORE_AGAIN_S": 0.05}


@dataclass(frozen=True, kw_only=True, slots=True)
class Orders:
    """What a new life needs to know."""

    root: Path
    kill_at: int | None  #: number of the point at which it ends
    agents: list[str]
    chats: list[tuple[str, str, str | None]]  #: the agents that listen there, and who is known there
    slots: int
    stored: list[str]  #: names of the listeners in the fd store


def send(sock: socket.socket, message: object, *fds: int) -> None:
    socket.send_fds(sock, [pickle.dumps(message)], fds)


def start_fork_server() -> tuple[socket.socket, int]:
    """Fork a server that imports nothing any more, and return the socket to it, and its pid.

    Each message is Orders, with descriptors: the link to systemd, the channel's listener, those of the fd
    store. Each answer is the wait status of the life that it began.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    gc.collect()
    gc.freeze()  # or each child would copy what its collector looks at
    if (pid := os.fork()) == 0:
        ours.close()
        _serve(theirs)
    theirs.close()
    return ours, pid


def _serve(sock: socket.socket) -> None:
    while True:
        try:
            data, fds, _, _ = socket.recv_fds(sock, MESSAGE_BYTES, FDS)
        except ConnectionResetError:
            data = b""
        if not data:
            os._exit(0)
        if (pid := os.fork()) == 0:
            sock.close()
            _live(pickle.loads(data), fds)
        for fd in fds:
            os.close(fd)
        sock.send(pickle.dumps(os.waitpid(pid, 0)[1]))


def _live(orders: Orders, fds: list[int]) -> None:
    status = 0
    try:
        log = os.open(orders.root / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        for variable in ("RUNTIME_DIR", "STATE_HOME", "CONFIG_HOME"):
            os.environ[f"XDG_{variable}"] = str(orders.root / variable)
        for name, value in LIMITS.items():
            assert hasattr(limits, name)
            setattr(limits, name, value)
        link, channel, *stored = [socket.socket(fileno=fd) for fd in fds]
        asyncio.run(_route(orders, link, channel, dict(zip(orders.stored, stored, strict=True))))
    except BaseException:
        traceback.print_exc()
        status = FAILED
    sys.stderr.flush()
    os._exit(status)


async def _route(
    orders: Orders, link: socket.socket, channel: socket.socket, stored: dict[str, socket.socket]
) -> None:
    points = Points(orders.kill_at, lambda *words: send(link, ("died", *words)))
    systemd = RemoteSystemd(link, points)
    registry = RegistryDouble()
    for agent in orders.agents:
        registry.add(agent)

    class Here:
        """What Router uses of Place."""

        def __init__(self) -> None:
            self.channel = orders.root / "channel" / "socket"
            self.systemd, self.registry = systemd, registry
            self.fd_store = stored
            self.open: list[socket.socket] = []
            self.wired = orders.chats
            self.handlers: dict[Action, Handler] = {}
            self.agents_talk = False
            self.capabilities = {"files": True}
            self.listener = channel

    for module in (sessions, nanoclawd):
        for name, function in (("store_listener", systemd.store), ("forget_listener", systemd.forget)):
            if hasattr(module, name):
                setattr(module, name, function)
    inject(points)
    router = Router(cast(Place, Here()), orders.slots)
    running = asyncio.create_task(router.run(), name="router")
    stopping = asyncio.create_task(_stop(router, systemd, running), name="stop")
    answering = asyncio.create_task(_let_in(router), name="owner")
    try:
        await running
    except asyncio.CancelledError:
        send(link, ("stopped", points.count))
    finally:
        stopping.cancel()
        answering.cancel()


async def _let_in(router: Router) -> None:
    """Be the owner, who lets in whoever writes to an agent."""
    await router.started.wait()
    while True:
        for held in await router.db.read("list_held", chat=None):
            with suppress(Unavailable):
                await router.channels.decide(partial(_make_member, held=held))
        await asyncio.sleep(LET_IN_S)


def _make_member(tx: Transaction, held: Row) -> None:
    person = people.person_of(tx, "test", held["sender"])
    people.set_role(tx, person, Standing(Role.MEMBER, chat=held["chat"]))


async def _stop(router: Router, systemd: RemoteSystemd, running: asyncio.Task[None]) -> None:
    """Stop the router when the driver asks for it, but not while it starts."""
    await systemd.stop.wait()
    await router.started.wait()
    running.cancel()


class RemoteSystemd:
    """Has the methods of SystemdDouble, which runs in the driver."""

    def __init__(self, link: socket.socket, points: Points) -> None:
        self._link, self._points = link, points
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self.on_unit_change: Callable[[UnitChange], None] = lambda change: None
        self.stop = asyncio.Event()  #: the driver wants this life to end in peace
        asyncio.get_running_loop().add_reader(link, self._read)

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)

        async def call(*args: Any, **more: Any) -> Any:
            number = next(self._numbers)
            self._asked[number] = asyncio.get_running_loop().create_future()
            self._say(method, ("call", number, method, args, more))
            return await self._asked[number]

        return call

    def store(self, name: str, listener: socket.socket) -> None:
        self._say("FDSTORE", ("store", name), listener.fileno())

    def forget(self, name: str) -> None:
        self._say("FDSTOREREMOVE", ("forget", name))

    def _say(self, what: str, message: object, *fds: int) -> None:
        self._points.around(
            Kind.BEFORE_SYSTEMD, Kind.AFTER_SYSTEMD, what, lambda: send(self._link, message, *fds)
        )

    def _read(self) -> None:
        try:
            data = self._link.recv(MESSAGE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        if not data:  # the driver has gone
            os._exit(0)
        kind, *rest = pickle.loads(data)
        match kind:
            case "answer":
                number, error, value = rest
                asked = self._asked.pop(number)
                if asked.done():  # whoever asked was cancelled
                    return
                if error is None:
                    asked.set_result(value)
                else:
                    asked.set_exception(error)
            case "event":
                name, argument = rest
                getattr(self, name)(argument)
            case "stop":
                self.stop.set()
