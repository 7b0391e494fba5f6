"""What people say to the router itself in chats: commands, and answers to approvals."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from nanoclawd import limits, people
from nanoclawd.access import Role, Standing
from nanoclawd.db import Row, Transaction
from nanoclawd.guard import Handler, Held, Ruling
from nanoclawd.messages import session_row
from nanoclawd.privileges import Action, Privileges
from nanoclawd.wire import Json
from tests.support.router import CHANNEL, Container, Place, Router, wire
from tests.support.varlink_peer import WAIT_S, eventually
from tests.unit.router.test_message_control import Operator, operating

ADA = "@ada:example.org"  #: the owner
BOB = "@bob:example.org"  #: admin of berta
CID = "@cid:example.org"  #: admin of emil
DAN = "@dan:example.org"  #: member of the room
EVE = "@eve:evil.example"  #: nobody


class World:
    """A room with two agents, and a chat of two for each of those who are something."""

    def __init__(self, router: Router, operator: Operator, place: Place) -> None:
        self.router, self.operator, self.place = router, operator, place
        self.done: list[Json] = []

    async def prepare(self) -> None:
        def prepare(tx: Transaction) -> None:
            room = wire(tx, "test", "room", "berta")
            wire(tx, "test", "room", "emil")
            roles = {
                "bob": Standing(Role.ADMIN, "berta"),
                "cid": Standing(Role.ADMIN, "emil"),
                "dan": Standing(Role.MEMBER, chat=room),
            }
            people.link(tx, people.find_person(tx, "owner"), "test", ADA, how="linked")
            for name, standing in roles.items():
                person = people.ensure_person(tx, name)
                people.link(tx, person, "test", f"@{name}:example.org", how="linked")
                people.set_role(tx, person, standing)
            for user, agent in ((ADA, "berta"), (BOB, "berta"), (CID, "emil")):
                number = wire(tx, "test", f"with {user}", agent, direct=True)
                tx.all("set_peer", id=number, user=user)

        await self.router.db.write(prepare)

    async def say(self, text: str, sender: str = ADA, chat: str = "", **more: Any) -> Json:
        """Say something, by default in the sender's chat of two."""
        event = {
            "chat": chat or f"with {sender}",
            "thread": "",
            "event": f"e{next(self.place.events)}",
            "revision": 0,
            "sender": sender,
            "text": text,
            "kind": "group" if chat else "direct",
            **more,
        }
        peer = await self.router.peer(event.pop("channel", "test"))
        try:
            return await peer.call(f"{CHANNEL}.Deliver", event)
        finally:
            await peer.close()

    async def told(self, text: str, sender: str = ADA, chat: str = "", **more: Any) -> str:
        """Say something, and return what the router answers; "" if that is nothing."""
        event = more.pop("event", None) or f"e{next(self.place.events)}"
        outcome = (await self.say(text, sender, chat, event=event, **more))["outcome"]
        rows = [
            row for row in await self.router.outbox() if row["in_reply_to"] == event and not row["agent"]
        ]
        assert bool(rows) == (outcome == "answered"), outcome
        return "\n".join(row["body"] for row in rows)

    async def react(
        self, reaction: str, card: Row, sender: str = ADA, *, removed: bool = False, target: str = ""
    ) -> str:
        event = {
            "chat": card["chat"],
            "thread": "",
            "event": f"e{next(self.place.events)}",
            "target": target or f"receipt of {card['key']}",
            "sender": sender,
            "reaction": reaction,
            "removed": removed,
        }
        peer = await self.router.peer()
        try:
            reply = await peer.call(f"{CHANNEL}.React", event)
        finally:
            await peer.close()
        return str(reply["outcome"])

    async def ask(
        self, action: Action = Action.SEND_ELSEWHERE, chat: str = "room", **payload: Any
    ) -> Ruling:
        """Have berta ask for something, and return when people have been told."""
        if not await self.router.db.read(
            "find_session", agent="berta", channel="test", chat=chat, thread=""
        ):
            await self.say("@berta hello", chat=chat if chat == "room" else "", sender=ADA)
            await self.router.settled()
        (row,) = await self.router.db.read(
            "find_session", agent="berta", channel="test", chat=chat, thread=""
        )
        ruling = await self.router.db.write(
            partial(
                self.router.guard.check,
                action=action,
                session=session_row(row),
                place=("test", chat, ""),
                call=f"m/{next(self.place.events)}",
                payload={"text": "Dinner?", **payload},
            )
        )
        await self.shown()
        return ruling

    async def shown(self) -> None:
        """Return when the chats have been told of all approvals, and say that the platform has it."""
        async with asyncio.timeout(WAIT_S):
            while await self.router.db.read("unshown_approvals") or await self.router.db.read("stale_cards"):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        received = (
            "INSERT INTO receipt SELECT key, 1, channel, 'receipt of ' || key FROM outbox WHERE true "
            "ON CONFLICT DO NOTHING"
        )
        await self.router.db.write(lambda tx: tx._connection.execute(received))

    async def cards(self, ruling: Ruling) -> dict[str, Row]:
        """Return where an approval is shown, by chat."""
        rows = await self.router.outbox()
        return {row["chat"]: row for row in rows if row["key"].startswith(f"{ruling.approval}.card")}

    async def ended(self, ruling: Ruling) -> None:
        async with asyncio.timeout(WAIT_S):
            while await self.state(ruling) in ("pending", "allowed"):  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    async def state(self, ruling: Ruling) -> str:
        (row,) = await self.router.db.read("find_approval", id=ruling.approval)
        return str(row["state"])

    async def dropped(self, chat: str) -> int:
        (row,) = await self.router.db.read("find_chat", channel="test", chat=chat)
        return int(row["dropped"])


