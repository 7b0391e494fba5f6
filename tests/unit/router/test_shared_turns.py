"""Messages that share a turn, and what becomes of them when it fails, by the class of the failure."""

from __future__ import annotations

import asyncio

import pytest

from nanoclawd import limits
from nanoclawd.wire import Json, VarlinkError
from tests.support.router import Adapter, Container, Place, Router
from tests.support.varlink_peer import eventually

UNIT = "nanoclaw-berta@test_1.service"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BACKOFF_FIRST_S", 0.001)


def texts(turn: Json) -> list[str]:
    return [message["text"] for message in turn["messages"]]


async def take_more(container: Container, turn: Json, last: Json | None = None) -> list[Json]:
    last = last or turn["messages"][-1]
    reply = await container.call("TakeMessages", {"turn": turn["id"], "last": last["id"]})
    messages: list[Json] = reply["messages"]
    return messages


async def finish(container: Container, turn: Json, **more: object) -> None:
    parameters = {"turn": turn["id"], "outcome": "answered", "replies": ["done"], **more}
    await container.call("FinishTurn", parameters)


async def fail(container: Container, turn: Json, code: str, *, after_s: float | None = None) -> None:
    error = {
        "code": code,
        "message": "it\nbroke",
        "retryable": code in ("rate_limit", "overloaded", "connection", "internal"),
        "retryAfterSeconds": after_s,
    }
    await container.call(
        "FinishTurn", {"turn": turn["id"], "outcome": "failed", "replies": [], "error": error}
    )


async def deliver_waiting(router: Router, *words: str) -> Adapter:
    """Have messages wait together for the first turn."""
    router.place.registry.held.add("berta")
    for text in words:
        await router.deliver(text)
    router.place.registry.held.clear()
    await router.start_waiting()
    return await router.attach()


def test_what_waits_shares_a_turn_and_each_reply_names_its_message(place: Place) -> None:
    seen: list[list[str]] = []

    async def runner(container: Container) -> None:
        await container.begin()
        while True:
            turn = await container.take()
            seen.append(texts(turn))
            replies = [f"re {text}" for text in texts(turn)]
            answers = [message["id"] for message in turn["messages"]]
            await finish(container, turn, replies=replies, answers=answers)

    async def run() -> None:
        place.systemd.program = runner
        async with place.router() as router:
            words = [str(n) for n in range(limits.TURN_MESSAGES + 3)]
            adapter = await deliver_waiting(router, *words)

            for number, word in enumerate(words, start=1):
                delivery = await adapter.delivery()
                assert (delivery["text"], delivery["inReplyTo"]) == (f"re {word}", f"e{number}")
                assert delivery["events"] == [f"e{number}"]
                await adapter.sent(delivery)
            assert seen == [words[: limits.TURN_MESSAGES], words[limits.TURN_MESSAGES :]]

    place.run(run)


