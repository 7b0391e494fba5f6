"""What agents do beyond answering: edits, reactions, other chats, questions, other agents. Real sockets."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from nanoclawd import limits
from nanoclawd.db import Transaction
from nanoclawd.people import Answerer
from nanoclawd.privileges import Privileges, Say
from nanoclawd.session import SessionState
from nanoclawd.wire import Json, VarlinkError
from tests.support.router import CHANNEL, Adapter, Container, Place, Router, announce, echo
from tests.support.varlink_peer import eventually

ALL = dict.fromkeys(("threads", "edits", "reactions", "redactions", "files", "typing"), True)
Do = Callable[[Container, Json], Awaitable[Any]]


def working(do: Do) -> Callable[[Container], Awaitable[None]]:
    """A runner that does something in each turn, and says what came of it."""

    async def program(container: Container) -> None:
        await container.begin()
        while True:
            turn = await container.take()
            await container.finish(turn, json.dumps(await do(container, turn)))

    return program


async def can(router: Router, **capabilities: bool | int) -> None:
    await router.db.write(lambda tx: announce(tx, **{**ALL, **capabilities}))


async def act(container: Container, turn: Json, method: str, **parameters: object) -> Json:
    """Call a tool's method; returns the outcome, or what was refused."""
    try:
        reply = await container.call(method, {"turn": turn["id"], "key": "k", **parameters})
    except VarlinkError as exc:
        return {"error": exc.parameters["message"]}
    outcome: Json = reply.get("outcome", reply)
    return outcome


def allow(place: Place, agent: str = "berta", **says: Say) -> None:
    config = place.registry.agents[agent]
    place.registry.agents[agent] = replace(config, guard=Privileges(**says))  # type: ignore[arg-type]


async def sent(adapter: Adapter, delivery: Json, receipt: str) -> None:
    await adapter.calls.call(f"{CHANNEL}.ReportSent", {"key": delivery["key"], "receipt": receipt})


async def said(adapter: Adapter, chat: str) -> str:
    """Return what an agent says next in a chat; what the router says there beside is not of interest."""
    while True:
        delivery = await adapter.delivery()
        await adapter.sent(delivery)
        if delivery["chat"] == chat and delivery["kind"] != "notice":
            return str(delivery["text"])


async def answer_approval(router: Router, *, allow: bool) -> str:
    """Have the owner answer the one action that waits."""
    (row,) = [r for r in await router.db.read("pending_approvals") if r["kind"] == "action"]

    def owner(tx: Transaction) -> Answerer:
        return Answerer(person=1, standings=frozenset(), here=True, by="owner")

    await router.guard.answer(row["id"], row["sha256"], allow=allow, by=owner)
    return str(row["id"])


# --- edits and reactions -------------------------------------------------------------------------------


def test_edit_follows_what_it_edits_and_names_its_first_part(place: Place) -> None:
    async def edit(container: Container, turn: Json) -> Json:
        delivery = (await act(container, turn, "SendMessage", text="one", destination=None))["delivery"]
        call = {"delivery": delivery, "text": "two"}
        first = await act(container, turn, "EditMessage", **{**call, "key": "e"})
        again = await act(container, turn, "EditMessage", **{**call, "key": "e"})
        await act(container, turn, "EditMessage", delivery=delivery, text=None, key="gone")
        return first == again and first["state"]  # type: ignore[return-value]

    async def run() -> None:
        place.systemd.program = working(edit)
        async with place.router() as router:
            await can(router)
            adapter = await router.attach()
            await router.deliver("hello")

            said = await adapter.delivery()
            assert (said["kind"], said["text"]) == ("message", "one")
            part = {"key": said["key"], "parts": 1, "receipt": "$part1"}
            await adapter.calls.call(f"{CHANNEL}.ReportPart", part)
            await sent(adapter, said, "$part2")
            edited = await adapter.delivery()
            assert (edited["kind"], edited["text"], edited["target"]) == ("edit", "two", "$part1")
            await sent(adapter, edited, "$edit")
            gone = await adapter.delivery()
            assert (gone["kind"], gone["text"], gone["target"]) == ("redaction", "", "$part1")
            await sent(adapter, gone, "$gone")
            assert await adapter.reply() == '"done"'

    place.run(run)


