"""Messages, turns and containers: whatever a runner does, its message is answered, retried or buried."""

from __future__ import annotations

import asyncio

import pytest

from nanoclawd import limits
from nanoclawd.wire import VarlinkError
from tests.support.commits import HeldCommits
from tests.support.router import AGENT, CHANNEL, Container, Place, echo, killed
from tests.support.varlink_peer import eventually

UNIT = "nanoclaw-berta@test_1.service"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry at once: what is waited for here is events."""
    monkeypatch.setattr(limits, "BACKOFF_FIRST_S", 0.001)
    monkeypatch.setattr(limits, "STORE_AGAIN_S", 0.001)


def test_message_is_answered(place: Place) -> None:
    async def run() -> None:
        async with place.router() as router:
            adapter = await router.attach()
            answer = await router.deliver("hello", event="e1")

            delivery = await adapter.delivery()

            assert (delivery["kind"], delivery["text"], delivery["inReplyTo"]) == (
                "reply",
                "echo: hello",
                "e1",
            )
            assert adapter.activity == ["queued", "starting", "thinking"]
            await adapter.sent(delivery)
            ((message,), (sent,)) = await router.inbox(), await router.outbox()
            assert (message["id"], message["state"], message["attempts"]) == (
                answer["message"],
                "answered",
                1,
            )
            assert (sent["state"], sent["receipt"]) == ("sent", "r")

    place.run(run)


def test_same_event_again_is_answered_as_before_and_stored_once(place: Place) -> None:
    async def run() -> None:
        async with place.router() as router:
            adapter = await router.attach()
            first, second = [await router.deliver("hello", event="same") for _ in range(2)]
            assert await adapter.reply() == "echo: hello"
            edited = await router.deliver("hello!", event="same", revision=1)

            assert (first["duplicate"], second["duplicate"], edited["duplicate"]) == (False, True, False)
            assert first["message"] == second["message"] != edited["message"]
            assert await adapter.reply() == "echo: hello!"

    place.run(run)


def test_messages_of_one_chat_are_answered_in_order_by_one_container(place: Place) -> None:
    async def run() -> None:
        async with place.router() as router:
            adapter = await router.attach()
            for number in range(30):
                await router.deliver(str(number))

            assert [await adapter.reply() for _ in range(30)] == [f"echo: {n}" for n in range(30)]
            assert place.systemd.starts == [UNIT]

    place.run(run)


def test_runner_that_exits_at_once_ends_in_a_dead_letter_with_a_notice(place: Place) -> None:
    async def exits(container: Container) -> None:
        pass

    async def run() -> None:
        place.systemd.program = exits
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("hello")

            notice = await adapter.delivery()

            assert notice["kind"] == "notice" and "could not be answered" in notice["text"]
            ((message,),) = (await router.inbox(),)
            assert (message["state"], message["attempts"]) == ("dead", limits.ATTEMPTS)
            assert len(place.systemd.starts) == limits.ATTEMPTS

    place.run(run)


def test_runner_that_dies_in_mid_turn_gets_it_again_with_what_it_sent(place: Place) -> None:
    turns = []

    async def dies(container: Container) -> None:
        await container.begin()
        turn = await container.take()
        turns.append(turn)
        await container.call("SendMessage", {"turn": turn["id"], "key": "k1", "text": "half"})
        await killed(container)

    async def lives(container: Container) -> None:
        await container.begin()
        turn = await container.take()
        turns.append(turn)
        for key in ("k1", "k2"):
            await container.call("SendMessage", {"turn": turn["id"], "key": key, "text": f"again {key}"})
        await container.finish(turn, "done")
        await container.take()

    async def run() -> None:
        place.systemd.programs = [dies, lives]
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("hello")

            assert [await adapter.reply() for _ in range(3)] == ["half", "again k2", "done"]
            first, second = turns
            assert (first["attempt"], second["attempt"]) == (1, 2) and first["id"] != second["id"]
            assert first["messages"] == second["messages"]
            assert (first["alreadySent"], second["alreadySent"]) == ([], [{"key": "k1", "text": "half"}])

    place.run(run)


def test_runner_that_hangs_loses_its_lease(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hangs(container: Container) -> None:
        await container.begin()
        await container.take()
        monkeypatch.setattr(limits, "LEASE_S", 45.0)  # that of this turn runs already
        await asyncio.Event().wait()

    async def run() -> None:
        monkeypatch.setattr(limits, "LEASE_S", 0.05)
        place.systemd.programs = [hangs]
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("hello")

            assert await adapter.reply() == "echo: hello"
            assert place.systemd.stops == [UNIT]
            assert (await router.inbox())[0]["attempts"] == 2

    place.run(run)


def test_heartbeat_keeps_the_lease(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def beats(container: Container) -> None:
        await container.begin()
        turn = await container.take()
        for _ in range(20):
            await asyncio.sleep(0.02)  # a heartbeat is a matter of time
            await container.call("RenewTurn", {"turn": turn["id"]})
        await container.finish(turn, "at last")
        await container.take()

    async def run() -> None:
        monkeypatch.setattr(limits, "LEASE_S", 0.2)
        place.systemd.programs = [beats]
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("hello")

            assert await adapter.reply() == "at last"
            assert place.systemd.stops == []

    place.run(run)


def test_runner_that_never_asks_for_work_is_replaced(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def deaf(container: Container) -> None:
        container.calls = await container.connect()
        container.ready.set()
        await asyncio.Event().wait()

    async def run() -> None:
        monkeypatch.setattr(limits, "HELLO_S", 0.05)
        place.systemd.programs = [deaf]
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("hello")

            assert await adapter.reply() == "echo: hello"

    place.run(run)


def test_work_again_on_a_new_connection_gets_the_same_turn(place: Place) -> None:
    async def reconnects(container: Container) -> None:
        await container.begin()
        first = await container.take()
        old = container.stream
        await container.work()
        second = await container.take()
        reply = await old.receive()
        assert reply is not None and reply["error"] == f"{AGENT}.OutOfOrder"
        await old.close()
        await container.work()
        third = await container.take()
        assert first == second == third
        await container.finish(third, "one answer")
        await container.take()

    async def run() -> None:
        place.systemd.programs = [reconnects]
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("hello")

            assert await adapter.reply() == "one answer"
            assert place.systemd.starts == [UNIT]

    place.run(run)


@pytest.mark.parametrize("more_waits", [True, False])
@pytest.mark.parametrize(
    "outcomes", [("answered", "answered"), ("failed", "failed"), ("answered", "stopped")]
)
def test_turn_that_is_ended_twice_at_once_ends_once(
    place: Place, outcomes: tuple[str, str], more_waits: bool
) -> None:
    results: list[object] = []
    delivered = asyncio.Event()

    async def twice(container: Container) -> None:
        await container.begin()
        turn = await container.take()
        await delivered.wait()
        other = await container.connect()
        error = {"code": "internal", "message": "it broke", "retryable": False}
        calls = [
            peer.call(
                f"{AGENT}.FinishTurn",
                {
                    "turn": turn["id"],
                    "outcome": outcome,
                    "replies": ["reply"] if outcome == "answered" else [],
                    "error": error if outcome == "failed" else None,
                },
            )
            for peer, outcome in zip((container.calls, other), outcomes, strict=True)
        ]
        results.extend(await asyncio.gather(*calls, return_exceptions=True))
        await container.finish(await container.take(), "second message")
        await container.take()

    async def run() -> None:
        place.systemd.programs = [twice]
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("first")
            await eventually(lambda: bool(place.systemd.containers and place.systemd.containers[UNIT].turns))
            if more_waits:
                await router.deliver("second")
            delivered.set()
            first = await adapter.reply()
            if not more_waits:
                await eventually(lambda: len(results) == 2)
                await router.deliver("second")

            assert await adapter.reply() == "second message" != first
            await router.settled()
            assert len(await router.outbox()) == 2
            assert {} in results
            (refused,) = [result for result in results if result != {}]
            assert isinstance(refused, VarlinkError) and refused.name == f"{AGENT}.NoSuchTurn"

    place.run(run)


def test_finish_again_after_the_end_and_foreign_turns_are_refused(place: Place) -> None:
    refused = []
    other_turn: asyncio.Future[str]

    async def thief(container: Container) -> None:
        await container.begin()
        turn = await container.take()
        await container.finish(turn, "mine")
        stolen = await other_turn
        for id in (turn["id"], stolen, "t0123456789abcdef", ""):
            for method, parameters in (
                ("RenewTurn", {}),
                ("SendMessage", {"key": "k", "text": "x"}),
                ("ReportActivity", {"kind": "text", "text": "x"}),
                ("FinishTurn", {"outcome": "answered", "replies": ["stolen"]}),
            ):
                with pytest.raises(VarlinkError) as caught:
                    await container.call(method, {"turn": id, **parameters})
                refused.append(caught.value.name)
        await container.take()

    async def victim(container: Container) -> None:
        await container.begin()
        turn = await container.take()
        other_turn.set_result(turn["id"])
        await eventually(lambda: len(refused) == 16)
        await container.finish(turn, "mine too")
        await container.take()

    async def run() -> None:
        nonlocal other_turn
        other_turn = asyncio.get_running_loop().create_future()
        place.systemd.programs = [thief, victim]
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("x", chat="one")
            assert await adapter.reply() == "mine"
            await router.deliver("y", chat="two")
            assert await adapter.reply() == "mine too"
            assert set(refused) == {f"{AGENT}.NoSuchTurn"}

    place.run(run)


def test_failed_turn_is_tried_again_by_the_same_runner(place: Place) -> None:
    async def fails_once(container: Container) -> None:
        await container.begin()
        await container.fail(await container.take())
        turn = await container.take()
        await container.finish(turn, f"attempt {turn['attempt']}")
        await container.take()

    async def run() -> None:
        place.systemd.programs = [fails_once]
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("hello")

            assert await adapter.reply() == "attempt 2"
            assert place.systemd.starts == [UNIT]
            assert "retrying" in adapter.activity

    place.run(run)


@pytest.mark.parametrize(("retryable", "attempts"), [(True, limits.ATTEMPTS), (False, 1)])
def test_failed_turn_becomes_a_dead_letter_with_a_notice(
    place: Place, retryable: bool, attempts: int
) -> None:
    async def fails(container: Container) -> None:
        await container.begin()
        while True:
            await container.fail(await container.take(), retryable=retryable)

    async def run() -> None:
        place.systemd.program = fails
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("hello")

            assert await adapter.reply() == "Your message could not be answered: it broke (internal)"
            (message,) = await router.inbox()
            assert (message["state"], message["attempts"]) == ("dead", attempts)
            assert len(await router.outbox()) == 1

    place.run(run)


# --- stop -------------------------------------------------------------------------------------------


def test_stop_in_mid_turn_reaches_the_runner_and_ends_what_waits(place: Place) -> None:
    async def stops(container: Container) -> None:
        await container.begin()
        turn = await container.take()
        work = await container.next()
        assert work == {"turn": None, "stop": turn["id"]}
        await container.finish(turn, outcome="stopped")
        await container.finish(await container.take(), "goes on")
        await container.take()

    async def run() -> None:
        place.systemd.programs = [stops]
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("long work")
            await eventually(lambda: bool(place.systemd.containers and place.systemd.containers[UNIT].turns))
            await router.deliver("waits")

            assert await router.stop_turn()

            assert [await adapter.reply() for _ in range(2)] == ["Stopped.", "Stopped."]
            await router.deliver("later")
            assert await adapter.reply() == "goes on"
            assert await router.states() == ["stopped", "stopped", "answered"]
            assert not await router.stop_turn()

    place.run(run)


def test_runner_that_does_not_stop_is_stopped(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ignores(container: Container) -> None:
        await container.begin()
        await container.take()
        await asyncio.Event().wait()

    async def run() -> None:
        monkeypatch.setattr(limits, "STOP_TURN_S", 0.5)
        place.systemd.programs = [ignores]
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("long work")
            await eventually(lambda: bool(place.systemd.containers and place.systemd.containers[UNIT].turns))

            for _ in range(3):  # a person is impatient
                assert await router.stop_turn()

            assert await adapter.reply() == "Stopped."
            await router.deliver("later")
            assert await adapter.reply() == "echo: later"
            assert len(await router.outbox()) == 2

    place.run(run)


def test_finish_that_meets_the_hard_stop_ends_once(place: Place) -> None:
    """The runner's FinishTurn is being written when the hard stop comes, which then has nothing to end."""
    hold, entered, release = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def late(container: Container) -> None:
        await container.begin()
        turn = await container.take()
        await container.next()
        await hold.wait()
        await container.finish(turn, "late reply")
        await container.take()

    async def run() -> None:
        place.systemd.programs = [late]
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("long work")
            await eventually(lambda: bool(place.systemd.containers and place.systemd.containers[UNIT].turns))
            await router.stop_turn()
            real = router.db.write

            async def slow(operation):  # type: ignore[no-untyped-def]
                entered.set()
                await release.wait()
                return await real(operation)

            router.db.write = slow  # type: ignore[method-assign]
            hold.set()
            await entered.wait()
            (session,) = router.sessions.live()
            assert session.turn is not None
            router.sessions.turns._stop_hard(session, session.turn)
            await asyncio.sleep(0)
            release.set()

            assert await adapter.reply() == "late reply"
            await router.deliver("later")
            assert await adapter.reply() == "echo: later"
            assert len(await router.outbox()) == 2

    place.run(run)


