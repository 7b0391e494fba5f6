"""Adapters: each delivery reaches one, is reported once, and survives adapters that go, stall or fail."""

from __future__ import annotations

import asyncio
import gc
from types import SimpleNamespace

import pytest

from nanoclawd import limits
from nanoclawd.db import now_ms
from nanoclawd.wire import VarlinkError
from tests.support.router import CHANNEL, Container, Place
from tests.support.varlink_peer import eventually


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BACKOFF_FIRST_S", 0.001)
    monkeypatch.setattr(limits, "STORE_AGAIN_S", 0.001)


def test_what_was_pending_comes_first_and_in_order(place: Place) -> None:
    async def run() -> None:
        async with place.router() as router:
            for number in range(300):  # more than fits into a stream's queue
                await router.deliver(str(number), chat=f"chat{number % 3}")
            await router.settled()

            adapter = await router.attach()
            deliveries = []
            for _ in range(300):  # each chat's next comes when its last was reported
                deliveries.append(await adapter.delivery())
                await adapter.sent(deliveries[-1])

            texts = {
                f"chat{n}": [d["text"] for d in deliveries if d["chat"] == f"chat{n}"] for n in range(3)
            }
            assert texts == {f"chat{n}": [f"echo: {m}" for m in range(n, 300, 3)] for n in range(3)}
            assert len({delivery["key"] for delivery in deliveries}) == 300

    place.run(run)


def test_unreported_delivery_comes_again_with_the_same_key(place: Place) -> None:
    async def run() -> None:
        async with place.router() as router:
            first = await router.attach()
            await router.deliver("hello")
            delivery = await first.delivery()
            await first.close()
            second = await router.attach()

            again = await second.delivery()

            assert again == delivery
            await second.sent(again)
            await second.sent(again)  # harmless
            await second.close()
            third = await router.attach()
            await router.deliver("next")
            assert (await third.delivery())["text"] == "echo: next"

    place.run(run)


def test_two_adapters_of_a_chat_both_get_it_and_the_first_receipt_counts(place: Place) -> None:
    async def run() -> None:
        async with place.router() as router:
            one, two = await router.attach(), await router.attach("chat")
            await router.deliver("hello")
            first, second = await one.delivery(), await two.delivery()
            assert first == second
            await one.close()  # without a report: the other one has it still
            await eventually(lambda: len(router.outlets._outlets) == 1)
            await router.deliver("next")
            await two.sent(second)
            assert await two.reply() == "echo: next"  # and not the first once more

            await two.sent(second)
            await two.failed(second, retryable=True)  # too late

            assert [row["state"] for row in await router.outbox()] == ["sent", "sent"]
            assert router.outlets._outlets[0].unreported == set()

    place.run(run)


def test_adapter_of_one_event_or_chat_gets_only_that(place: Place) -> None:
    async def run() -> None:
        async with place.router() as router:
            event, chat = await router.attach("a", "e-mine"), await router.attach("b")
            await router.deliver("other", chat="a", event="e-other")
            await router.deliver("b", chat="b")
            await router.deliver("mine", chat="a", event="e-mine")

            assert await event.reply() == "echo: mine"
            assert await chat.reply() == "echo: b"
            await eventually(lambda: not list(router.outlets._returned))
            everything = await router.attach()
            assert await everything.reply() == "echo: other"

    place.run(run)


def test_adapter_that_reads_nothing_is_cut_off_and_loses_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    async def run() -> None:
        monkeypatch.setattr(limits, "STREAM_QUEUE", 8)
        async with place.router() as router:
            slow = await router.attach()
            (outlet,) = router.outlets._outlets
            reads = router.outlets.next
            blocked = asyncio.Event()

            async def stalled(which):  # type: ignore[no-untyped-def]
                if which is outlet:
                    await blocked.wait()
                return await reads(which)

            router.outlets.next = stalled  # type: ignore[method-assign]
            for number in range(20):
                await router.deliver("x", chat=f"chat{number}")
            await router.settled()
            blocked.set()
            with pytest.raises(VarlinkError, match="too much was waiting"):
                while True:
                    await slow.delivery()
            await slow.close()
            again = await router.attach()
            assert len({(await again.delivery())["key"] for _ in range(20)}) == 20

    place.run(run)
    assert "adapter-too-slow" in capfd.readouterr().err