def test_turn_holds_no_more_text_than_fits(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TURN_BYTES", 1000)
    seen: list[list[str]] = []

    async def runner(container: Container) -> None:
        await container.begin()
        while True:
            turn = await container.take()
            seen.append([text[0] for text in texts(turn)])
            await finish(container, turn)

    async def run() -> None:
        place.systemd.program = runner
        async with place.router() as router:
            await deliver_waiting(router, "a" * 5000, "b" * 400, "c" * 400, "d" * 400)
            await router.settled()
            assert seen == [["a"], ["b", "c"], ["d"]]

    place.run(run)


def test_message_joins_the_turn_that_runs_and_ends_with_it(place: Place) -> None:
    looked, delivered = asyncio.Event(), asyncio.Event()

    async def runner(container: Container) -> None:
        await container.begin()
        turn = await container.take()
        assert await take_more(container, turn) == []
        looked.set()
        await delivered.wait()
        joined = await take_more(container, turn)
        assert [message["text"] for message in joined] == ["two", "three"]
        # An answer that was lost is given again.
        assert await take_more(container, turn) == joined
        assert await take_more(container, turn, joined[0]) == joined[1:]
        assert await take_more(container, turn, joined[1]) == []
        with pytest.raises(VarlinkError, match="no such message"):
            await take_more(container, turn, {"id": "m0"})
        await container.call("RenewTurn", {"turn": turn["id"]})
        assert [row["state"] for row in await router.inbox()] == ["leased"] * 3
        await finish(container, turn, last=joined[1]["id"])
        await container.take()

    async def run() -> None:
        nonlocal router
        place.systemd.program = runner
        async with place.router() as router:
            adapter = await router.attach()
            mine = await router.attach(event="e1")
            await router.deliver("one")
            await looked.wait()
            await router.deliver("two")
            await router.deliver("three")
            delivered.set()

            delivery = await adapter.delivery()
            assert (delivery["inReplyTo"], delivery["events"]) == ("e3", ["e1", "e2", "e3"])
            assert await mine.delivery() == delivery  # who waits for an answer to the first has it, too
            assert await router.states() == ["answered"] * 3

    router: Router
    place.run(run)


def test_what_joined_unseen_goes_back_and_is_answered_by_the_next_turn(place: Place) -> None:
    delivered = asyncio.Event()
    seen: list[tuple[int, list[str]]] = []

    async def runner(container: Container) -> None:
        await container.begin()
        turn = await container.take()
        await delivered.wait()
        await take_more(container, turn)  # and the answer was lost
        await finish(container, turn, last=turn["messages"][0]["id"])
        turn = await container.take()
        seen.append((turn["attempt"], texts(turn)))
        await finish(container, turn)
        await container.take()

    async def run() -> None:
        place.systemd.program = runner
        async with place.router() as router:
            await router.deliver("one")
            await eventually(lambda: place.systemd.containers and place.systemd.containers[UNIT].turns)
            await router.deliver("two")
            delivered.set()
            await router.settled()
            assert seen == [(1, ["two"])]
            assert await router.states() == ["answered"] * 2

    place.run(run)


def test_second_attempt_is_shared_and_then_each_message_is_tried_alone(place: Place) -> None:
    seen: list[tuple[int, list[str]]] = []

    async def runner(container: Container) -> None:
        await container.begin()
        while True:
            turn = await container.take()
            seen.append((turn["attempt"], texts(turn)))
            assert await take_more(container, turn) == []
            if "poison" in texts(turn):
                await fail(container, turn, "internal")
            else:
                await finish(container, turn)

    async def run() -> None:
        place.systemd.program = runner
        async with place.router() as router:
            adapter = await deliver_waiting(router, "a", "poison", "b")
            replies = [await adapter.reply() for _ in range(3)]

            together = ["a", "poison", "b"]
            assert seen == [
                (1, together),
                (2, together),
                (3, ["a"]),
                (3, ["poison"]),
                (4, ["poison"]),
                (3, ["b"]),
            ]
            dead = "Your message could not be answered: it broke (internal)"
            assert replies == ["done", dead, "done"]
            assert await router.states() == ["answered", "dead", "answered"]

    place.run(run)


@pytest.mark.parametrize("code", ["invalid_request", "overflow", "refused"])
def test_what_cannot_be_answered_takes_no_other_along(place: Place, code: str) -> None:
    async def runner(container: Container) -> None:
        await container.begin()
        while True:
            turn = await container.take()
            await (fail(container, turn, code) if "bad" in texts(turn) else finish(container, turn))

    async def run() -> None:
        place.systemd.program = runner
        async with place.router() as router:
            await deliver_waiting(router, "a", "bad", "b")
            await router.settled()
            assert await router.states() == ["answered", "dead", "answered"]

    place.run(run)


@pytest.mark.parametrize("code", ["authentication", "quota"])
def test_what_only_the_operator_can_mend_ends_all_with_one_notice(place: Place, code: str) -> None:
    async def runner(container: Container) -> None:
        await container.begin()
        while True:
            await fail(container, await container.take(), code)

    async def run() -> None:
        place.systemd.program = runner
        async with place.router() as router:
            await deliver_waiting(router, "a", "b")
            await router.settled()
            assert await router.states() == ["dead", "dead"]
            (notice,) = await router.outbox()
            assert notice["body"] == f"Your last 2 messages could not be answered: it broke ({code})"

    place.run(run)


@pytest.mark.parametrize("code", ["rate_limit", "overloaded", "connection"])
def test_what_passes_uses_up_no_attempt(place: Place, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BACKOFF_MAX_S", 0.002)
    seen: list[list[str]] = []

    async def runner(container: Container) -> None:
        await container.begin()
        while True:
            turn = await container.take()
            seen.append(texts(turn))
            await (
                fail(container, turn, code)
                if turn["attempt"] <= limits.DEFERRALS
                else finish(container, turn)
            )

    async def run() -> None:
        place.systemd.program = runner
        async with place.router() as router:
            await deliver_waiting(router, "a", "b")
            await router.settled()
            assert seen == [["a", "b"]] * (limits.DEFERRALS + 1)
            assert await router.states() == ["answered"] * 2
            assert [row["attempts"] for row in await router.inbox()] == [1, 1]

    place.run(run)


def test_what_does_not_pass_in_hours_is_a_dead_letter(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BACKOFF_MAX_S", 0.002)
    monkeypatch.setattr(limits, "DEFERRALS", 3)

    async def runner(container: Container) -> None:
        await container.begin()
        while True:
            await fail(container, await container.take(), "overloaded")

    async def run() -> None:
        place.systemd.program = runner
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("a")
            assert await adapter.reply() == "Your message could not be answered: it broke (overloaded)"
            (row,) = await router.inbox()
            assert (row["state"], row["deferrals"]) == ("dead", 3)

    place.run(run)


def test_chat_is_told_once_that_it_must_wait_for_long(place: Place) -> None:
    async def runner(container: Container) -> None:
        await container.begin()
        await fail(container, await container.take(), "rate_limit", after_s=3 * 3600)
        await container.take()

    async def run() -> None:
        place.systemd.program = runner
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("a")
            notice = await adapter.reply()
            assert notice == "Still waiting: it broke (rate_limit). This is tried again by itself."
            (row,) = await router.inbox()
            wait_s = (row["not_before"] - row["received_at"]) / 1000
            assert row["state"] == "queued" and 3 * 3600 - 1 < wait_s < 3 * 3600 + 60
            await eventually(lambda: "retrying" in adapter.activity or adapter.stream.reader._buffer)  # type: ignore[attr-defined]

    place.run(run)


def test_message_that_is_not_due_yet_when_its_timer_ends_is_looked_at_again(place: Place) -> None:
    """Timers follow another clock than the schedule: that one is slewed and set."""
    failed = asyncio.Event()

    async def runner(container: Container) -> None:
        await container.begin()
        await fail(container, await container.take(), "rate_limit", after_s=0.2)
        failed.set()
        await container.finish(await container.take(), "at last")

    async def run() -> None:
        place.systemd.program = runner
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("a")
            await failed.wait()
            await router.db.write(lambda tx: tx.all("shift_messages", by=200))
            assert await adapter.reply() == "at last"

    place.run(run)


def test_later_attempt_alone_knows_what_the_shared_one_sent(place: Place) -> None:
    sent: dict[str, list[Json]] = {}

    async def runner(container: Container) -> None:
        await container.begin()
        while True:
            turn = await container.take()
            if turn["attempt"] <= 2:  # both are shared
                call = {"turn": turn["id"], "key": f"news{turn['attempt']}", "text": "x" * 5000}
                await container.call("SendMessage", call)
            if turn["attempt"] < 3:
                await fail(container, turn, "internal")
                continue
            (text,) = texts(turn)
            sent[text] = turn["alreadySent"]
            # The same key again is known, whichever message it was sent with.
            for key in ("news1", "news2"):
                await container.call("SendMessage", {"turn": turn["id"], "key": key, "text": "again"})
            await finish(container, turn)

    async def run() -> None:
        place.systemd.program = runner
        async with place.router() as router:
            await deliver_waiting(router, "a", "b")
            await router.settled()
            text = "x" * limits.ALREADY_SENT_CHARACTERS
            expected = [{"key": key, "text": text} for key in ("news1", "news2")]
            assert sent == {"a": expected, "b": expected}
            kinds = [row["kind"] for row in await router.outbox()]
            assert kinds == ["message", "message", "reply", "reply"]

    place.run(run)


def test_agent_is_told_what_became_of_what_it_said(place: Place) -> None:
    answers: list[list[Json]] = []

    async def runner(container: Container) -> None:
        await container.begin()
        while True:
            turn = await container.take()
            answers.append((await container.call("ListDeliveries", {}))["deliveries"])
            await finish(container, turn, replies=[f"re {text}" for text in texts(turn)])

    async def run() -> None:
        place.systemd.program = runner
        async with place.router() as router:
            adapter = await router.attach()
            for report in (adapter.sent, lambda d: adapter.failed(d, retryable=False)):
                await router.deliver("x")
                await report(await adapter.delivery())
            await router.deliver("last")
            await router.settled()

            assert answers[0] == []
            shown = [(d["kind"], d["text"], d["state"], d["reason"]) for d in answers[2]]
            assert shown == [("reply", "re x", "sent", ""), ("reply", "re x", "failed", "no connection")]

    place.run(run)


def test_restart_of_the_router_keeps_what_has_joined(place: Place) -> None:
    joined, restarted = asyncio.Event(), asyncio.Event()

    async def runner(container: Container) -> None:
        await container.begin()
        turn = await container.take()
        await joined.wait()
        await take_more(container, turn)
        joined.clear()
        await restarted.wait()
        await container.begin()
        again = await container.take()
        assert again["id"] == turn["id"] and texts(again) == ["one", "two"]
        assert [m["text"] for m in await take_more(container, turn)] == ["two"]
        await finish(container, again)
        await container.take()

    async def run() -> None:
        place.systemd.program = runner
        async with place.router() as router:
            await router.deliver("one")
            await eventually(lambda: place.systemd.containers and place.systemd.containers[UNIT].turns)
            await router.deliver("two")
            joined.set()
            await eventually(lambda: not joined.is_set())
        restarted.set()
        async with place.router() as router:
            await router.settled()
            assert await router.states() == ["answered"] * 2
            assert len(await router.outbox()) == 1

    place.run(run)