# --- good-bye ---------------------------------------------------------------------------------------


async def leaves_after_each(container: Container) -> None:
    """Say good-bye whenever there is nothing to do, and drop what comes after."""
    await container.begin()
    while True:
        turn = await container.take()
        await container.finish(turn, *(f"{turn['attempt']}: {m['text']}" for m in turn["messages"]))
        if not (await container.call("Goodbye"))["stay"]:
            return


def test_goodbye_races_with_messages_and_none_is_lost_or_tried_twice(place: Place) -> None:
    async def run() -> None:
        place.systemd.program = leaves_after_each
        async with place.router() as router:
            adapter = await router.attach()
            for number in range(150):
                await router.deliver(str(number))
                if number % 3 == 0:  # now the next one comes just after the reply, beside the good-bye
                    continue
                for _ in range(number % 7):
                    await asyncio.sleep(0)
            replies = [await adapter.reply() for _ in range(150)]

            assert replies == [f"1: {n}" for n in range(150)]

    place.run(run)


def test_goodbye_while_a_message_is_being_written_stays(place: Place) -> None:
    """The message is leased to this runner, but not yet on disk, when it asks to leave."""
    stays: list[bool] = []
    blocked = asyncio.Event()

    async def asks(container: Container) -> None:
        await container.begin()
        await container.finish(await container.take(), "first")
        await blocked.wait()
        stays.append((await container.call("Goodbye"))["stay"])
        release.set()
        if stays == [True]:
            turn = await container.take()
            await container.finish(turn, f"attempt {turn['attempt']}")
            await container.take()

    async def run() -> None:
        place.systemd.programs = [asks]
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("one")
            assert await adapter.reply() == "first"
            commits = HeldCommits(router.db)
            delivering = asyncio.create_task(router.deliver("two"))
            await commits.entered.wait()
            blocked.set()
            await release.wait()
            commits.release()
            await delivering

            assert await adapter.reply() == "attempt 1"
            assert stays == [True]

    release = asyncio.Event()
    place.run(run)


