"""Idle exit: when the router leaves, and that nobody who comes at that moment is lost."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from nanoclawd import paths
from nanoclawd.idl import parse_interface
from nanoclawd.idle import IdleExit
from nanoclawd.server import Call, Method, Server, Service
from nanoclawd.wire import Json
from tests.support.router import Place, Router
from tests.support.varlink_peer import Peer, eventually

INTERFACE = parse_interface("interface org.example.Echo\nmethod Echo(text: string) -> (text: string)\n")


class Watched:
    """The idle exit of a router, in the seconds of a test."""

    def __init__(self, router: Router) -> None:
        self.seconds = 0.05
        self.exit = IdleExit(
            db=router.db,
            sessions=router.sessions,
            channels=router.channel_list,
            seconds=lambda: self.seconds,  # type: ignore[arg-type, return-value]
        )
        self.exit.servers = (router.channel,)
        router.sessions.on_end = self.exit.touch
        router.channel._on_close = self.exit.touch
        self.left = asyncio.ensure_future(self.exit.wait())

    async def stays(self) -> bool:
        """Return whether it has looked at what there is to do, and stayed."""
        is_idle, looked = self.exit._is_idle, list[bool]()

        async def look() -> bool:
            looked.append(await is_idle())
            return looked[-1]

        self.exit._is_idle = look  # type: ignore[method-assign]
        self.exit.touch()
        await eventually(lambda: looked)
        self.exit._is_idle = is_idle  # type: ignore[method-assign]
        return not looked[0] and not self.left.done()


def test_router_leaves_when_nothing_is_to_be_done(place: Place) -> None:
    async def run() -> None:
        async with place.router() as router:
            watched = Watched(router)
            peer = await router.peer()
            assert await watched.stays(), "somebody is connected"
            await router.deliver("hello")
            await router.settled()
            await peer.close()
            assert await watched.stays(), "there is a container"
            await place.systemd.end_all()
            await watched.left
            await eventually(lambda: router.channel_task.done())

    place.run(run)


def test_router_stays_for_a_channel_whose_adapter_is_away(place: Place) -> None:
    """Nobody but the router listens there: a call to it would start no other one."""
    paths.channels().mkdir(parents=True)
    file = paths.channels() / "here.toml"
    file.write_text('kind = "none"\n')

    async def run() -> None:
        async with place.router() as router:
            watched = Watched(router)
            assert await watched.stays()
            file.unlink()
            await router.channel_list.load({})
            watched.exit.touch()
            await watched.left

    place.run(run)


def test_router_stays_for_a_message_that_waits_for_the_person(place: Place) -> None:
    async def run() -> None:
        place.registry.held.add("berta")
        async with place.router() as router:
            watched = Watched(router)
            await router.deliver("hello")
            await eventually(lambda: not router.channel.active)
            assert await watched.stays()
            await router.stop_turn()
            for peer in router.peers:
                await peer.close()
            await watched.left

    place.run(run)


def test_zero_is_for_ever_until_the_settings_change(place: Place) -> None:
    async def run() -> None:
        async with place.router() as router:
            watched = Watched(router)
            watched.seconds = 0
            watched.exit.touch()
            await asyncio.sleep(0.2)
            assert not watched.left.done()
            watched.seconds = 0.01
            watched.exit.touch()
            await watched.left

    place.run(run)


def test_whoever_comes_while_the_router_leaves_is_answered_by_the_next(tmp_path: Path) -> None:
    """The backlog is nobody's until it is accepted: each caller is accepted by one server, or waits."""
    callers, lives = 300, 0

    async def echo(call: Call) -> Json:
        return {"text": call.parameters["text"]}

    service = Service(interface=INTERFACE, methods={"Echo": Method(handler=echo)})

    async def call(number: int) -> str:
        await asyncio.sleep(number * 0.002)
        peer = await Peer.connect(tmp_path / "socket")
        peer.contracts = (INTERFACE,)
        try:
            reply = await peer.call("org.example.Echo.Echo", {"text": str(number)})
            return str(reply["text"])
        finally:
            await peer.close()

    async def serve(listener: socket.socket) -> None:
        """Leave as soon as nobody is connected, and begin anew."""
        nonlocal lives
        while True:
            lives += 1
            closed = asyncio.Event()
            server = Server(service, listener, on_close=closed.set)
            running = asyncio.ensure_future(server.run())
            try:
                await closed.wait()
                while server.active:
                    closed.clear()
                    await closed.wait()
            finally:
                server.stop()
                await asyncio.wait([running])

    async def run() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "socket"))
            listener.listen(callers)
            serving = asyncio.ensure_future(serve(listener))
            try:
                for _ in range(20):
                    answers = await asyncio.gather(*map(call, range(callers)))
                    assert answers == [str(number) for number in range(callers)]
                    if lives > 5:  # some leave while somebody comes; on a busy machine that takes longer
                        return
            finally:
                serving.cancel()
                await asyncio.wait([serving])

    asyncio.run(run())
    assert lives > 5