def test_what_a_channel_cannot_do_becomes_a_message(place: Place) -> None:
    async def all_of_it(container: Container, turn: Json) -> Json:
        message = turn["messages"][0]["id"]
        delivery = (await act(container, turn, "SendMessage", text="one", destination=None))["delivery"]
        return [
            (await act(container, turn, "EditMessage", delivery=delivery, text="two", key="e"))["state"],
            (await act(container, turn, "React", message=message, reaction="👍", key="r"))["state"],
            (await act(container, turn, "EditMessage", delivery=delivery, text=None, key="g"))["state"],
        ]  # type: ignore[return-value]

    async def run() -> None:
        place.systemd.program = working(all_of_it)
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("hello there", event="$hello")

            texts = [await adapter.reply() for _ in range(5)]

            edits = ["(edited) two", "👍 to: 'hello there'", "(taken back) 'one'"]
            assert texts == ["one", *edits, '["done", "done", "done"]']

    place.run(run)


def test_reaction_is_about_the_event_of_a_message(place: Place) -> None:
    async def react(container: Container, turn: Json) -> Json:
        await act(container, turn, "React", message=turn["messages"][0]["id"], reaction="🎉")
        return [
            await act(container, turn, "React", message="m0123456789abcdef", reaction="🎉", key="a"),
            await act(
                container, turn, "React", message=turn["messages"][0]["id"], reaction="x" * 65, key="b"
            ),
        ]  # type: ignore[return-value]

    async def run() -> None:
        place.systemd.program = working(react)
        async with place.router() as router:
            await can(router)
            adapter = await router.attach()
            await router.deliver("hello", event="$hello")

            delivery = await adapter.delivery()
            assert (delivery["kind"], delivery["text"], delivery["target"]) == ("reaction", "🎉", "$hello")
            await adapter.sent(delivery)
            refused = json.loads(await adapter.reply())
            assert ["error" in outcome for outcome in refused] == [True, True]

    place.run(run)


def test_agent_edits_only_what_it_said_in_this_chat(place: Place) -> None:
    async def edit(container: Container, turn: Json) -> Json:
        return await act(
            container, turn, "EditMessage", delivery=turn["messages"][0]["text"], text="mine now"
        )

    async def run() -> None:
        place.registry.add("emil")
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("hello", agent="emil", chat="chat")
            of_another = await adapter.delivery()
            await adapter.sent(of_another)
            await router.deliver("hello", chat="elsewhere")
            said_elsewhere = await adapter.delivery()
            await adapter.sent(said_elsewhere)
            await router.deliver("hello")
            await adapter.reply()
            await router.settled()
            await place.systemd.end_all()
            place.systemd.program = working(edit)

            for key in (of_another["key"], said_elsewhere["key"], "nothing"):
                await router.deliver(key)
                assert "no such thing" in await adapter.reply()

    place.run(run)


