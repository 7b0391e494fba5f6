"""The kill switch: what the person stops stays stopped, and loses nothing; see nanoclawd/killswitch.py."""

from __future__ import annotations

import asyncio

import pytest

from nanoclawd import limits
from nanoclawd.errors import Unavailable
from tests.support.router import Container, Place, Router
from tests.support.varlink_peer import eventually

UNIT = "nanoclaw-berta@test_1.service"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "STORE_AGAIN_S", 0.001)


async def works_for_ever(container: Container) -> None:
    await container.begin()
    await container.take()
    await asyncio.Event().wait()


async def begin_work(place: Place, router: Router) -> None:
    """Deliver two messages; an agent works on the first."""
    place.systemd.programs = [works_for_ever]
    await router.deliver("one")
    await router.deliver("two")
    await eventually(lambda: bool(place.systemd.containers and place.systemd.containers[UNIT].turns))


async def expect_held(place: Place, router: Router, *, waiting: int) -> None:
    """Nothing runs, nothing is started, and what waits has lost no attempt."""
    await eventually(lambda: router.sessions.held and not list(router.sessions.live()))
    assert not place.systemd.is_running(UNIT)
    rows = await router.inbox()
    tries = [(row["state"], row["attempts"], row["deferrals"]) for row in rows]
    assert tries == [("queued", 0, 0)] * waiting


async def expect_answers(router: Router, *texts: str) -> None:
    adapter = await router.attach()
    assert [await adapter.reply() for _ in texts] == [f"echo: {text}" for text in texts]
    assert not router.sessions.held


@pytest.mark.parametrize("how", ["nanoclawctl", "systemctl"])
def test_messages_wait_until_the_person_starts_agents_again(place: Place, how: str) -> None:
    async def run() -> None:
        async with place.router() as router:
            await begin_work(place, router)
            await (router.sessions.hold_all() if how == "nanoclawctl" else place.systemd.stop_slice())
            await expect_held(place, router, waiting=2)
            await router.deliver("three")
            await expect_held(place, router, waiting=3)
        async with place.router() as router:
            await expect_held(place, router, waiting=3)
            if how == "nanoclawctl":
                await router.sessions.release_all()
            else:
                place.systemd.start_slice()
            await expect_answers(router, "one", "two", "three")
            trail = await router.db.read("list_audit", first=0, since=0, agent=None, kind="control", limit=9)
            # What nanoclawctl does is noted where it calls.
            noted = [] if how == "nanoclawctl" else ["slice_stopped", "slice_started"]
            assert [row["event"] for row in trail] == noted

    place.run(run)


def test_what_one_has_stopped_the_other_can_start(place: Place) -> None:
    async def run() -> None:
        async with place.router() as router:
            await place.systemd.stop_slice()
            await eventually(lambda: router.sessions.held)
            await router.sessions.release_all()
            await router.deliver("one")
            await expect_answers(router, "one")
            await router.sessions.hold_all()
            place.systemd.start_slice()
            await eventually(lambda: not router.sessions.held)

    place.run(run)


def test_slice_that_is_stopped_while_the_router_is_away_counts(place: Place) -> None:
    async def run() -> None:
        async with place.router() as router:
            await begin_work(place, router)
        await place.systemd.stop_slice()
        async with place.router() as router:
            await expect_held(place, router, waiting=2)
        place.systemd.start_slice()
        async with place.router() as router:
            await expect_answers(router, "one", "two")

    place.run(run)


def test_who_waits_for_the_person_does_not_ask_again_and_again(place: Place) -> None:
    async def run() -> None:
        async with place.router() as router:
            await router.sessions.hold_all()
            await asyncio.sleep(0.01)
            looks = place.systemd.slice_looks
            await asyncio.sleep(0.05)
            assert place.systemd.slice_looks == looks

    place.run(run)


@pytest.mark.parametrize("held", [True, False])
def test_a_hold_survives_a_reboot_and_a_reboot_is_no_hold(place: Place, held: bool) -> None:
    async def run() -> None:
        async with place.router() as router:
            if held:
                await router.sessions.hold_all()
            place.systemd.ending = True
            await place.systemd.stop_slice()
        place.systemd.manager, place.systemd.ending = 2, False
        async with place.router() as router:
            assert router.sessions.held == held
            assert place.systemd.slice_active != held

    place.run(run)


def test_restart_of_the_slice_is_a_stop_and_a_start(place: Place) -> None:
    async def run() -> None:
        async with place.router() as router:
            await begin_work(place, router)
            await place.systemd.stop_slice()
            place.systemd.start_slice()
            await expect_answers(router, "one", "two")
            assert [row["attempts"] for row in await router.inbox()] == [1, 1]

    place.run(run)


def test_a_stop_that_was_called_off_holds_nobody(place: Place) -> None:
    async def run() -> None:
        async with place.router() as router:
            place.systemd.announce_job()
            assert router.sessions.held
            place.systemd.announce_job(over=True)
            await eventually(lambda: not router.sessions.held)
            await router.deliver("one")
            await expect_answers(router, "one")

    place.run(run)


def test_hold_that_a_crash_broke_off_is_finished_by_the_next_router(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dies(unit: str) -> None:
        raise Unavailable("the router dies here")

    async def run() -> None:
        async with place.router() as router:
            await begin_work(place, router)
            with monkeypatch.context() as patch:
                patch.setattr(place.systemd, "stop_unit", dies)
                with pytest.raises(Unavailable):
                    await router.sessions.hold_all()
        assert place.systemd.is_running(UNIT)
        async with place.router() as router:
            await expect_held(place, router, waiting=2)

    place.run(run)


def test_start_of_a_container_that_crosses_the_stop_is_undone(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = place.systemd.start_unit

    async def crosses(unit: str, *, mode: str = "replace") -> None:
        if unit == UNIT:
            await place.systemd.stop_slice()
        await start(unit, mode=mode)

    async def run() -> None:
        place.systemd.programs = [works_for_ever]
        async with place.router() as router:
            monkeypatch.setattr(place.systemd, "start_unit", crosses)
            await router.deliver("one")
            await eventually(lambda: place.systemd.starts)
            await expect_held(place, router, waiting=1)
            assert not place.systemd.slice_active

    place.run(run)


def test_a_full_disk_does_not_keep_agents_running(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(operation: object) -> None:
        raise Unavailable("the database cannot be written")

    async def run() -> None:
        async with place.router() as router:
            await begin_work(place, router)
            with monkeypatch.context() as patch:
                patch.setattr(router.db, "write", full)
                with pytest.raises(Unavailable):
                    await router.sessions.hold_all()
                assert not place.systemd.is_running(UNIT)
            await expect_held(place, router, waiting=2)
        async with place.router() as router:
            await expect_held(place, router, waiting=2)

    place.run(run)