def test_goodbye_that_meets_a_message_gets_its_turn_once(place: Place) -> None:
    """The message is leased and handed over while Goodbye() asks the database whether there is one."""
    works: list[object] = []
    go = asyncio.Event()

    async def asks(container: Container) -> None:
        await container.begin()
        await container.finish(await container.take(), "first")
        await go.wait()
        assert (await container.call("Goodbye"))["stay"]
        works.append((await container.next())["turn"]["messages"][0]["text"])
        await router.stop_turn()  # comes next on the stream, if nothing else was there
        works.append((await container.next())["stop"] is not None)
        await container.take()

    async def run() -> None:
        nonlocal router
        place.systemd.programs = [asks]
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("one")
            assert await adapter.reply() == "first"
            read = router.db.read

            async def slow(query, **parameters):  # type: ignore[no-untyped-def]
                if query == "next_message" and go.is_set():
                    router.db.read = read  # type: ignore[method-assign]
                    await router.deliver("two")
                return await read(query, **parameters)

            router.db.read = slow  # type: ignore[method-assign]
            go.set()
            await eventually(lambda: len(works) == 2)
            assert works == ["two", True]

    router = None
    place.run(run)


def test_goodbye_said_twice_does_not_end_the_next_container(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def says_twice(container: Container) -> None:
        await container.begin()
        await container.finish(await container.take(), "first")
        for _ in range(3):
            assert not (await container.call("Goodbye"))["stay"]

    async def run() -> None:
        monkeypatch.setattr(limits, "STOP_TURN_S", 0.5)
        place.systemd.programs = [says_twice]
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("one")
            assert await adapter.reply() == "first"
            await eventually(lambda: not list(router.sessions.live()))
            await router.deliver("two")
            assert await adapter.reply() == "echo: two"

            await asyncio.sleep(0.6)  # longer than the timer that must not be there
            assert place.systemd.stops == [] and place.systemd.is_running(UNIT)

    place.run(run)


def test_runner_that_stays_after_goodbye_is_stopped(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def stays(container: Container) -> None:
        await container.begin()
        await container.finish(await container.take(), "first")
        assert not (await container.call("Goodbye"))["stay"]
        await asyncio.Event().wait()

    async def run() -> None:
        monkeypatch.setattr(limits, "STOP_TURN_S", 0.05)
        place.systemd.programs = [stays]
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("one")
            assert await adapter.reply() == "first"
            await router.deliver("two")  # comes while it stays, and waits for the next container
            assert await adapter.reply() == "echo: two"
            assert place.systemd.stops == [UNIT]

    place.run(run)


# --- limits -----------------------------------------------------------------------------------------


def test_what_breaks_a_limit_is_refused_and_the_turn_goes_on(place: Place) -> None:
    errors: list[str] = []

    async def excessive(container: Container) -> None:
        await container.begin()
        turn = await container.take()
        big = "x" * (limits.TEXT_BYTES + 1)
        for method, parameters in (
            ("SendMessage", {"key": "k", "text": big}),
            ("SendMessage", {"key": "k", "text": " \n"}),
            ("SendMessage", {"key": "a/b", "text": "x"}),
            ("SendMessage", {"key": "", "text": "x"}),
            ("SendMessage", {"key": "x" * 65, "text": "x"}),
            ("SendMessage", {"key": "k\n", "text": "x"}),
            ("FinishTurn", {"outcome": "answered", "replies": [big]}),
            ("FinishTurn", {"outcome": "answered", "replies": [""]}),
            ("FinishTurn", {"outcome": "answered", "replies": ["x"] * (limits.REPLIES_PER_TURN + 1)}),
            ("FinishTurn", {"outcome": "failed", "replies": []}),
            ("FinishTurn", {"outcome": "answered", "replies": [], "error": ERROR}),
        ):
            with pytest.raises(VarlinkError) as caught:
                await container.call(method, {"turn": turn["id"], **parameters})
            errors.append(caught.value.name)
        for number in range(limits.SENDS_PER_TURN):
            await container.call("SendMessage", {"turn": turn["id"], "key": str(number), "text": "x"})
        await container.call("SendMessage", {"turn": turn["id"], "key": "0", "text": "the same again"})
        with pytest.raises(VarlinkError, match="Refused"):
            await container.call("SendMessage", {"turn": turn["id"], "key": "more", "text": "x"})
        for _ in range(1000):
            await container.calls.send(
                f"{AGENT}.ReportActivity",
                {"turn": turn["id"], "kind": "text", "text": "é" * limits.ACTIVITY_BYTES},
                oneway=True,
            )
        await container.finish(turn, "in the end")
        await container.take()

    async def run() -> None:
        place.systemd.programs = [excessive]
        async with place.router() as router:
            await router.deliver("hello")
            await router.settled()
            assert errors == [f"{AGENT}.Refused"] * 11
            rows = await router.outbox()
            assert [row["body"] for row in rows] == ["x"] * limits.SENDS_PER_TURN + ["in the end"]

    ERROR = {"code": "x", "message": "x", "retryable": True}
    place.run(run)


def test_calls_before_hello_and_of_another_protocol_are_refused(place: Place) -> None:
    async def rude(container: Container) -> None:
        peer = await container.connect(hello=False)
        for method, parameters, flags in (
            ("Work", {}, {"more": True}),
            ("Goodbye", {}, {}),
            ("RenewTurn", {"turn": "t"}, {}),
        ):
            with pytest.raises(VarlinkError, match="OutOfOrder"):
                await peer.call(f"{AGENT}.{method}", parameters, **flags)
        with pytest.raises(VarlinkError, match="ExpectedMore"):
            await peer.call(f"{AGENT}.Work")
        with pytest.raises(
            VarlinkError, match="InterfaceNotFound"
        ):  # a session's socket is for runners only
            await peer.call(f"{CHANNEL}.StopTurn", {"chat": "chat", "thread": ""})
        await peer.close()
        await echo(container)

    async def run() -> None:
        place.systemd.programs = [rude]
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("hello")
            assert await adapter.reply() == "echo: hello"

    place.run(run)


def test_runner_of_another_protocol_is_refused_and_the_chat_is_told(place: Place) -> None:
    async def newer(container: Container) -> None:
        peer = await container.connect(hello=False)
        with pytest.raises(VarlinkError, match="ProtocolMismatch"):
            await peer.call(f"{AGENT}.Hello", {"protocol": 2, "version": "x" * 100_000})

    async def run() -> None:
        place.systemd.programs = [newer]
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("hello")
            assert "is of another version of NanoClaw" in await adapter.reply()

    place.run(run)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"agent": "berta2"}, "NotFound"),
        ({"agent": None}, "Refused"),
        ({"agent": "broken"}, "ConfigError"),
        ({"text": "x" * (limits.TEXT_BYTES + 1)}, "Refused"),
        ({"text": " \n"}, "Refused"),
        ({"chat": ""}, "Refused"),
        ({"event": "x" * 256}, "Refused"),
        ({"sender": "a\tb"}, "Refused"),
        ({"thread": "a\x7fb"}, "Refused"),
        ({"revision": -1}, "Refused"),
    ],
)
def test_message_that_is_not_taken_says_why(place: Place, change: dict[str, object], error: str) -> None:
    async def run() -> None:
        place.registry.add("broken")
        async with place.router() as router:
            with pytest.raises(VarlinkError) as caught:
                await router.deliver(**{"channel": "terminal", "text": "x", **change})  # type: ignore[arg-type]
            assert caught.value.name == f"{CHANNEL}.{error}"
            assert await router.inbox() == []

    place.run(run)


