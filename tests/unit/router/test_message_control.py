"""What an operator sees of messages and deliveries, and does to dead letters; over the real socket."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from nanoclawd import limits
from nanoclawd.control import ControlService
from nanoclawd.registry import Registry
from nanoclawd.server import Server
from nanoclawd.sockets import bind_listener
from nanoclawd.systemd import Systemd
from nanoclawd.wire import Json, VarlinkError
from tests.support.router import Container, Place, Router, killed
from tests.support.varlink_peer import Peer

CONTROL = "io.nanoclaw.Control"
NOBODY = "m0000000000000000"


class Operator:
    """One connection to the control socket."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    async def call(self, method: str, /, **parameters: Any) -> Json:
        return await self._peer.call(f"{CONTROL}.{method}", parameters)

    async def stream(self, method: str, **parameters: Any) -> list[Json]:
        """Return all replies to a call with "more"."""
        await self._peer.send(f"{CONTROL}.{method}", parameters, more=True)
        replies = []
        while True:
            reply = await self._peer.receive()
            assert reply is not None
            if "error" in reply:
                raise VarlinkError(reply["error"], reply["parameters"])
            replies.append(reply["parameters"])
            if not reply.get("continues"):
                return replies

    async def messages(self, **parameters: Any) -> list[Json]:
        replies = await self.stream("ListMessages", **{"limit": 50, **parameters})
        return [reply["message"] for reply in replies if reply["message"]]

    async def dead(self) -> list[str]:
        """Return the ids of all dead letters."""
        replies = await self.stream("ListDeadLetters")
        shown = [reply.get("message") or reply.get("delivery") for reply in replies]
        return [letter.get("id") or letter["key"] for letter in shown if letter]

    async def refused(self, method: str, error: str, **parameters: Any) -> Json:
        """Return the parameters of the error that a call must end with."""
        with pytest.raises(VarlinkError) as caught:
            await self.call(method, **parameters)
        assert caught.value.name == f"{CONTROL}.{error}"
        assert caught.value.parameters["hint"]
        return caught.value.parameters


@asynccontextmanager
async def operating(place: Place, router: Router) -> AsyncIterator[Operator]:
    path = place.channel.with_name("control")
    listener = bind_listener(path)
    control = ControlService(
        db=router.db,
        systemd=cast(Systemd, place.systemd),
        registry=cast(Registry, place.registry),
        people=router.people,
        answers=router.answers,
        channel_list=router.channel_list,
        sessions=router.sessions,
        outlets=router.outlets,
        gateway=router.gateway,
        audit=router.audit,
        usage=router.usage,
        approvals=router.approvals,
        sandbox=[],
    )
    serving = asyncio.create_task(Server(control.service, listener).run())
    peer = await Peer.connect(path)
    peer.contracts = (control.service.interface,)
    try:
        yield Operator(peer)
    finally:
        await peer.close()
        serving.cancel()
        await asyncio.wait([serving])
        listener.close()


async def breaks(container: Container) -> None:
    """Answer what begins with "good"; fail all else for good."""
    await container.begin()
    while True:
        turn = await container.take()
        good = all(message["text"].startswith("good") for message in turn["messages"])
        await (container.finish(turn, "yes") if good else container.fail(turn, retryable=False))


def test_messages_are_listed_newest_last_with_what_became_of_them(place: Place) -> None:
    async def run() -> None:
        place.systemd.program = breaks
        async with place.router() as router, operating(place, router) as operator:
            for text in ("good 1", "bad 2", "good " + "x" * 1000):
                await router.deliver(text)
                await router.settled()

            shown = await operator.messages()

            assert [message["text"] for message in shown[:2]] == ["good 1", "bad 2"]
            assert shown[2]["text"] == "good " + "x" * (limits.EXCERPT_CHARACTERS - 5)
            assert [message["state"] for message in shown] == ["answered", "dead", "answered"]
            assert [message["attempts"] for message in shown] == [1, 1, 1]
            assert "it broke" in shown[1]["reason"]
            assert shown[0]["unit"] == "nanoclaw-berta@test_1.service"
            assert shown[0]["receivedAt"] <= shown[0]["endedAt"]

    place.run(run)


