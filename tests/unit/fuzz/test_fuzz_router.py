"""Calls that are right, nearly right or nonsense, at any moment: the router goes on and keeps its word."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoclawd import limits, paths
from nanoclawd.idl import read_interface
from nanoclawd.wire import Json, VarlinkError
from tests.support.fuzz import Long, allowed, fuzzed, mutated
from tests.support.router import AGENT, CHANNEL, Container, Place, Router, echo
from tests.support.varlink_peer import WAIT_S, Peer, eventually

TURN = "the turn that runs"  #: stands for its id
INTERFACES = {name: read_interface(paths.INTERFACES / f"{name}.varlink") for name in (AGENT, CHANNEL)}
#: What makes a call one that is carried out, now and then.
SENSE: dict[str, st.SearchStrategy[Any]] = {
    "turn": st.just(TURN),
    "protocol": st.just(1),
    "key": st.sampled_from(["a", "b", "m.reply0", "../x"]),
    "chat": st.sampled_from(["evil", "another"]),
    "thread": st.sampled_from(["", "thread"]),
    "event": st.sampled_from(["e1", "e2", "x1", "x2"]),
    "agent": st.sampled_from(["berta", "nobody"]),
    "replies": st.lists(st.sampled_from(["yes", "", Long("x" * 70_000)]), max_size=17),
    "text": st.sampled_from(["hello", " ", Long("x" * 300_000)]),
}


@st.composite
def parameters(draw: st.DrawFn, interface: str, method: str) -> Any:
    """Return the parameters of a call: sensible ones, some of them changed."""
    fields = INTERFACES[interface].methods[method].parameters
    value: Json = draw(allowed(INTERFACES[interface], fields))
    value |= {name: draw(SENSE[name]) for name in value if name in SENSE and draw(st.integers(0, 3))}
    return draw(st.just(value) | mutated(st.just(value)))


def calls(interface: str) -> st.SearchStrategy[list[tuple[str, Any, bool]]]:
    """Return a strategy of calls: method, parameters, oneway."""
    methods = st.sampled_from(sorted(INTERFACES[interface].methods))
    call = methods.flatmap(lambda m: st.tuples(st.just(m), parameters(interface, m), st.booleans()))
    return st.lists(call, max_size=20)


class Fuzzer:
    """Makes the calls of one side, and hands in whatever they ask for as a turn."""

    def __init__(self, interface: str, calls: list[tuple[str, Any, bool]]) -> None:
        self._interface, self._calls = interface, calls
        self._peers: list[Peer] = []
        self.turn = TURN
        self.done = asyncio.Event()

    async def run(self, container: Container | Router) -> None:
        """Make all calls; each reply is checked against the contract."""
        peer: Peer | None = None
        for method, parameters, oneway in self._calls:
            if isinstance(parameters, dict) and parameters.get("turn") == TURN:
                parameters |= {"turn": self.turn}
            if peer is None:
                peer = await self._connect(container)
            streams = method in ("Work", "Attach")
            heard: Json | None = None
            with suppress(ConnectionError):  # it was hung up on for an earlier call
                await peer.send(f"{self._interface}.{method}", parameters, oneway=oneway, more=streams)
                # The replies of a stream may never come.
                heard = {} if oneway else None if streams else await peer.receive()
            peer = None if heard is None else peer

    async def close(self) -> None:
        for peer in self._peers:
            await peer.close()

    async def _connect(self, container: Container | Router) -> Peer:
        if isinstance(container, Router):
            return await container.peer()
        peer = await container.connect(hello=bool(len(self._peers) % 3))
        self._peers.append(peer)
        return peer

    async def live(self, container: Container) -> None:
        """Do it in a runner's place."""
        await container.begin()
        self.turn = (await container.take())["id"]
        try:
            await self.run(container)
            self.done.set()
            await asyncio.Event().wait()
        finally:
            self.done.set()


async def echo_to_the_end(container: Container) -> None:
    with suppress(VarlinkError):  # the router ended in the middle of a turn that was made up
        await echo(container)


@contextmanager
def a_place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        for name in ("OFFENCES", "CALLS_BURST", "CONNECTIONS_PER_SESSION"):  # else little would be heard
            patch.setattr(limits, name, 10**9)
        patch.setattr(limits, "BACKOFF_FIRST_S", 0.001)
        yield Place(Path(directory), patch)


@fuzzed(12, shrink=False)
@given(of_runner=calls(AGENT), of_adapter=calls(CHANNEL))
def test_router_goes_on_whatever_it_is_told(
    of_runner: list[tuple[str, Any, bool]], of_adapter: list[tuple[str, Any, bool]]
) -> None:
    runner, adapter = Fuzzer(AGENT, of_runner), Fuzzer(CHANNEL, of_adapter)

    with a_place() as place:
        place.registry.add("mallory")
        place.systemd.programs, place.systemd.program = [runner.live], echo_to_the_end

        async def run() -> None:
            async with place.router(slots=8) as router:
                polite = await router.attach(chat="polite")
                for _ in range(3):
                    await router.deliver("hello", agent="mallory", chat="evil")
                await eventually(lambda: runner.turn != TURN)
                await adapter.run(router)
                await asyncio.wait_for(runner.done.wait(), WAIT_S)

                await router.deliver("still there?", chat="polite")

                assert await polite.reply() == "echo: still there?"
            await runner.close()

        place.run(run)