def test_endless_edits_end(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SENDS_PER_TURN", 3)

    async def edit(container: Container, turn: Json) -> Json:
        delivery = (await act(container, turn, "SendMessage", text="one", destination=None))["delivery"]
        for number in range(3):
            outcome = await act(
                container, turn, "EditMessage", delivery=delivery, text="x", key=f"e{number}"
            )
        return outcome

    async def run() -> None:
        place.systemd.program = working(edit)
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("hello")
            texts = [await adapter.reply() for _ in range(4)]
            assert "more than 3 messages in one turn" in texts[-1]

    place.run(run)


# --- elsewhere -----------------------------------------------------------------------------------------


async def elsewhere(container: Container, turn: Json) -> Json:
    return await act(container, turn, "SendMessage", text="news", destination="boss")


async def name_boss(router: Router) -> None:
    await router.wire("boss-chat", "berta", "@boss")
    row = {"agent": "berta", "name": "boss", "channel": "test", "chat": "boss-chat"}
    await router.db.write(lambda tx: tx.all("set_destination", **row))


def test_unknown_destination_is_told_with_those_that_there_are(place: Place) -> None:
    async def run() -> None:
        allow(place, send_elsewhere=Say.ALLOW)
        place.systemd.program = working(elsewhere)
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("tell the boss")
            assert "no destination 'boss'" in await adapter.reply()
            await name_boss(router)

            await router.deliver("tell the boss")

            there = await adapter.delivery()
            here = await adapter.delivery()
            there, here = (there, here) if there["chat"] == "boss-chat" else (here, there)
            assert (there["text"], there["inReplyTo"], there["events"]) == ("news", None, [])
            assert json.loads(here["text"])["message"] == "sent to boss"

    place.run(run)


def test_what_is_held_is_sent_once_somebody_has_allowed_it(place: Place) -> None:
    async def run() -> None:
        place.systemd.program = working(elsewhere)
        async with place.router() as router:
            await name_boss(router)
            adapter = await router.attach()
            await router.deliver("tell the boss")
            assert json.loads(await said(adapter, "chat"))["state"] == "held"
            await router.settled()
            await place.systemd.end_all()
            place.systemd.program = echo

            id = await answer_approval(router, allow=True)

            assert await said(adapter, "boss-chat") == "news"
            told = await said(adapter, "chat")
            assert f"Approval {id}" in told and "sent to boss" in told

    place.run(run)


def test_what_is_denied_is_told(place: Place) -> None:
    async def run() -> None:
        allow(place, send_elsewhere=Say.DENY)
        place.systemd.program = working(elsewhere)
        async with place.router() as router:
            await name_boss(router)
            adapter = await router.attach()
            await router.deliver("tell the boss")
            assert "denies 'send_elsewhere'" in await adapter.reply()

    place.run(run)


# --- questions -----------------------------------------------------------------------------------------


async def ask(container: Container, turn: Json) -> Json:
    question = {"question": "Which?", "options": ["Tea", "Coffee"], "timeoutSeconds": 60}
    while True:
        reply = await act(container, turn, "AskPerson", **question)
        if reply.get("state") != "waiting":
            return reply


@pytest.fixture
def polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ASK_POLL_S", 0.05)


@pytest.mark.usefixtures("polls")
@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({"text": "2"}, "Coffee"),
        ({"text": " 1. "}, "Tea"),
        ({"text": "coffee"}, "Coffee"),
        ({"text": "neither, thanks", "inReplyTo": "$card"}, "neither, thanks"),
        ({"text": "2", "inReplyTo": "$card"}, "Coffee"),
    ],
)
def test_answer_goes_to_who_asked_and_is_no_message(place: Place, said: Json, meant: str) -> None:
    async def run() -> None:
        place.systemd.program = working(ask)
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("hello")
            card = await adapter.delivery()
            assert (card["text"], card["choices"]) == ("Which?\n1. Tea\n2. Coffee", ["Tea", "Coffee"])
            await sent(adapter, card, "$card")

            waiting = await router.attach("chat", "$answer")  # as 'send --wait' does
            first = await router.deliver(**said, event="$answer")
            again = await router.deliver(**said, event="$answer")

            assert (first["outcome"], first["duplicate"], again["duplicate"]) == ("queued", False, True)
            assert first["message"] == again["message"]
            reply = await adapter.delivery()
            assert set(reply["events"]) == {"e1", "$answer"}
            assert (await waiting.delivery())["key"] == reply["key"]
            answer = json.loads(reply["text"])
            assert answer == {"state": "answered", "answer": meant, "sender": "someone"}
            assert len(await router.inbox()) == 1

    place.run(run)


@pytest.mark.usefixtures("polls")
@pytest.mark.parametrize(
    ("reaction", "sender", "outcome", "meant"),
    [
        ("2\ufe0f\u20e3", "someone", "answered", "Coffee"),
        ("👍", "someone", "answered", "Tea"),
        ("❌", "someone", "answered", "Coffee"),
        ("🎉", "someone", "kept", None),
        ("👍", "@stranger", "dropped", None),
    ],
)
def test_reaction_to_a_question_answers_it(
    place: Place, reaction: str, sender: str, outcome: str, meant: str | None
) -> None:
    async def run() -> None:
        place.systemd.program = working(ask)
        async with place.router() as router:
            adapter = await router.attach("chat")
            await router.deliver("hello")
            await sent(adapter, await adapter.delivery(), "$card")
            click = {"chat": "chat", "thread": "", "event": "$r", "target": "$card", "sender": sender}

            peer = await router.peer()
            reply = await peer.call(
                f"{CHANNEL}.React", {**click, "senderName": None, "reaction": reaction, "removed": False}
            )

            assert reply["outcome"] == outcome
            if meant is not None:
                assert json.loads(await adapter.reply())["answer"] == meant

    place.run(run)


@pytest.mark.usefixtures("polls")
@pytest.mark.parametrize(
    "said",
    [
        {"text": "3"},
        {"text": "what do you mean?"},
        {"text": "1", "inReplyTo": "$other"},
        {"text": "1", "sender": "@stranger"},
        {"text": "1", "writer": "program"},
        {"text": "1", "thread": "t"},
        {"text": "1", "chat": "elsewhere"},
    ],
)
def test_anything_else_is_no_answer(place: Place, said: Json) -> None:
    async def run() -> None:
        place.systemd.program = working(ask)
        async with place.router() as router:
            adapter = await router.attach("chat")
            await router.deliver("hello")
            await sent(adapter, await adapter.delivery(), "$card")

            place_known = {"sender": "someone", "agent": "berta", **said}
            if place_known["sender"] == "@stranger":
                router._wired.add(("test", "chat", "berta", "@stranger"))
            await router.deliver(**place_known)

            rows = await router.db._reader.execute_fetchall("SELECT answer FROM ask")
            assert {row["answer"] for row in rows} == {None}
            waiting = (SessionState.QUEUED, SessionState.STARTING)
            await eventually(lambda: not any(s.state in waiting for s in router.sessions._live.values()))

    place.run(run)


