"""A router that ends and comes back: turns go on, lost ones are retried, nobody is answered twice."""

from __future__ import annotations

import asyncio
import random
import socket
from contextlib import suppress

import pytest

from nanoclawd import limits, paths
from nanoclawd.wire import VarlinkError
from tests.support.router import Container, Place
from tests.support.varlink_peer import eventually

UNIT = "nanoclaw-berta@test_1.service"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BACKOFF_FIRST_S", 0.001)


class Steady:
    """A runner as ours: finishes its turn whatever the router does meanwhile, and comes back to it."""

    def __init__(self, *, pause: asyncio.Event | None = None) -> None:
        self.pause = pause
        self.turns: list[tuple[str, int]] = []

    async def __call__(self, container: Container) -> None:
        running: dict[str, object] | None = None
        while True:
            with suppress(OSError, EOFError, AssertionError, VarlinkError, asyncio.IncompleteReadError):
                await container.begin()
                while True:
                    turn = await container.take()
                    if running is None or running["id"] != turn["id"]:
                        running = turn
                        self.turns.append((turn["messages"][0]["text"], turn["attempt"]))
                        if self.pause is not None:
                            await self.pause.wait()
                    await container.finish(turn, f"done {turn['messages'][0]['text']}")
                    running = None
            await asyncio.sleep(0.001)  # and try again


def test_turn_survives_a_restart_of_the_router(place: Place) -> None:
    async def run() -> None:
        runner = Steady(pause=asyncio.Event())
        assert runner.pause is not None
        place.systemd.program = runner
        async with place.router() as router:
            await router.deliver("long work")
            await eventually(lambda: runner.turns)
        async with place.router() as router:
            adapter = await router.attach()
            runner.pause.set()

            assert await adapter.reply() == "done long work"
            await router.deliver("next")
            assert await adapter.reply() == "done next"
            assert place.systemd.starts == [UNIT]
            assert runner.turns == [("long work", 1), ("next", 1)]

    place.run(run)


def test_what_a_session_left_behind_is_removed(place: Place) -> None:
    async def run() -> None:
        place.systemd.program = Steady()
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("hello")
            assert await adapter.reply() == "done hello"
        ended, lives = paths.runtime() / "agents/emil/test_9", paths.runtime() / "agents/berta/test_1"
        ended.mkdir(parents=True)
        (ended / "host.sock").touch()
        async with place.router():
            assert not ended.parent.exists()
            assert (lives / "host.sock").is_socket()

    place.run(run)


@pytest.mark.parametrize("container", ["goes on", "is gone"])
def test_stop_that_was_acknowledged_holds_whatever_ends(place: Place, container: str) -> None:
    async def run() -> None:
        next_router = asyncio.Event()

        async def hears_late(container: Container) -> None:
            await container.begin()
            turn = await container.take()
            await next_router.wait()
            await container.begin()
            while (await container.next())["stop"] != turn["id"]:
                pass
            await container.finish(turn, outcome="stopped")

        place.systemd.programs = [hears_late]
        async with place.router() as router:
            await router.deliver("work")
            await eventually(lambda: any(c.turns for c in place.systemd.containers.values()))
            assert await router.stop_turn()
        if container == "is gone":
            await place.systemd.end(UNIT)
        async with place.router() as router:
            next_router.set()
            await router.settled()
            assert await router.states() == ["stopped"]
            assert [row["body"] for row in await router.outbox()] == ["Stopped."]
            assert len(place.systemd.starts) == 1

    place.run(run)


def test_idle_container_gets_what_comes_after_a_restart(place: Place) -> None:
    async def run() -> None:
        place.systemd.program = Steady()
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("before")
            assert await adapter.reply() == "done before"
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("after")

            assert await adapter.reply() == "done after"
            assert place.systemd.starts == [UNIT]

    place.run(run)


def test_turn_of_a_container_that_ended_with_the_router_is_retried(place: Place) -> None:
    async def run() -> None:
        runner = place.systemd.program = Steady(pause=asyncio.Event())
        assert runner.pause is not None
        async with place.router() as router:
            await router.deliver("long work")
            await eventually(lambda: runner.turns)
        await place.systemd.end_all()
        runner.pause.set()
        async with place.router() as router:
            adapter = await router.attach()

            assert await adapter.reply() == "done long work"
            assert runner.turns == [("long work", 1), ("long work", 2)]
            assert set(place.fd_store) == {"host.berta.test_1", "gateway.berta.test_1"}

    place.run(run)