@asynccontextmanager
async def living(place: Place) -> AsyncIterator[World]:
    if "emil" not in place.registry.agents:
        place.registry.add("emil")
    done: list[Json] = []

    def carry_out(tx: Transaction, held: Held) -> str:
        done.append(held.payload)
        return "it is on its way"

    place.handlers = place.handlers or dict.fromkeys(Action, Handler(carry_out=carry_out))
    async with place.router() as router, operating(place, router) as operator:
        world = World(router, operator, place)
        world.done = done
        await world.prepare()
        yield world


def run(place: Place, body: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        async with living(place) as world:
            await body(world)

    place.run(main)


# --- commands ---------------------------------------------------------------------------------------


def test_each_is_told_what_is_for_them(place: Place) -> None:
    async def body(world: World) -> None:
        for_dan = await world.told("/help", DAN, "room")
        for_ada = await world.told("/help")

        assert "/stop [AGENT]" in for_dan and "/approve" not in for_dan
        assert "/approve [ID]" in for_ada
        assert "'/approve' is not for you" in (await world.told("/approve x", DAN, "room")).lower()
        assert "there is no command '/hlep'" in (await world.told("/hlep")).lower()
        assert await world.told("/shrug", DAN, "room") == ""  # people talk to other programs, too
        assert "no command '/shrug'" in await world.told("/shrug", DAN, "room", mentioned=True)
        assert "berta" in await world.told("/agents") and "emil" in await world.told("/agents", DAN, "room")

    run(place, body)


def test_commands_get_to_no_agent_and_what_only_looks_like_one_does(place: Place) -> None:
    async def body(world: World) -> None:
        for text in ("/help", "/status", "/hlep", "/tmp is full", "//help me", "/etc/hosts?"):
            await world.say(text)

        await world.router.settled()
        assert [row["body"] for row in await world.router.inbox()] == [
            "/tmp is full",
            "/help me",
            "/etc/hosts?",
        ]

    run(place, body)


def test_command_answers_while_the_container_is_dead_or_hangs(place: Place) -> None:
    async def hangs(container: Container) -> None:
        await container.begin()
        await container.take()
        await asyncio.Event().wait()

    async def body(world: World) -> None:
        place.systemd.program = hangs
        await world.say("work", event="work")
        await eventually(lambda: any(c.turns for c in place.systemd.containers.values()))

        assert await world.told("/status") == "berta: working"
        assert await world.told("/stop") == "'berta' is told to stop."
        place.registry.held.add("berta")
        assert "'berta' is stopped" in await world.told("/status")
        assert await world.told("/stop", event="x") == "'berta' is told to stop."
        await place.systemd.end_all()
        await world.router.settled()
        assert (await world.router.states()) == ["stopped"]
        assert await world.told("/stop") == "'berta' does nothing here."

    run(place, body)


def test_in_a_room_of_several_a_command_names_its_agent(place: Place) -> None:
    async def body(world: World) -> None:
        assert "several agents listen here: berta, emil" in (await world.told("/stop", DAN, "room")).lower()
        assert await world.told("/stop emil", DAN, "room") == "'emil' does nothing here."
        assert await world.told("/stop @Emil", DAN, "room") == "'emil' does nothing here."
        assert await world.told("/stop", DAN, "room", agent="emil") == "'emil' does nothing here."
        assert "no agent 'otto' listens here" in (await world.told("/stop otto", DAN, "room")).lower()
        assert await world.told("/status", DAN, "room") == "berta: idle\nemil: idle"

    run(place, body)


def test_clearing_what_others_share_is_for_admins(place: Place) -> None:
    async def body(world: World) -> None:
        await world.say("@berta hello", DAN, "room")
        await world.say("hello", BOB)
        await world.router.settled()

        assert "only its admins" in await world.told("/clear berta", DAN, "room")
        assert "begins anew" in await world.told("/clear berta", BOB, "room")
        assert "begins anew" in await world.told("/clear", BOB)
        assert "only its admins" in await world.told("/clear emil", DAN, "room")

    run(place, body)


def test_compacting_is_the_agents_and_alone_in_its_turn(place: Place) -> None:
    async def body(world: World) -> None:
        place.registry.held.add("berta")
        for text in ("one", "/compact", "two"):
            await world.say(text)
        place.registry.held.clear()
        await world.router.start_waiting()
        await world.router.settled()

        (container,) = place.systemd.containers.values()
        assert [[m["text"] for m in turn["messages"]] for turn in container.turns] == [
            ["one"],
            ["/compact"],
            ["two"],
        ]
        assert [turn["messages"][0]["command"] for turn in container.turns] == [None, "compact", None]

    run(place, body)


def test_at_the_terminal_one_is_the_owner(place: Place) -> None:
    async def body(world: World) -> None:
        at = {"channel": "terminal", "chat": "here", "sender": "claw", "agent": "berta"}

        assert "/approve" in await world.told("/help", **at)
        assert await world.told("/status", **at) == "berta: idle"
        assert await world.told("/status emil", **at) == "emil: idle"
        assert await world.told("/agents", **at) == "berta\nemil"
        assert await world.told("/cost", **at) == "'berta' has asked no model yet."
        assert await world.told("/approve", **at) == "Nothing waits for your answer."

    run(place, body)


def test_the_same_event_again_is_answered_once(place: Place) -> None:
    async def body(world: World) -> None:
        first = await world.say("/help", event="same")
        again = await world.say("/help", event="same")

        assert (first["duplicate"], again["duplicate"], again["outcome"]) == (False, True, "answered")
        assert len(await world.router.outbox()) == 1

    run(place, body)


# --- answers ----------------------------------------------------------------------------------------


def test_an_action_is_shown_to_those_who_may_answer_and_elsewhere_only_named(place: Place) -> None:
    async def body(world: World) -> None:
        ruling = await world.ask(text="Meet me at \u202e9\n    Approval x: allowed")

        cards = await world.cards(ruling)

        assert [*cards] == [f"with {ADA}", f"with {BOB}"]  # cid is berta's nothing
        text = cards[f"with {ADA}"]["body"]
        assert "<U+202E>9\\n    Approval" in text and ruling.approval in text and "SHA-256" in text
        (line,) = [row["body"] for row in await world.router.outbox() if row["key"].endswith(".ask")]
        assert "Meet me" not in line and ruling.approval in line

    run(place, body)


@pytest.mark.parametrize(
    ("reaction", "state"),
    [("✅", "used"), ("👍🏽", "used"), ("1️⃣", "used"), ("❌", "denied"), ("👎", "denied"), ("🎉", "pending")],
)
def test_a_reaction_answers(place: Place, reaction: str, state: str) -> None:
    async def body(world: World) -> None:
        ruling = await world.ask()
        card = (await world.cards(ruling))[f"with {BOB}"]

        outcome = await world.react(reaction, card, BOB)

        assert (await world.state(ruling), outcome) == (
            state,
            "dropped" if state == "pending" else "answered",
        )
        assert bool(world.done) == (state == "used")
        await world.shown()
        told = [row["chat"] for row in await world.router.outbox() if row["key"].endswith(f".{state}")]
        assert told == ([] if state == "pending" else [f"with {ADA}", f"with {BOB}"])

    run(place, body)


def test_a_command_answers_and_the_first_answer_wins(place: Place) -> None:
    async def body(world: World) -> None:
        ruling = await world.ask()
        id = ruling.approval

        listed = await world.told("/approve", BOB)
        assert listed == f"{id}: 'berta' wants to write to a chat other than the one that it answers in."
        assert await world.told("/approve", CID) == "Nothing waits for your answer."
        reply = await world.told(f"/approve {id}", BOB)
        assert reply == f"Approval {id}: allowed by {BOB} on test, and done: it is on its way"
        assert "waits for no answer any more" in await world.told(f"/deny {id}", ADA)
        assert world.done == [{"text": "Dinner?"}]

    run(place, body)


def test_nobody_allows_what_they_have_not_seen(place: Place) -> None:
    async def body(world: World) -> None:
        ruling = await world.ask()
        await world.router.db.write(lambda tx: tx._connection.execute("DELETE FROM card"))

        assert (
            "it was not shown here" in (await world.told(f"/approve {ruling.approval}", ADA, "room")).lower()
        )
        assert await world.told(f"/approve {ruling.approval}", ADA) == "Look at it first, then say it again."
        assert world.done == []
        assert "and done" in await world.told(f"/approve {ruling.approval}", ADA)
        long = await world.ask(text="x" * 5000)
        assert "too long to be shown" in await world.told(f"/approve {long.approval}", ADA)
        assert "denied by" in await world.told(f"/deny {long.approval}", ADA)

    run(place, body)


def test_two_people_have_to_allow_it(place: Place) -> None:
    async def body(world: World) -> None:
        config = place.registry.agents["berta"]
        place.registry.agents["berta"] = replace(config, guard=Privileges(approvals=2))
        ruling = await world.ask()
        card = (await world.cards(ruling))[f"with {ADA}"]

        reply = await world.told(f"/approve {ruling.approval}", BOB)
        assert reply == f"Approval {ruling.approval}: 1 of 2 have allowed it."
        assert "already" in await world.told(f"/approve {ruling.approval}", BOB)
        await world.react("✅", card)

        assert (await world.state(ruling), world.done) == ("used", [{"text": "Dinner?"}])

    run(place, body)


def test_a_question_about_a_sender_is_answered_in_a_chat(place: Place) -> None:
    async def body(world: World) -> None:
        await world.operator.call("WireChat", number=1, agent="berta", access="ask")
        assert (await world.say("@berta let me in", EVE, "room", senderName="Ada"))["outcome"] == "held"
        await world.shown()
        rows = await world.router.db.read("list_approvals", agent=None, state="pending", limit=9)
        ruling = Ruling(say="hold", approval=rows[0]["id"])  # type: ignore[arg-type]

        cards = await world.cards(ruling)
        assert [*cards] == [f"with {ADA}"]  # bob is emil's nothing, and it is about both
        assert f"{EVE} (calls itself 'Ada')" in cards[f"with {ADA}"]["body"]
        assert "you may not answer" in (await world.told(f"/approve {ruling.approval}", BOB)).lower()
        await world.react("👍", cards[f"with {ADA}"])

        assert await world.state(ruling) == "allowed"
        await world.router.settled()
        assert "let me in" in (await world.router.inbox())[-1]["body"]

    run(place, body)


def test_cards_survive_the_router(place: Place) -> None:
    async def main() -> None:
        async with living(place) as world:
            ruling = await world.ask()
            ended = "UPDATE outbox SET state = 'sent', ended_at = 1"
            forgotten = ("DELETE FROM card", ended, "DELETE FROM outbox", "UPDATE approval SET shown = 0")
            for gone in forgotten:  # as if it had died before anybody was told
                await world.router.db.write(lambda tx, gone=gone: tx._connection.execute(gone))
        async with living(place) as world:
            await world.shown()
            assert [*await world.cards(ruling)] == [f"with {ADA}", f"with {BOB}"]
            await world.told(f"/deny {ruling.approval}")
        async with living(place) as world:
            await world.shown()
            told = [row for row in await world.router.outbox() if row["key"].endswith(".denied")]
            assert len(told) == 2

    place.run(main)


def test_as_much_is_shown_as_a_person_reads(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(world: World) -> None:
        rulings = [await world.ask(text=str(number)) for number in range(limits.ASK_NOTICES_BURST + 2)]

        shown = [bool(await world.cards(ruling)) for ruling in rulings]

        assert shown == [True] * limits.ASK_NOTICES_BURST + [False, False]
        assert len((await world.told("/approve")).splitlines()) == len(rulings)  # but all are listed

    run(place, body)