def test_messages_are_chosen_by_agent_state_and_number(place: Place) -> None:
    async def run() -> None:
        place.registry.add("carla")
        place.systemd.program = breaks
        async with place.router() as router, operating(place, router) as operator:
            for number, agent in enumerate(("berta", "carla", "berta", "berta")):
                await router.deliver(f"{'bad' if number == 2 else 'good'} {number}", agent=agent)
                await router.settled()

            async def texts(**parameters: Any) -> list[str]:
                return [message["text"] for message in await operator.messages(**parameters)]

            assert await texts(agent="berta") == ["good 0", "bad 2", "good 3"]
            assert await texts(state="dead") == ["bad 2"]
            assert await texts(agent="carla", state="dead") == []
            assert await texts(limit=2) == ["bad 2", "good 3"]
            await operator.refused("ListMessages", "NotFound", agent="nobody", limit=1)
            with pytest.raises(VarlinkError, match="Refused"):
                await operator.call("ListMessages", limit=0)

    place.run(run)


def test_a_message_is_shown_whole_with_its_deliveries(place: Place) -> None:
    async def run() -> None:
        async with place.router() as router, operating(place, router) as operator:
            text = "long " * 1000
            message = (await router.deliver(text))["message"]
            adapter = await router.attach()
            await adapter.reply()

            replies = await operator.stream("ShowMessage", id=message)
            by_prefix = await operator.stream("ShowMessage", id=message[:9])

            shown, delivery = replies[0]["message"], replies[1]["delivery"]
            assert (shown["id"], shown["text"], shown["state"]) == (message, text, "answered")
            assert (delivery["message"], delivery["text"]) == (message, f"echo: {text}")
            assert (delivery["state"], delivery["receipt"], delivery["kind"]) == ("sent", "r", "reply")
            assert by_prefix == replies
            assert (await operator.stream("ShowMessage", id=delivery["key"]))[1] == replies[1]

    place.run(run)


def test_ids_that_are_unknown_or_not_unique_are_named_errors(place: Place) -> None:
    async def run() -> None:
        place.registry.held.add("berta")
        async with place.router() as router, operating(place, router) as operator:
            ids = [(await router.deliver(str(number)))["message"] for number in range(20)]

            several = await operator.refused("ShowMessage", "Refused", id="m")
            for unknown in (NOBODY, "x", "", "%", "m*", "\U0010ffff"):
                await operator.refused("ShowMessage", "NotFound", id=unknown)
            not_dead = await operator.refused("RetryDeadLetter", "Refused", id=ids[0])

            assert sum(id in several["hint"] for id in ids) == 4
            assert "is queued" in not_dead["message"]

    place.run(run)


def test_a_dead_message_that_is_retried_is_answered(place: Place) -> None:
    async def run() -> None:
        place.systemd.programs = [breaks]
        async with place.router() as router, operating(place, router) as operator:
            message = (await router.deliver("bad"))["message"]
            await router.settled()
            assert await operator.dead() == [message]
            await place.systemd.end_all()

            assert await operator.call("RetryDeadLetter", id=message[:9]) == {"id": message}
            await router.settled()

            (shown,) = await operator.messages()
            assert (shown["state"], shown["revived"], shown["attempts"]) == ("answered", 1, 1)
            assert await operator.dead() == []
            adapter = await router.attach()
            assert [await adapter.reply() for _ in range(2)][1] == "echo: bad"

    place.run(run)


