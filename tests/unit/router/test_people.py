"""Who is heard where: by a channel's real calls, a real database, and the turns that agents get."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanoclawd import limits, pairing, paths, retention, routing
from nanoclawd.db import now_ms
from nanoclawd.ids import AgentName, SessionName
from nanoclawd.wire import Json, VarlinkError
from tests.support.router import CHANNEL, Place, Router
from tests.unit.router.test_message_control import Operator, operating

EVE = "@eve:evil.example"
ADA = "@ada:example.org"


class Room:
    """One chat of a platform, as its adapter sees it; events are numbered."""

    def __init__(self, router: Router, operator: Operator, place: Place, chat: str = "room") -> None:
        self.router, self.operator, self.place, self.chat = router, operator, place, chat

    async def say(self, text: str, sender: str = ADA, **more: Any) -> Json:
        event = {
            "chat": self.chat,
            "thread": "",
            "event": f"e{next(self.place.events)}",
            "revision": 0,
            "sender": sender,
            "text": text,
            **more,
        }
        peer = await self.router.peer()
        return await peer.call(f"{CHANNEL}.Deliver", event)

    async def outcome(self, text: str, sender: str = ADA, **more: Any) -> str:
        return str((await self.say(text, sender, **more))["outcome"])

    async def call(self, method: str, **parameters: Any) -> Json:
        peer = await self.router.peer()
        return await peer.call(f"{CHANNEL}.{method}", {"chat": self.chat, **parameters})

    async def wire(self, agent: str = "berta", **how: Any) -> Json:
        return (await self.operator.call("WireChat", number=await self.number(), agent=agent, **how))["chat"]

    async def number(self) -> int:
        """Return the chat's number; it is there since somebody was invited to it."""
        await self.call("Invite", sender=ADA)
        chats = [reply["chat"] for reply in await self.operator.stream("ListChats")]
        return next(chat["number"] for chat in chats if chat["chat"] == self.chat)

    async def show(self) -> Json:
        return await self.operator.call("ShowChat", number=await self.number())

    async def member(self, sender: str, role: str = "member") -> Json:
        account = {"channel": "test", "user": sender}
        return (await self.operator.call("SetRoleOf", **account, role=role, chat=await self.number()))[
            "person"
        ]

    async def heard(self) -> list[str]:
        """Return what agents were given, each as AGENT: TEXT, in its order."""
        await self.router.settled()
        rows = await self.router.db._reader.execute_fetchall(
            "SELECT agent, body FROM inbox JOIN session ON session.id = session ORDER BY seq"
        )
        return [f"{row['agent']}: {row['body']}" for row in rows]

    async def texts_stored(self) -> set[str]:
        """Return each text that the database has anywhere."""
        found = set()
        for table in ("inbox", "held", "context", "outbox"):
            rows = await self.router.db._reader.execute_fetchall(f"SELECT body FROM {table}")
            found |= {row["body"] for row in rows}
        return found


@asynccontextmanager
async def opened(place: Place) -> AsyncIterator[Room]:
    async with place.router() as router, operating(place, router) as operator:
        yield Room(router, operator, place)


# --- chats ------------------------------------------------------------------------------------------


def test_nothing_of_a_chat_that_nobody_opened_gets_to_an_agent(place: Place) -> None:
    async def run() -> None:
        async with opened(place) as room:
            assert await room.outcome("chatter") == "dropped"
            assert await room.operator.stream("ListChats") == [{"chat": None}]
            assert await room.outcome("help", mentioned=True) == "held"

            shown = await room.show()
            assert (shown["chat"]["state"], shown["chat"]["held"]) == ("new", 1)
            assert await room.texts_stored() == {"help"}

            await room.operator.call("LinkPerson", person="owner", channel="test", user=ADA)
            assert await room.heard() == []
            await room.wire()
            assert await room.heard() == ["berta: help"]

    place.run(run)