def test_message_that_ends_router_and_container_each_time_becomes_a_dead_letter(place: Place) -> None:
    async def run() -> None:
        runner = place.systemd.program = Steady(pause=asyncio.Event())
        for attempt in range(1, limits.ATTEMPTS + 1):
            async with place.router() as router:
                if attempt == 1:
                    await router.deliver("poison")
                await eventually(lambda attempt=attempt: ("poison", attempt) in runner.turns)
            await place.systemd.end_all()
        async with place.router() as router:
            adapter = await router.attach()

            assert "could not be answered" in await adapter.reply()
            assert [row["state"] for row in await router.inbox()] == ["dead"]

    place.run(run)


def test_container_that_ends_while_it_is_adopted_is_replaced(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        runner = place.systemd.program = Steady(pause=asyncio.Event())
        assert runner.pause is not None
        async with place.router() as router:
            await router.deliver("long work")
            await eventually(lambda: runner.turns)
        listed = await place.systemd.list_units([])
        await place.systemd.end_all()

        async def list_units(patterns: object) -> object:
            return listed

        monkeypatch.setattr(place.systemd, "list_units", list_units)
        runner.pause.set()
        async with place.router() as router:
            adapter = await router.attach()

            assert await adapter.reply() == "done long work"

    place.run(run)


def test_container_without_listeners_is_stopped(place: Place) -> None:
    async def run() -> None:
        runner = place.systemd.program = Steady(pause=asyncio.Event())
        assert runner.pause is not None
        async with place.router() as router:
            await router.deliver("long work")
            await eventually(lambda: runner.turns)
        for name in list(place.fd_store):
            place._forget(name)
        runner.pause.set()
        async with place.router() as router:
            adapter = await router.attach()

            assert await adapter.reply() == "done long work"
            assert place.systemd.stops == [UNIT]

    place.run(run)


def test_container_that_takes_its_time_to_stop_keeps_nobody_waiting(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, stopping, go = place.systemd.stop_unit, asyncio.Event(), asyncio.Event()

    async def slow(unit: str) -> None:
        stopping.set()
        await go.wait()
        await stop(unit)

    async def run() -> None:
        runner = place.systemd.program = Steady(pause=asyncio.Event())
        assert runner.pause is not None
        async with place.router() as router:
            for chat in ("cut off", "adopted"):
                await router.deliver(chat, chat=chat)
            await eventually(lambda: len(runner.turns) == 2)
        for name in ("host.berta.test_1", "gateway.berta.test_1"):
            place._forget(name)
        monkeypatch.setattr(place.systemd, "stop_unit", slow)
        async with place.router() as router:
            adapter = await router.attach()
            await stopping.wait()
            runner.pause.set()

            assert await adapter.reply() == "done adopted"
            (cut_off,) = await router.db.read("find_work")
            assert router.sessions.explain(cut_off) == "its container was cut off from the router"
            assert place.systemd.starts.count(UNIT) == 1
            go.set()
            assert await adapter.reply() == "done cut off"

    place.run(run)


def test_listeners_that_belong_to_nobody_are_forgotten(place: Place) -> None:
    async def run() -> None:
        with socket.socket(socket.AF_UNIX) as stranger:
            place.fd_store["host.anna.test_7"] = stranger.dup()
            async with place.router():
                assert place.fd_store == {}

    place.run(run)


@pytest.mark.parametrize("seed", range(4))
def test_restarts_at_any_moment_lose_nothing_and_repeat_nothing(
    place: Place, seed: int, capfd: pytest.CaptureFixture[str]
) -> None:
    async def run() -> None:
        chance = random.Random(seed)
        place.systemd.program = Steady()
        accepted: dict[str, bool] = {}
        for life in range(12):
            async with place.router() as router:
                for number in range(5):
                    text = f"{life}.{number}"
                    await router.deliver(text, event=text, chat=f"chat{number % 3}")
                    accepted[text] = True
                    for _ in range(chance.randrange(30)):
                        await asyncio.sleep(0)
                if life % 4 == 3:
                    await place.systemd.end(chance.choice(sorted(place.systemd.containers)))
        async with place.router() as router:
            await router.settled()
            adapter = await router.attach()
            replies = [await adapter.reply() for _ in range(len(accepted))]

            assert sorted(replies) == sorted(f"done {text}" for text in accepted)
            assert len(await router.outbox()) == len(accepted)
            assert set(await router.states()) == {"answered"}

    place.run(run)


def test_router_stops_while_an_adapter_holds_unreported_deliveries(place: Place) -> None:
    async def run() -> None:
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("hello")
            await adapter.delivery()
            router.peers.clear()  # still attached while the router stops
        await adapter.close()
        async with place.router() as router:
            again = await router.attach()
            assert await again.reply() == "echo: hello"

    place.run(run)
