"""What befalls agents: each trouble has its rule, and one line that tells the person of it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable

import pytest

from nanoclawd import images, limits
from nanoclawd.db import now_ms
from nanoclawd.errors import Failed, NotFound
from nanoclawd.systemd import UnitChange
from tests.support.commits import HeldCommits
from tests.support.router import Container, Ends, Place, Router
from tests.support.varlink_peer import WAIT_S, eventually

UNIT = "nanoclaw-berta@test_1.service"


@pytest.fixture(autouse=True)
def not_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second attempt waits for hasten(), so that there is time to look."""
    monkeypatch.setattr(limits, "BACKOFF_FIRST_S", 600.0)


async def lines(router: Router) -> list[str]:
    """Return what the status says of each session with work."""
    return [router.sessions.explain(head) for head in await router.db.read("find_work")]


async def shown(router: Router, *patterns: str) -> None:
    """Return as soon as the status says so of the sessions with work."""
    async with asyncio.timeout(WAIT_S):
        while not re.fullmatch("\n".join(patterns), "\n".join(await lines(router))):  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def hasten(router: Router) -> None:
    """Let what waits for its next attempt have it now."""
    times = {"latest": now_ms(), "soon": now_ms()}
    await router.db.write(lambda tx: tx.all("hasten_messages", **times))
    await router.start_waiting()


def ends(result: str, status: int = 0) -> Callable[[Container], Awaitable[None]]:
    """Return a runner that ends so in mid-turn."""

    async def program(container: Container) -> None:
        await container.begin()
        await container.take()
        raise Ends(result, status)

    return program


@pytest.mark.parametrize(
    ("result", "status", "words"),
    [
        ("signal", 9, "its container failed (signal)"),
        ("exit-code", 3, "its container failed with status 3"),
        ("exit-code", 137, "its runner was ended by SIGKILL"),
        ("success", 9, "its container was stopped from outside"),
        ("oom-kill", 0, "its container used more memory than it may"),
        ("success", 0, "its container ended"),
    ],
)
def test_container_that_ends_in_mid_turn_is_replaced_after_a_while(
    place: Place, result: str, status: int, words: str
) -> None:
    async def run() -> None:
        place.systemd.programs = [ends(result, status)]
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("hello")
            await shown(router, rf"attempt 2 in \d+ s: {re.escape(words)}")
            await hasten(router)

            assert await adapter.reply() == "echo: hello"
            assert [row["attempts"] for row in await router.inbox()] == [2]

    place.run(run)