def test_a_chat_is_wired_unwired_and_blocked_and_its_adapter_is_told(place: Place) -> None:
    async def run() -> None:
        async with opened(place) as room:
            adapter = await room.router.attach()
            assert await room.call("Invite", sender=EVE, title="party") == {"state": "new"}
            await room.wire(access="public")
            assert (await adapter.stream.result())["chat"] == {"chat": "room", "state": "open"}
            assert await room.call("Invite", sender=EVE) == {"state": "open"}

            await room.operator.call("UnwireChat", number=await room.number(), agent="berta")
            assert await room.call("Invite", sender=EVE) == {"state": "new"}
            assert await room.outcome("hey", mentioned=True) == "held"
            await room.operator.call("BlockChat", number=await room.number())

            assert (await adapter.stream.result())["chat"] == {"chat": "room", "state": "blocked"}
            assert await room.outcome("hey", mentioned=True) == "dropped"
            assert await room.texts_stored() == set()
            assert (await room.show())["chat"]["dropped"] == 2

    place.run(run)


def test_strangers_make_no_more_new_chats_than_may_wait(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        monkeypatch.setattr(limits, "CHATS_NEW", 3)
        async with opened(place) as room:
            for number in range(5):
                room.chat = f"room{number}"
                await room.outcome("hey", EVE, kind="direct")

            chats = await room.operator.stream("ListChats")
            assert [reply["chat"]["held"] for reply in chats] == [1, 1, 1]
            room.chat = "room9"
            assert await room.call("Invite", sender=EVE) == {"state": "blocked"}

    place.run(run)


# --- senders ----------------------------------------------------------------------------------------


def test_of_a_stranger_in_a_strict_chat_there_is_nothing_but_the_number(place: Place) -> None:
    async def run() -> None:
        async with opened(place) as room:
            await room.wire(engagement="every", keepContext=10)
            await room.member(ADA)

            assert await room.outcome("secret", EVE, senderName="owner", mentioned=True) == "dropped"
            assert await room.outcome("hello") == "queued"
            assert await room.heard() == ["berta: hello"]

            assert (await room.show())["chat"]["dropped"] == 1
            assert "secret" not in await room.texts_stored()
            assert (
                place.systemd.containers["nanoclaw-berta@test_1.service"].turns[0]["messages"][0]["context"]
                == []
            )

    place.run(run)


def test_what_is_held_goes_on_in_its_order_when_its_sender_is_let_in(place: Place) -> None:
    async def run() -> None:
        async with opened(place) as room:
            await room.wire(engagement="every", access="ask")
            await room.member(ADA)
            first = await room.say("one", EVE, senderName="Your owner", event="x")
            again = await room.say("one", EVE, event="x")
            assert [first["outcome"], again["outcome"], again["duplicate"]] == ["held", "held", True]
            assert await room.outcome("from ada") == "queued"
            assert await room.outcome("two", EVE) == "held"
            assert await room.heard() == ["berta: from ada"]
            held = (await room.show())["held"]
            assert [(h["sender"], h["senderName"], h["text"]) for h in held] == [
                (EVE, "Your owner", "one"),
                (EVE, "", "two"),
            ]

            person = await room.member(EVE)

            assert await room.heard() == ["berta: from ada", "berta: one", "berta: two"]
            assert person["name"] == "eve_evil_example"
            assert person["identities"] == [{"channel": "test", "user": EVE, "how": "allowed"}]
            assert await room.outcome("three", EVE) == "queued"
            assert (await room.say("one", EVE, event="x"))["duplicate"]
            assert len(await room.heard()) == 4

    place.run(run)


def test_a_denial_drops_what_is_held_and_is_remembered(place: Place) -> None:
    async def run() -> None:
        async with opened(place) as room:
            await room.wire(engagement="every", access="ask")
            await room.say("one", EVE)
            await room.say("mine", "@fay:example.org")

            await room.member(EVE, "denied")

            assert await room.texts_stored() == {"mine"}
            assert await room.outcome("two", EVE) == "dropped"
            assert await room.heard() == []
            await room.operator.call("SetRole", person="eve_evil_example", chat=await room.number())
            assert await room.outcome("three", EVE) == "held"

    place.run(run)


def test_what_is_held_survives_the_router_and_is_bounded(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        monkeypatch.setattr(limits, "HELD_PER_CHAT", 3)
        monkeypatch.setattr(limits, "HELD_BYTES", 100)
        async with opened(place) as room:
            await room.wire(engagement="every", access="ask")
            outcomes = [await room.outcome(text, EVE) for text in ("a", "x" * 100, "b", "c", "d")]
            assert outcomes == ["held", "dropped", "held", "held", "dropped"]
        async with opened(place) as room:
            assert (await room.show())["chat"]["dropped"] == 2
            await room.member(EVE)
            assert await room.heard() == ["berta: a", "berta: b", "berta: c"]

    place.run(run)


def test_what_nobody_answers_makes_room_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with opened(place) as room:
            await room.wire(engagement="every", access="ask")
            await room.member("@fay:example.org", "denied")
            await room.say("one", EVE)
            room.chat = "other"
            outcomes = [await room.outcome(str(n), EVE, kind="direct") for n in range(9)]
            assert outcomes == ["held"] * limits.HELD_PER_NEW_CHAT + ["dropped"] * (9 - 5)
            later = now_ms() + (limits.HELD_DAYS * retention.DAY_S + 1) * 1000
            monkeypatch.setattr(retention, "now_ms", lambda: later)

            await room.router.db.write(retention._drop_held)

            assert await room.texts_stored() == set()
            assert await pending(room) == []
            chats = [reply["chat"] for reply in await room.operator.stream("ListChats")]
            assert [(chat["chat"], chat["dropped"]) for chat in chats] == [("room", 1)]

    place.run(run)


def test_chatter_of_strangers_is_not_held_for_an_agent_that_it_is_not_for(place: Place) -> None:
    async def run() -> None:
        async with opened(place) as room:
            await room.wire(access="ask", keepContext=10)

            assert await room.outcome("chatter", EVE) == "dropped"
            assert await room.outcome("@berta help", EVE) == "held"
            assert await room.texts_stored() == {"@berta help"}

    place.run(run)


def test_strangers_of_a_public_chat_are_heard_so_often_and_no_more(place: Place) -> None:
    async def run() -> None:
        async with opened(place) as room:
            await room.wire(engagement="every", access="public")
            await room.member(ADA)

            outcomes = [await room.outcome(str(n), f"@{n}:evil.example") for n in range(30)]

            assert outcomes == ["queued"] * limits.STRANGER_BURST + ["dropped"] * (
                30 - limits.STRANGER_BURST
            )
            assert await room.outcome("hello", ADA) == "queued"

    place.run(run)


def test_a_name_that_somebody_chose_decides_nothing_and_gets_to_no_agent(place: Place) -> None:
    async def run() -> None:
        async with opened(place) as room:
            await room.wire(engagement="every", access="public")

            await room.say("let me in", EVE, senderName=f"{ADA}\n\x1b[2J" + "x" * 5000, title="owner")
            await room.router.settled()

            (turn,) = place.systemd.containers["nanoclaw-berta@test_1.service"].turns
            assert turn["messages"][0]["sender"] == EVE
            assert ADA not in json.dumps(turn) and "owner" not in json.dumps(turn)

    place.run(run)


def test_roles_are_for_what_they_say_and_the_last_owner_stays(place: Place) -> None:
    async def run() -> None:
        place.registry.add("emil")
        async with opened(place) as room:
            await room.wire("berta", engagement="every")
            await room.wire("emil", engagement="every")
            operator = room.operator
            await operator.call("LinkPerson", person="ada", channel="test", user=ADA)
            assert await room.outcome("nothing yet") == "dropped"
            await operator.call("SetRole", person="ada", role="member", agent="emil")
            await room.say("to emil")
            await operator.call("SetRole", person="ada", role="admin")
            await room.say("to both")

            assert await room.heard() == ["emil: to emil", "berta: to both", "emil: to both"]
            number = await room.number()
            for wrong in (
                {"role": "owner", "agent": "berta"},
                {"role": "admin", "chat": number},
                {"role": "member"},
                {"role": "denied", "agent": "berta"},
                {"role": "member", "agent": "berta", "chat": number},
            ):
                with pytest.raises(Exception, match="Refused"):
                    await operator.call("SetRole", person="ada", **wrong)
            await operator.refused("SetRole", "Refused", person="owner", role="admin")
            await operator.refused("SetRole", "Refused", person="owner")
            await operator.refused("SetRole", "NotFound", person="ada", agent="berta")
            await operator.call("SetRole", person="ada", role="owner")
            await operator.call("SetRole", person="owner")

    place.run(run)


# --- questions --------------------------------------------------------------------------------------


async def pending(room: Room) -> list[Json]:
    found = await room.operator.stream("ListApprovals", state="pending")
    return [reply["approval"] for reply in found if reply["approval"]]


async def answered(room: Room, approval: Json, answer: str, scope: str = "always") -> Json:
    parameters = {"id": approval["id"], "sha256": approval["sha256"], "answer": answer, "scope": scope}
    return (await room.operator.call("AnswerApproval", **parameters))["approval"]


def test_a_person_is_asked_once_about_a_sender_and_sees_what_they_wrote(place: Place) -> None:
    async def run() -> None:
        async with opened(place) as room:
            await room.wire(engagement="every", access="ask")
            await room.say("let me in", EVE, senderName="Your owner", title="Bank")
            await room.say("please", EVE)

            (approval,) = await pending(room)
            assert (approval["kind"], approval["agent"], approval["chat"]) == ("sender", "berta", "room")
            assert approval["question"] == {
                "number": await room.number(),
                "title": "Bank",
                "user": EVE,
                "name": "Your owner",
                "text": "let me in",
            }
            shown = await room.operator.call("ShowApproval", id=approval["id"][:5])
            assert [(c["answer"], c["scope"]) for c in shown["choices"]] == [
                ("allow", "always"),
                ("deny", "always"),
            ]

            done = await answered(room, approval, "allow")

            assert (done["state"], done["scope"]) == ("allowed", "always")
            assert await room.heard() == ["berta: let me in", "berta: please"]
            assert await pending(room) == []
            rows = await room.operator.stream("ListAudit")
            (row,) = [r["row"] for r in rows if r["row"]["event"] == "approval_allowed"]
            assert (row["agent"], json.loads(row["detail"])["user"]) == ("berta", EVE)

    place.run(run)


def test_an_answer_is_about_what_was_shown_and_is_given_once(place: Place) -> None:
    async def run() -> None:
        async with opened(place) as room:
            await room.wire(engagement="every", access="ask")
            await room.say("let me in", EVE)
            (approval,) = await pending(room)

            for wrong, scope in (({**approval, "sha256": "0" * 64}, "always"), (approval, "once")):
                with pytest.raises(VarlinkError, match="Refused"):
                    await answered(room, wrong, "allow", scope)
            assert await room.heard() == []
            assert (await answered(room, approval, "deny"))["state"] == "denied"
            with pytest.raises(VarlinkError, match="Refused"):
                await answered(room, approval, "allow")
            assert await room.outcome("again", EVE) == "dropped"
            assert await pending(room) == []

    place.run(run)


def test_a_new_chat_is_opened_or_blocked_by_an_answer(place: Place) -> None:
    async def run() -> None:
        async with opened(place) as room:
            await room.operator.call("LinkPerson", person="owner", channel="test", user=ADA)
            await room.say("hello?", kind="direct")
            (approval,) = await pending(room)
            assert (approval["kind"], approval["agent"]) == ("chat", "")

            await answered(room, approval, "allow")
            assert await room.heard() == ["berta: hello?"]

            place.registry.add("emil")
            room.chat = "other"
            await room.say("hello?", EVE, kind="direct")
            (approval,) = await pending(room)
            with pytest.raises(VarlinkError, match="Refused"):
                await answered(room, approval, "allow")  # to which of the two?
            assert (await room.show())["chat"]["state"] == "new"
            await answered(room, approval, "deny")
            shown = await room.show()
            assert (shown["chat"]["state"], shown["chat"]["dropped"]) == ("blocked", 1)

    place.run(run)


@pytest.mark.parametrize("command", ["wire", "block", "member"])
def test_a_command_that_says_the_same_ends_the_question(place: Place, command: str) -> None:
    async def run() -> None:
        async with opened(place) as room:
            if command == "member":
                await room.wire(access="ask", engagement="every")
            await room.say("hello?", EVE, kind="direct")
            assert len(await pending(room)) == 1

            match command:
                case "wire":
                    await room.wire()
                case "block":
                    await room.operator.call("BlockChat", number=await room.number())
                case "member":
                    await room.member(EVE)

            assert await pending(room) == []

    place.run(run)


def test_no_more_is_asked_than_a_person_reads(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        monkeypatch.setattr(limits, "QUESTIONS", 3)
        async with opened(place) as room:
            await room.wire(engagement="every", access="ask")
            for number in range(5):
                assert await room.outcome("hey", f"@{number}:evil.example") == "held"

            assert len(await pending(room)) == 3
            assert (await room.show())["chat"]["held"] == 5

    place.run(run)


# --- several agents ---------------------------------------------------------------------------------


def test_each_agent_that_is_meant_gets_the_event_once(place: Place) -> None:
    async def run() -> None:
        place.registry.add("emil")
        async with opened(place) as room:
            adapter = await room.router.attach()
            await room.wire("berta", engagement="every")
            await room.wire("emil", engagement="every", priority=5)
            await room.member(ADA)

            first = await room.say("hello", event="x")
            again = await room.say("hello", event="x")

            assert (again["message"], again["duplicate"]) == (first["message"], True)
            assert await room.heard() == ["emil: hello", "berta: hello"]
            deliveries = []
            for _ in range(2):
                deliveries.append(await adapter.delivery())
                await adapter.sent(deliveries[-1])
            assert {(d["agent"], d["text"]) for d in deliveries} == {
                ("berta", "echo: hello"),
                ("emil", "echo: hello"),
            }
            await room.wire("emil", exclusive=True)
            await room.say("only emil")
            await room.say("@berta and emil no more")
            heard = await room.heard()
            assert heard[2:] == ["emil: only emil", "berta: @berta and emil no more", heard[-1]]
            assert heard[-1] == "emil: @berta and emil no more"

    place.run(run)


def test_agents_do_not_answer_each_other_for_ever(place: Place) -> None:
    async def run() -> None:
        async with opened(place) as room:
            bot = "@bot:example.org"
            await room.wire(engagement="every")
            await room.member(ADA)
            await room.member(bot)

            assert await room.outcome("spam", bot, writer="program") == "dropped"
            outcomes = [await room.outcome("@berta hi", bot, writer="program") for _ in range(3)]
            last = {"sender": bot, "writer": "program", "event": "last"}
            again = [(await room.say("@berta hi", **last))["duplicate"] for _ in range(5)]
            assert again == [False, True, True, True, True]
            outcomes += [await room.outcome("@berta hi", bot, writer="program") for _ in range(2)]
            assert outcomes == ["queued"] * (limits.PROGRAM_HOPS - 1) + ["dropped"] * 2
            assert await room.outcome("go on", ADA) == "queued"
            outcomes = [await room.outcome("@berta hi", bot, writer="program") for _ in range(6)]
            left = limits.PROGRAM_BURST - limits.PROGRAM_HOPS
            assert outcomes == ["queued"] * left + ["dropped"] * (6 - left)

    place.run(run)


# --- conversations ----------------------------------------------------------------------------------


def test_one_conversation_of_all_chats_answers_where_it_was_asked(place: Place) -> None:
    async def run() -> None:
        place.registry.held.add("berta")
        async with opened(place) as room:
            adapter = await room.router.attach()
            for chat in ("a", "b"):
                room.chat = chat
                await room.wire(engagement="every", sessionMode="agent")
                await room.member(ADA)
            for chat, text in (("a", "1"), ("a", "2"), ("b", "3"), ("a", "4")):
                room.chat = chat
                await room.say(text)
            place.registry.held.clear()
            await room.router.start_waiting()

            told = []
            for _ in range(4):
                told.append(await adapter.delivery())
                await adapter.sent(told[-1])

            assert sorted((d["chat"], d["text"]) for d in told) == [
                ("a", "echo: 1"),
                ("a", "echo: 2"),
                ("a", "echo: 4"),
                ("b", "echo: 3"),
            ]
            (container,) = place.systemd.containers.values()
            assert container.unit == "nanoclaw-berta@all_1.service"
            assert [[m["text"] for m in turn["messages"]] for turn in container.turns] == [
                ["1", "2"],
                ["3"],
                ["4"],
            ]

    place.run(run)


def test_stop_in_one_chat_leaves_what_the_same_session_does_for_another(place: Place) -> None:
    async def run() -> None:
        place.registry.held.add("berta")
        async with opened(place) as room:
            for chat in ("a", "b"):
                room.chat = chat
                await room.wire(engagement="every", sessionMode="agent")
                await room.member(ADA)
                await room.say(f"in {chat}")

            assert await room.call("StopTurn", thread="") == {"stopped": True}

            assert await room.router.states() == ["queued", "stopped"]

    place.run(run)


@pytest.mark.parametrize(("mode", "sessions"), [("thread", 3), ("chat", 1)])
def test_threads_are_conversations_or_are_not(place: Place, mode: str, sessions: int) -> None:
    async def run() -> None:
        async with opened(place) as room:
            adapter = await room.router.attach()
            await room.wire(engagement="every", sessionMode=mode)
            await room.member(ADA)
            for thread in ("", "t1", "t2"):
                await room.say(f"in '{thread}'", thread=thread)
                delivery = await adapter.delivery()
                assert (delivery["thread"], delivery["text"]) == (thread, f"echo: in '{thread}'")
                await adapter.sent(delivery)

            assert len(await room.operator.stream("ListSessions")) == sessions

    place.run(run)


def test_sticky_ends(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with opened(place) as room:
            await room.wire(engagement="sticky", stickySeconds=60)
            await room.member(ADA)

            assert await room.outcome("not yet") == "dropped"
            assert await room.outcome("hey", mentioned=True) == "queued"
            assert await room.outcome("and this") == "queued"
            then = now_ms() + 60_000
            monkeypatch.setattr(routing, "now_ms", lambda: then)
            assert await room.outcome("too late") == "dropped"

    place.run(run)


def test_what_was_not_for_it_is_told_once_with_the_next_that_is(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        monkeypatch.setattr(limits, "CONTEXT_BYTES", 20)
        async with opened(place) as room:
            await room.wire(keepContext=3)
            await room.member(ADA)
            outcomes = [await room.outcome(f"word {n}", event=f"c{n}") for n in range(5)]
            assert outcomes == ["kept"] * 5
            assert await room.outcome("x" * 21) == "dropped"

            await room.say("@berta so?")
            await room.say("word 4", event="c4")
            await room.say("@berta and?")
            await room.router.settled()

            (container,) = place.systemd.containers.values()
            told = [m for turn in container.turns for m in turn["messages"]]
            assert [[said["text"] for said in m["context"]] for m in told] == [
                ["word 2", "word 3", "word 4"],
                [],
            ]
            assert told[0]["context"][0]["sender"] == ADA

    place.run(run)


def test_an_agent_hears_later_what_people_think_of_what_it_said(place: Place) -> None:
    async def run() -> None:
        async with opened(place) as room:
            await room.wire()
            await room.member(ADA)
            adapter = await room.router.attach()
            await room.say("@berta hello")
            delivery = await adapter.delivery()
            await adapter.sent(delivery)

            async def react(
                event: str, sender: str = ADA, target: str = "r", **more: Any
            ) -> tuple[str, bool]:
                what = {"thread": "", "event": event, "target": target, "sender": sender, "senderName": None}
                said = await room.call("React", **what, **{"reaction": "👍", "removed": False, **more})
                return said["outcome"], said["duplicate"]

            assert await react("r1") == ("kept", False)
            assert await react("r1") == ("kept", True)
            assert await react("r2", reaction="🎉") == ("kept", False)
            assert await react("r2", removed=True) == ("dropped", False)
            assert await react("r3", EVE) == ("dropped", False)
            assert await react("r4", target="$of-somebody-else") == ("dropped", False)
            await room.say("@berta and?")
            await room.router.settled()

            (container,) = place.systemd.containers.values()
            last = container.turns[-1]["messages"][-1]
            (heard,) = last["context"]
            assert (heard["sender"], heard["text"]) == (
                ADA,
                f"[reacts with 👍 to what you said: {delivery['text']}]",
            )

    place.run(run)


def test_what_is_written_anew_or_taken_back_before_an_agent_had_it_never_gets_there(place: Place) -> None:
    async def run() -> None:
        place.registry.held.add("berta")
        async with opened(place) as room:
            await room.wire(engagement="every", access="ask")
            await room.member(ADA)
            await room.say("oops", event="x")
            await room.say("better", event="x", revision=1)
            await room.say("secret", event="y")
            await room.say("held secret", EVE, event="z")

            assert await room.call("Retract", thread="", event="y") == {"unseen": True}
            assert await room.call("Retract", thread="", event="z") == {"unseen": False}
            assert await room.call("Retract", thread="", event="no") == {"unseen": False}

            place.registry.held.clear()
            await room.router.start_waiting()
            await room.router.settled()
            (container,) = place.systemd.containers.values()
            assert [m["text"] for turn in container.turns for m in turn["messages"]] == ["better"]
            assert not {"secret", "held secret"} & await room.texts_stored()

    place.run(run)


@pytest.mark.parametrize("method", ["ResetSession", "CloseSession"])
def test_a_conversation_begins_anew(place: Place, method: str) -> None:
    async def run() -> None:
        async with opened(place) as room:
            await room.wire(engagement="every")
            await room.member(ADA)
            await room.say("one")
            await room.router.settled()
            state = paths.session_state(AgentName("berta"), SessionName("test_1"))
            (state / "transcript.jsonl").write_text("all of it")

            session = {"agent": "berta", "session": "test_1"}
            trash = (await room.operator.call(method, **session))["trash"]

            assert not state.exists()
            assert Path(trash, "transcript.jsonl").read_text() == "all of it"
            assert place.systemd.stops == ["nanoclaw-berta@test_1.service"]
            listed = [reply["session"] for reply in await room.operator.stream("ListSessions")]
            assert [s is not None for s in listed] == [method == "ResetSession"]
            assert (await room.operator.call(method, **session))["trash"] is None
            await room.say("two")
            await room.router.settled()
            assert await room.router.states() == ["answered", "answered"]
            (listed_again,) = await room.operator.stream("ListSessions")
            assert listed_again["session"]["session"] == "test_1"
            await room.operator.refused(method, "NotFound", agent="berta", session="other")

    place.run(run)


def test_closing_stops_what_waits_and_resetting_answers_it(place: Place) -> None:
    async def run() -> None:
        place.registry.held.add("berta")
        async with opened(place) as room:
            await room.wire(engagement="every")
            await room.member(ADA)
            for method, state in (("ResetSession", "queued"), ("CloseSession", "stopped")):
                await room.say("one")
                await room.operator.call(method, agent="berta", session="test_1")
                assert (await room.router.states())[-1] == state

    place.run(run)


# --- pairing ----------------------------------------------------------------------------------------


def test_a_code_proves_whose_an_account_is_and_gets_to_no_agent(place: Place) -> None:
    async def run() -> None:
        async with opened(place) as room:
            adapter = await room.router.attach()
            await room.wire(engagement="every", access="public")
            code = (await room.operator.call("Pair", channel="test", person="owner"))["code"]
            other = (await room.operator.call("Pair", channel="elsewhere", person="owner"))["code"]

            assert await room.outcome(f" {code.lower()} ", ADA) == "dropped"

            delivery = await adapter.delivery()
            assert (delivery["kind"], delivery["agent"], delivery["chat"]) == ("notice", "", "room")
            assert "owner" in delivery["text"]
            await adapter.sent(delivery)
            assert await room.texts_stored() == {delivery["text"]}
            (owner,) = [reply["person"] for reply in await room.operator.stream("ListPeople")]
            assert owner["identities"] == [{"channel": "test", "user": ADA, "how": "paired"}]
            # It works once, and on its channel.
            await room.outcome(code, EVE)
            await room.outcome(other, EVE)
            (owner,) = [reply["person"] for reply in await room.operator.stream("ListPeople")]
            assert len(owner["identities"]) == 1
            rows = await room.operator.stream("ListAudit")
            assert "paired" in [reply["row"]["event"] for reply in rows]

    place.run(run)


def test_who_guesses_ends_the_code(place: Place) -> None:
    async def run() -> None:
        async with opened(place) as room:
            code = (await room.operator.call("Pair", channel="test", person="owner"))["code"]
            for number in range(limits.PAIRING_GUESSES):
                await room.say(f"AAAA-AA{chr(65 + number % 8)}A", EVE)

            await room.say(code, EVE, kind="direct")

            (owner,) = [reply["person"] for reply in await room.operator.stream("ListPeople")]
            assert owner["identities"] == []
            assert (await room.operator.stream("ListChats"))[0]["chat"]["held"] == 1  # a message as any

    place.run(run)


def test_a_code_ends_with_its_time(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with opened(place) as room:
            code = (await room.operator.call("Pair", channel="test", person="owner"))["code"]
            then = time.monotonic() + limits.PAIRING_S
            monkeypatch.setattr(pairing, "time", SimpleNamespace(monotonic=lambda: then))

            await room.say(code, EVE)

            (owner,) = [reply["person"] for reply in await room.operator.stream("ListPeople")]
            assert owner["identities"] == []
            await room.operator.refused("Pair", "Refused", channel="test", person="No Name")

    place.run(run)


def test_messages_for_an_agent_whose_file_is_away_wait_for_it(place: Place) -> None:
    async def run() -> None:
        async with opened(place) as room:
            await room.wire(engagement="every", access="ask")
            await room.member(ADA)
            await room.say("held", EVE)
            del place.registry.agents["berta"]

            assert await room.outcome("hello") == "queued"
            await room.member(EVE)
            place.registry.add("berta")
            await room.router.start_waiting()

            assert await room.heard() == ["berta: hello", "berta: held"]
            assert await room.router.states() == ["answered", "answered"]

    place.run(run)


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {"engagement": "pattern"},
        {"engagement": "pattern", "pattern": "(a+)+$"},
        {"engagement": "pattern", "pattern": ".*"},
        {"pattern": "deploy"},
        {"stickySeconds": 0},
        {"priority": 1001},
        {"keepContext": 51},
    ],
)
def test_a_wiring_that_makes_no_sense_is_refused_and_the_old_one_stays(place: Place, how: Json) -> None:
    async def run() -> None:
        async with opened(place) as room:
            before = await room.wire(engagement="sticky")
            number = await room.number()

            with pytest.raises(Exception, match="Refused"):
                await room.operator.call("WireChat", number=number, agent="berta", **how)

            assert (await room.show())["chat"] == before

    place.run(run)


def test_what_there_is_not_is_named(place: Place) -> None:
    async def run() -> None:
        async with opened(place) as room:
            for method in ("ShowChat", "BlockChat", "UnwireChat"):
                await room.operator.refused(method, "NotFound", number=7)
            await room.operator.refused("WireChat", "NotFound", number=await room.number(), agent="nobody")
            await room.operator.refused("SetRole", "NotFound", person="nobody")
            link = {"person": "owner", "channel": "test", "user": ADA, "unlink": True}
            await room.operator.refused("LinkPerson", "NotFound", **link)

    place.run(run)