def test_message_above_the_queue_limit_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        monkeypatch.setattr(limits, "QUEUED_PER_SESSION", 3)
        monkeypatch.setattr(limits, "QUEUED_TOTAL", 5)
        place.registry.held.add("berta")
        async with place.router() as router:
            for _ in range(3):
                await router.deliver("x", chat="one")
            with pytest.raises(VarlinkError, match="3 messages wait for this chat"):
                await router.deliver("x", chat="one")
            for _ in range(2):
                await router.deliver("x", chat="two")
            with pytest.raises(VarlinkError, match="5 in all"):
                await router.deliver("x", chat="three")
            assert await router.states() == ["queued"] * 5

    place.run(run)


def test_sessions_above_the_limit_wait_and_are_served_in_order(place: Place) -> None:
    served: list[str] = []

    async def leaves(container: Container) -> None:
        await container.begin()
        turn = await container.take()
        served.append(turn["messages"][0]["text"])
        await container.finish(turn, "x")
        await container.call("Goodbye")

    async def run() -> None:
        place.systemd.program = leaves
        async with place.router(slots=1) as router:
            for number in range(12):
                await router.deliver(str(number), chat=f"chat{number}")
            await router.settled()
            assert place.systemd.most_at_once == 1
            assert place.systemd.starts == [f"nanoclaw-berta@test_{n}.service" for n in range(1, 13)]

    place.run(run)