def test_runner_that_hangs_is_seen_to_hang_and_replaced(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hangs(container: Container) -> None:
        await container.begin()
        await container.take()
        monkeypatch.setattr(limits, "LEASE_S", 45.0)  # that of this turn runs already
        await asyncio.Event().wait()

    async def run() -> None:
        monkeypatch.setattr(limits, "LEASE_S", 0.2)
        monkeypatch.setattr(limits, "HEARTBEAT_S", 0.05)
        place.systemd.programs = [hangs]
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("hello")
            await shown(router, r"its runner says nothing since \d+ s, and is stopped at \d+ s")
            await shown(router, r"attempt 2 in \d+ s: its runner was silent for 45 s")
            await hasten(router)

            assert await adapter.reply() == "echo: hello"
            assert place.systemd.stops == [UNIT]

    place.run(run)


def test_runner_that_does_not_ask_for_work_is_seen_to(place: Place) -> None:
    async def deaf(container: Container) -> None:
        container.calls = await container.connect()
        container.ready.set()
        await asyncio.Event().wait()

    async def run() -> None:
        place.systemd.programs = [deaf]
        async with place.router() as router:
            await router.deliver("hello")
            await eventually(lambda: [s.state for s in router.sessions.live()] == ["ready"])
            assert await lines(router) == ["its runner has not asked for work yet"]

    place.run(run)


@pytest.mark.parametrize(
    ("error", "final"),
    [(NotFound("Unit is masked."), True), (Failed("StartUnit: failed"), False)],
    ids=["masked", "start limit"],
)
def test_unit_that_does_not_start(
    place: Place, monkeypatch: pytest.MonkeyPatch, error: Exception, final: bool
) -> None:
    """What a person has set up so is told at once; what passes is tried again, from a fresh start limit."""
    start = place.systemd.start_unit
    forgotten: list[str] = []

    async def fails(unit: str, *, mode: str = "replace") -> None:
        if unit == UNIT and not forgotten:
            if not final:
                place.systemd.on_unit_change(UnitChange(unit=unit, result="start-limit-hit"))
            raise error
        await start(unit, mode=mode)

    async def forget(unit: str) -> None:
        forgotten.append(unit)

    async def run() -> None:
        monkeypatch.setattr(place.systemd, "start_unit", fails)
        monkeypatch.setattr(place.systemd, "reset_failed", forget)
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("hello")
            if final:
                assert await adapter.reply() == "Your message could not be answered: Unit is masked."
            else:
                words = "its container was started too often in a short time"
                await shown(router, rf"attempt 2 in \d+ s: {words}.*")
                await hasten(router)
                assert await adapter.reply() == "echo: hello"
            assert forgotten == [UNIT]

    place.run(run)


def test_image_that_is_gone_is_told_at_once_with_what_to_do(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def podman_fails(container: Container) -> None:
        raise Ends("exit-code", 125)

    async def is_missing(image: str) -> None:
        raise NotFound("there is no such image", hint=f"run: nanoclawctl image build --image {image}")

    async def run() -> None:
        monkeypatch.setattr(images, "require_image", is_missing)
        monkeypatch.setattr("nanoclawd.quadlet.host_uid", lambda index: 100_000)
        place.systemd.programs = [podman_fails]
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("hello")
            notice = await adapter.reply()

            assert "its image 'localhost/nanoclaw-agent:latest' is missing; run: nanoclawctl image" in notice
            assert await router.states() == ["dead"]

    place.run(run)


def test_container_that_ends_while_a_message_is_leased_to_it(place: Place) -> None:
    """The message is on its way to the disk when the container goes away without a word."""

    async def answers_one(container: Container) -> None:
        await container.begin()
        await container.finish(await container.take(), "first")
        await asyncio.Event().wait()

    async def run() -> None:
        place.systemd.programs = [answers_one]
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("one")
            assert await adapter.reply() == "first"
            commits = HeldCommits(router.db)
            delivering = asyncio.create_task(router.deliver("two"))
            await commits.entered.wait()
            await place.systemd.end(UNIT)
            commits.release()
            await delivering
            await shown(router, r"attempt 2 in \d+ s: its container ended")
            await hasten(router)

            assert await adapter.reply() == "echo: two"
            assert await router.states() == ["answered", "answered"]

    place.run(run)


# --- slots ------------------------------------------------------------------------------------------


def test_session_that_waits_for_a_slot_says_so(place: Place) -> None:
    release = asyncio.Event()

    async def works(container: Container) -> None:
        await container.begin()
        turn = await container.take()
        await release.wait()
        await container.finish(turn, turn["messages"][0]["text"])
        await container.take()

    async def run() -> None:
        place.systemd.program = works
        async with place.router(slots=1) as router:
            adapter = await router.attach()
            for number in range(3):
                await router.deliver(str(number), chat=f"chat{number}")
            await shown(router, "", "waits for a slot, 0 before it", "waits for a slot, 1 before it")
            release.set()
            assert [await adapter.reply() for _ in range(3)] == ["0", "1", "2"]

    place.run(run)


def test_busy_session_leaves_its_slot_to_an_older_message(place: Place) -> None:
    release = asyncio.Event()
    served: list[str] = []

    async def works(container: Container) -> None:
        await container.begin()
        while True:
            turn = await container.take()
            served.extend(message["text"] for message in turn["messages"])
            await release.wait()
            await container.finish(turn, "done")

    async def run() -> None:
        place.systemd.program = works
        async with place.router(slots=1) as router:
            await router.deliver("1", chat="busy")
            await eventually(lambda: served)
            await router.deliver("2", chat="other")
            for number in ("3", "4"):
                await router.deliver(number, chat="busy")
            await router.deliver("5", chat="other")
            release.set()
            await router.settled()

            assert served == ["1", "2", "5", "3", "4"]  # what waits in a chat shares a turn
            assert [row["attempts"] for row in await router.inbox()] == [1] * 5
            assert place.systemd.most_at_once == 1

    place.run(run)


def test_agent_with_many_sessions_leaves_room_for_another(place: Place) -> None:
    release = asyncio.Event()
    served: list[str] = []

    async def works(container: Container) -> None:
        await container.begin()
        while True:
            turn = await container.take()
            await release.wait()
            served.append(turn["messages"][0]["text"])
            await container.finish(turn, "done")

    async def run() -> None:
        place.registry.add("carl")
        place.systemd.program = works
        async with place.router(slots=2) as router:
            for number in range(6):
                await router.deliver(f"berta {number}", chat=f"chat{number}")
            await router.deliver("carl", chat="another", agent="carl")
            await eventually(lambda: len(place.systemd.starts) == 2)
            release.set()
            await router.settled()

            assert served.index("carl") <= 2
            assert sorted(served) == sorted([*(f"berta {number}" for number in range(6)), "carl"])

    place.run(run)


def test_more_slots_are_used_at_once_and_fewer_when_there_is_room(place: Place) -> None:
    async def run() -> None:
        async with place.router(slots=1) as router:
            adapter = await router.attach()
            router.sessions.resize(3)
            for number in range(3):
                await router.deliver("x", chat=f"chat{number}")
                await adapter.reply()
            assert place.systemd.stops == []
            router.sessions.resize(1)
            await router.deliver("y", chat="chat9")
            assert await adapter.reply() == "echo: y"
            assert len(place.systemd.stops) == 3

    place.run(run)