@pytest.mark.parametrize("limit", ["QUEUED_PER_SESSION", "QUEUED_TOTAL"])
def test_no_more_dead_messages_are_retried_than_may_wait(
    place: Place, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    async def run() -> None:
        place.systemd.programs = [breaks] * 3
        async with place.router() as router, operating(place, router) as operator:
            for text in ("one", "two", "three"):
                await router.deliver(text)
                await router.settled()
            await operator.call("StopAll")
            monkeypatch.setattr(limits, limit, 2)
            *fitting, last = await operator.dead()
            for message in fitting:
                await operator.call("RetryDeadLetter", id=message)

            refused = await operator.refused("RetryDeadLetter", "Refused", id=last)

            assert refused["message"] == "2 messages wait for this chat and 2 in all"
            assert await operator.dead() == [last]

    place.run(run)


def test_a_message_of_an_agent_that_is_gone_cannot_be_retried(place: Place) -> None:
    async def run() -> None:
        place.systemd.program = breaks
        async with place.router() as router, operating(place, router) as operator:
            message = (await router.deliver("bad"))["message"]
            await router.settled()
            del place.registry.agents["berta"]

            await operator.refused("RetryDeadLetter", "Refused", id=message)

            assert await router.states() == ["dead"]

    place.run(run)


def test_all_agents_are_stopped_at_once_and_their_messages_wait(place: Place) -> None:
    async def run() -> None:
        async with place.router() as router, operating(place, router) as operator:
            await operator.call("StopAll")
            await router.deliver("hello")

            status = await operator.call("Status")
            agent = (await operator.call("ListAgents"))["runtime"]
            assert (status["held"], status["queue"]["queued"], place.systemd.starts) == (True, 1, [])
            assert (agent["state"], "nanoclawctl start --all" in agent["problem"]) == ("held", True)

            await operator.call("StartAll")
            adapter = await router.attach()
            assert await adapter.reply() == "echo: hello"
            await place.systemd.end_all()
            assert not (await operator.call("Status"))["held"]

    place.run(run)


def test_a_session_says_why_its_message_is_not_answered(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hangs(container: Container) -> None:
        await container.begin()
        await container.take()
        await asyncio.Event().wait()

    async def run() -> None:
        for name in ("carla", "doris", "emil"):
            place.registry.add(name)
        place.registry.held.add("emil")
        place.systemd.programs = [killed, hangs]
        async with place.router(slots=1) as router, operating(place, router) as operator:

            async def details() -> dict[str, tuple[str, str]]:
                sessions = [reply["session"] for reply in await operator.stream("ListSessions")]
                return {session["agent"]: (session["state"], session["detail"]) for session in sessions}

            for agent in ("berta", "carla", "doris", "emil"):
                await router.deliver("hello", agent=agent)
                begun = {"berta": "attempts", "carla": "first_turn"}.get(agent)
                while begun and not (await router.inbox())[-1][begun]:  # noqa: ASYNC110
                    await asyncio.sleep(0)

            shown = await details()
            assert shown["berta"][0] == "queued"
            assert re.fullmatch(r"attempt 2 in \d s: its container failed.*", shown["berta"][1])
            assert shown["carla"] == ("working", "")
            assert shown["doris"] == ("queued", "waits for a slot, 0 before it")
            assert shown["emil"] == (
                "idle",
                "'emil' is stopped; 'nanoclawctl agent start emil' lets it go on",
            )

            monkeypatch.setattr(limits, "HEARTBEAT_S", -1.0)
            assert "its runner says nothing since 0 s" in (await details())["carla"][1]
            await operator.call("StopAll")
            assert all("nanoclawctl start --all" in detail for _, detail in (await details()).values())

    place.run(run)


def test_a_dead_delivery_that_is_retried_is_sent(place: Place) -> None:
    async def run() -> None:
        async with place.router() as router, operating(place, router) as operator:
            adapter = await router.attach()
            await router.deliver("hello")
            delivery = await adapter.delivery()
            await adapter.failed(delivery, retryable=False)
            assert await operator.dead() == [delivery["key"]]

            await operator.call("RetryDeadLetter", id=delivery["key"])
            again = await adapter.delivery()
            await adapter.sent(again)

            assert again == delivery
            (row,) = await router.outbox()
            assert (row["state"], row["attempts"]) == ("sent", 1)
            assert await operator.dead() == []

    place.run(run)


def test_a_dropped_dead_letter_is_listed_no_more_and_cannot_be_retried(place: Place) -> None:
    async def run() -> None:
        place.systemd.program = breaks
        async with place.router() as router, operating(place, router) as operator:
            adapter = await router.attach()
            message = (await router.deliver("bad", event="e"))["message"]
            notice = await adapter.delivery()
            await adapter.failed(notice, retryable=False)
            assert await operator.dead() == [message, notice["key"]]

            await operator.call("DropDeadLetter", id=message)
            await operator.call("DropDeadLetter", id=notice["key"])

            assert await operator.dead() == []
            for method in ("RetryDeadLetter", "DropDeadLetter"):
                refused = await operator.refused(method, "Refused", id=message)
                assert "is dropped" in refused["message"]
            # Its idempotency key stays.
            assert (await router.deliver("bad", event="e")) == {
                "outcome": "queued",
                "message": message,
                "duplicate": True,
            }

    place.run(run)