def test_idle_container_makes_room(place: Place) -> None:
    async def run() -> None:
        async with place.router(slots=2) as router:
            adapter = await router.attach()
            for number in range(6):
                await router.deliver(str(number), chat=f"chat{number}")
                assert await adapter.reply() == f"echo: {number}"
            assert place.systemd.most_at_once <= 2
            assert place.systemd.stops == [f"nanoclaw-berta@test_{n}.service" for n in (1, 2, 3, 4)]

    place.run(run)


def test_session_that_made_room_gets_room_in_its_turn(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BACKOFF_FIRST_S", 0.05)

    async def fails_at_first(container: Container) -> None:
        await container.begin()
        while True:
            turn = await container.take()
            await (container.fail(turn) if turn["attempt"] == 1 else container.finish(turn, "done"))

    async def run() -> None:
        place.systemd.program = fails_at_first
        async with place.router(slots=1) as router:
            for chat in ("one", "two"):
                await router.deliver("hello", chat=chat)
            await router.settled()
            assert await router.states() == ["answered", "answered"]

    place.run(run)


def test_two_turns_that_end_in_one_commit_leave_one_slot_to_who_waits(place: Place) -> None:
    async def run() -> None:
        finish = {text: asyncio.Event() for text in ("one", "two")}

        async def waits(container: Container) -> None:
            await container.begin()
            while True:
                turn = await container.take()
                if (text := turn["messages"][0]["text"]) in finish:
                    await finish[text].wait()
                await container.finish(turn, "done")

        place.systemd.program = waits
        async with place.router(slots=2) as router:
            for chat in ("one", "two", "three"):
                await router.deliver(chat, chat=chat)
            await eventually(lambda: sum(len(c.turns) for c in place.systemd.containers.values()) == 2)
            await router.deliver("again", chat="two")
            commits = HeldCommits(router.db)
            before = asyncio.ensure_future(router.db.write(lambda tx: None))
            await commits.entered.wait()
            finish["one"].set()
            await eventually(lambda: router.db._waiting.qsize() == 1)
            finish["two"].set()
            await eventually(lambda: router.db._waiting.qsize() == 2)
            commits.release()

            await before
            await router.settled()

    place.run(run)


# --- the person and the disk ------------------------------------------------------------------------


def test_stopped_agent_keeps_its_messages_and_its_attempts(place: Place) -> None:
    async def works(container: Container) -> None:
        await container.begin()
        await container.take()
        await asyncio.Event().wait()

    async def run() -> None:
        place.systemd.programs = [works]
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("one")
            await router.deliver("two")
            await eventually(lambda: bool(place.systemd.containers and place.systemd.containers[UNIT].turns))

            place.registry.held.add("berta")
            (live,) = router.sessions.live()
            await router.sessions.stop_containers(live.row.agent)
            await eventually(lambda: not list(router.sessions.live()))
            await router.deliver("three")
            rows = await router.inbox()
            assert [(row["state"], row["attempts"]) for row in rows] == [("queued", 0)] * 3

            place.registry.held.clear()
            await router.start_waiting()
            assert [await adapter.reply() for _ in range(3)] == ["echo: one", "echo: two", "echo: three"]

    place.run(run)


def test_full_disk_harms_nothing_but_what_it_touches(place: Place) -> None:
    """Whatever is written while the disk is full: the router lives, and goes on when there is room."""

    async def persistent(container: Container) -> None:
        await container.begin()
        while True:
            turn = await container.take()
            while True:
                try:
                    await container.finish(turn, f"attempt {turn['attempt']}")
                    break
                except VarlinkError as exc:
                    assert exc.name == f"{AGENT}.Unavailable"
                    refused.set()
                    await asyncio.sleep(0.001)

    async def run() -> None:
        place.systemd.program = persistent
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("one")
            assert await adapter.reply() == "attempt 1"
            ((pages,),) = router.db._writer.execute("PRAGMA page_count").fetchall()
            router.db._writer.execute(f"PRAGMA max_page_count = {pages}").fetchall()
            with pytest.raises(VarlinkError, match="Unavailable"):
                await router.deliver("x" * 200_000)
            router.db._writer.execute("PRAGMA max_page_count = 1000000").fetchall()
            await router.deliver("two")
            assert await adapter.reply() == "attempt 1"
            assert place.systemd.starts == [UNIT]

    refused = asyncio.Event()
    place.run(run)