def test_failed_delivery_is_tried_again_and_then_dead(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        monkeypatch.setattr(limits, "DELIVERY_ATTEMPTS", 3)
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("hello")
            keys = set()
            for _ in range(3):
                delivery = await adapter.delivery()
                keys.add(delivery["key"])
                await adapter.failed(delivery, retryable=True)

            (row,) = await router.outbox()
            assert (len(keys), row["state"], row["attempts"]) == (1, "dead", 3)
            assert row["reason"] == "no connection"
            await router.deliver("refused")
            await adapter.failed(await adapter.delivery(), retryable=False)
            assert [row["state"] for row in await router.outbox()] == ["dead", "dead"]

    place.run(run)


def test_delivery_that_comes_due_while_another_is_claimed_is_handed_over_too(place: Place) -> None:
    async def run() -> None:
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("first")
            await adapter.failed(await adapter.delivery(), retryable=True, after_s=0.1)
            await router.deliver("second", chat="other")
            await adapter.failed(await adapter.delivery(), retryable=True, after_s=0.2)
            write = router.db.write
            last_due = max(row["not_before"] for row in await router.outbox())

            async def slow(operation):  # type: ignore[no-untyped-def]
                result = await write(operation)
                await asyncio.sleep(max(0, last_due - now_ms()) / 1000 + 0.01)
                return result

            router.outlets._db = SimpleNamespace(write=slow, read=router.db.read)  # type: ignore[assignment]
            assert await adapter.reply() == "echo: first"
            assert await adapter.reply() == "echo: second"

    place.run(run)


def test_younger_delivery_waits_for_an_older_one_of_its_chat(place: Place) -> None:
    async def run() -> None:
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("first")
            await adapter.failed(await adapter.delivery(), retryable=True, after_s=3600)
            await router.deliver("second")
            await router.deliver("elsewhere", chat="other")

            assert await adapter.reply() == "echo: elsewhere"
            assert [row["state"] for row in await router.outbox()] == ["pending", "pending", "sent"]

    place.run(run)


def test_younger_delivery_waits_until_the_older_one_is_reported(place: Place) -> None:
    async def run() -> None:
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("first")
            first = await adapter.delivery()
            await router.deliver("second")
            await router.deliver("elsewhere", chat="other")
            assert await adapter.reply() == "echo: elsewhere"
            await adapter.failed(first, retryable=True)  # what came behind it has not been handed out
            assert await adapter.delivery() == first
            await adapter.sent(first)
            assert await adapter.reply() == "echo: second"

    place.run(run)


def test_who_waits_for_one_answer_gets_it_whatever_else_waits(place: Place) -> None:
    async def run() -> None:
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("first")
            held = await adapter.delivery()
            mine = await router.attach(event="e2")
            await router.deliver("second")
            assert await mine.reply() == "echo: second"
            await adapter.sent(held)
            assert [row["state"] for row in await router.outbox()] == ["sent", "sent"]

    place.run(run)


def test_parts_that_the_platform_has_are_known_after_a_restart(place: Place) -> None:
    async def run() -> None:
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("long text")
            delivery = await adapter.delivery()
            assert delivery["partsSent"] == 0
            part = {"key": delivery["key"], "receipt": "r"}
            for parts in (1, 3, 2):  # one is late
                await adapter.calls.call(f"{CHANNEL}.ReportPart", {**part, "parts": parts})
            for wrong in ({"parts": 0}, {"parts": -1}, {"parts": 1, "receipt": "a\nb"}):
                with pytest.raises(VarlinkError, match="Refused"):
                    await adapter.calls.call(f"{CHANNEL}.ReportPart", {**part, **wrong})
            with pytest.raises(VarlinkError, match="NotFound"):
                await adapter.calls.call(f"{CHANNEL}.ReportPart", {**part, "parts": 1, "key": "none"})
        async with place.router() as router:
            adapter = await router.attach()
            again = await adapter.delivery()
            assert again == {**delivery, "partsSent": 3}
            await adapter.sent(again)
            assert [row["state"] for row in await router.outbox()] == ["sent"]

    place.run(run)


def test_adapter_that_reports_nothing_is_hung_up_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REPORT_S", 0.2)

    async def run() -> None:
        async with place.router() as router:
            dead = await router.attach()
            await router.deliver("first")
            delivery = await dead.delivery()
            part = {"key": delivery["key"], "receipt": "r"}
            (outlet,) = router.outlets._outlets
            assert outlet.deadline is not None
            before = outlet.deadline.when()
            await dead.calls.call(f"{CHANNEL}.ReportPart", {**part, "parts": 1})
            assert outlet.deadline.when() > before  # whoever reports parts is at work
            with pytest.raises(VarlinkError, match="Refused"):
                await dead.delivery()
            monkeypatch.setattr(limits, "REPORT_S", 300)
            alive = await router.attach()
            assert await alive.reply() == "echo: first"

    place.run(run)


def test_report_of_what_does_not_exist_is_refused(place: Place) -> None:
    async def run() -> None:
        async with place.router() as router:
            peer = await router.peer()
            for call in (
                ("ReportSent", {"key": "nothing", "receipt": ""}),
                ("ReportFailed", {"key": "nothing", "reason": "x", "retryable": True}),
                ("ReportFailed", {"key": "x" * 5000, "reason": "x", "retryable": False}),
            ):
                with pytest.raises(VarlinkError, match="NotFound"):
                    await peer.call(f"{CHANNEL}.{call[0]}", call[1])
            with pytest.raises(VarlinkError, match="Refused"):
                await peer.call(f"{CHANNEL}.Attach", {"chat": "a\nb"}, more=True)

    place.run(run)


def test_adapters_that_come_and_go_at_any_moment_lose_nothing(place: Place) -> None:
    async def run() -> None:
        async with place.router() as router:
            for number in range(40):
                await router.deliver(str(number), chat=f"chat{number % 4}")
                peer = await router.peer()
                await peer.send(f"{CHANNEL}.Attach", more=True)
                for _ in range(number):  # hangs up while it attaches, catches up, or waits
                    await asyncio.sleep(0)
                await peer.close()
            await router.deliver("40")  # so all that came before has been accepted
            await router.settled()
            await eventually(lambda: not router.channel.active and not router.outlets._returned)

            adapter = await router.attach()
            texts = sorted([await adapter.reply() for _ in range(41)])

            assert texts == sorted(f"echo: {n}" for n in range(41))

    place.run(run)


def test_adapter_that_leaves_while_its_delivery_is_written_loses_nothing(place: Place) -> None:
    async def run() -> None:
        async with place.router() as router:
            adapter = await router.attach()
            claim = router.outlets.claim

            def leave(tx, *places):  # type: ignore[no-untyped-def]
                rows = claim(tx, *places)
                if rows:
                    (outlet,) = router.outlets._outlets
                    asyncio.get_running_loop().call_soon(router.outlets.detach, outlet)
                    router.outlets.claim = claim  # type: ignore[method-assign]
                return rows

            detach = router.outlets.detach
            router.outlets.claim = leave  # type: ignore[method-assign]
            router.outlets.detach = lambda outlet: (  # type: ignore[method-assign]
                detach(outlet) if outlet in router.outlets._outlets else None
            )
            await router.deliver("hello")
            await router.settled()
            await adapter.close()

            again = await router.attach()
            assert await again.reply() == "echo: hello"

    place.run(run)


@pytest.mark.parametrize("method", ["Deliver", "StopTurn", "ReportSent"])
def test_call_whose_client_hangs_up_has_its_whole_effect(place: Place, method: str) -> None:
    """With "more" the server ends a handler whose client has gone: not between a write and what follows."""

    async def run() -> None:
        async with place.router() as router:
            adapter = await router.attach()
            for number in range(20):
                chat = f"chat{number}"
                peer = await router.peer()
                parameters = {"chat": chat, "thread": ""}
                if method == "Deliver":
                    parameters |= {"event": f"e{number}", "sender": "s", "text": "x", "agent": "berta"}
                    parameters["revision"] = 0  # type: ignore[assignment]
                elif method == "ReportSent":
                    parameters = {"key": "none", "receipt": ""}
                await peer.send(f"{CHANNEL}.{method}", parameters, more=True)
                for _ in range(number):
                    await asyncio.sleep(0)
                await peer.close()
            await router.settled()
            rows = await router.inbox()
            assert {row["state"] for row in rows} <= {"answered"}
            for _ in rows:
                await adapter.reply()

    place.run(run)


def test_reply_of_a_container_that_is_killed_as_it_answers_is_delivered(place: Place) -> None:
    async def answers_and_dies(container: Container) -> None:
        await container.begin()
        turn = await container.take()
        await container.calls.send(
            "io.nanoclaw.Agent.FinishTurn",
            {"turn": turn["id"], "outcome": "answered", "replies": ["last words"]},
        )
        for _ in range(delays.pop()):
            await asyncio.sleep(0)

    async def run() -> None:
        place.systemd.program = answers_and_dies
        async with place.router() as router:
            adapter = await router.attach()
            for number in range(40):
                await router.deliver(str(number), chat=f"chat{number}")
                delivery = await adapter.delivery()
                await adapter.sent(delivery)
                assert delivery["text"] == "last words"
            await router.settled()
            assert len(await router.outbox()) == 40

    delays = [n % 20 for n in range(200)]
    place.run(run)


def test_full_disk_while_an_adapter_leaves_is_made_good(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "STORE_AGAIN_S", 0.1)  # far longer than eventually() needs to see the timer

    async def run() -> None:
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("hello")
            await adapter.delivery()
            router.db._writer.execute("PRAGMA query_only = 1").fetchall()  # each write fails
            await adapter.close()
            await eventually(lambda: router.outlets._timers)
            router.db._writer.execute("PRAGMA query_only = 0").fetchall()

            again = await router.attach()
            assert await again.reply() == "echo: hello"

    place.run(run)


def test_adapters_that_attach_while_a_delivery_backs_off_leave_no_timers(place: Place) -> None:
    async def run() -> None:
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("hello")
            await adapter.failed(await adapter.delivery(), retryable=True, after_s=600)
            for _ in range(20):
                await (await router.attach()).close()

            await eventually(lambda: len(router.outlets._outlets) == 1)
            gc.collect()
            timers = [t for t in asyncio.get_running_loop()._scheduled if not t.cancelled()]  # type: ignore[attr-defined]
            assert sum("Outlets" in repr(timer) for timer in timers) == 1

    place.run(run)