@pytest.mark.usefixtures("polls")
def test_question_survives_router_and_runner(place: Place) -> None:
    asked: list[str] = []

    async def ask_and_die(container: Container) -> None:
        await container.begin()
        turn = await container.take()
        asked.append(turn["id"])
        await ask_once(container, turn)

    async def ask_once(container: Container, turn: Json) -> None:
        await act(
            container, turn, "AskPerson", question="Which?", options=["Tea", "Coffee"], timeoutSeconds=60
        )

    async def run() -> None:
        place.systemd.programs = [ask_and_die]
        place.systemd.program = working(ask)
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("hello")
            await sent(adapter, await adapter.delivery(), "$card")
            await eventually(lambda: len(asked) == 1)
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("tea")
            answer = json.loads(await adapter.reply())  # of the second attempt: it was not asked again
            assert answer["answer"] == "Tea"

    limits_backoff = limits.BACKOFF_FIRST_S
    limits.BACKOFF_FIRST_S = 0.001
    try:
        place.run(run)
    finally:
        limits.BACKOFF_FIRST_S = limits_backoff


@pytest.mark.usefixtures("polls")
def test_question_expires_and_the_answer_is_then_a_message(place: Place) -> None:
    async def ask_shortly(container: Container, turn: Json) -> Json:
        if turn["messages"][0]["text"] == "tea":
            return {"state": "a message"}
        return await act(
            container, turn, "AskPerson", question="Which?", options=["tea", "coffee"], timeoutSeconds=1
        )

    async def run() -> None:
        place.systemd.program = working(ask_shortly)
        async with place.router() as router:
            await router.deliver("hello")
            await eventually(lambda: bool(router.outlets) and len(place.systemd.containers) > 0)
            adapter = await router.attach()
            await adapter.reply()
            await router.db.write(expire)
            assert json.loads(await adapter.reply())["state"] in ("expired", "waiting")
            await router.deliver("tea")
            assert json.loads(await adapter.reply())["state"] == "a message"

    def expire(tx: Transaction) -> None:
        tx._connection.execute("UPDATE ask SET expires_at = 1")

    place.run(run)


# --- other agents --------------------------------------------------------------------------------------


async def ask_emil(container: Container, turn: Json) -> Json:
    (message,) = turn["messages"]
    if message["sender"] == "agent:emil":
        return {"emil says": message["text"]}
    return await act(container, turn, "MessageAgent", agent="emil", text=message["text"])


def test_agents_answer_comes_to_the_chat_where_it_was_asked_for(place: Place) -> None:
    async def run() -> None:
        place.registry.add("emil")
        place.agents_talk = True
        allow(place, message_agent=Say.ALLOW)

        async def program(container: Container) -> None:
            await (echo if "emil" in container.unit else working(ask_emil))(container)

        place.systemd.program = program
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("what is it?")

            first = json.loads(await adapter.reply())
            second = await adapter.delivery()

            assert first["state"] == "done"
            assert json.loads(second["text"]) == {"emil says": "echo: what is it?"}
            assert (second["chat"], second["inReplyTo"], second["events"]) == ("chat", None, [])
            assert [row["hops"] for row in await router.inbox()] == [0, 1, 2]

    place.run(run)


def test_agents_do_not_answer_each_other_for_ever(place: Place) -> None:
    async def pass_on(container: Container, turn: Json) -> Json:
        other = "berta" if "emil" in container.unit else "emil"
        return await act(container, turn, "MessageAgent", agent=other, text="and you?")

    async def run() -> None:
        place.registry.add("emil")
        place.agents_talk = True
        allow(place, message_agent=Say.ALLOW)
        allow(place, "emil", message_agent=Say.ALLOW)
        place.systemd.program = working(pass_on)
        async with place.router(slots=16) as router:
            adapter = await router.attach()
            await router.deliver("go")
            await adapter.reply()
            await router.settled()
            hops = [row["hops"] for row in await router.inbox()]
            assert max(hops) <= limits.AGENT_HOPS + 1
            assert len(hops) < 40

    place.run(run)


def test_message_to_nobody_is_refused(place: Place) -> None:
    async def message(container: Container, turn: Json) -> Json:
        return [
            await act(container, turn, "MessageAgent", agent=agent, text="x")
            for agent in ("nobody", "berta")
        ]  # type: ignore[return-value]

    async def run() -> None:
        place.systemd.program = working(message)
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("go")
            assert ["error" in outcome for outcome in json.loads(await adapter.reply())] == [True, True]

    place.run(run)
