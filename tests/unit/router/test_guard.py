"""The guard: what is held is asked about once, carried out once, and looked at again before that."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from nanoclawd import limits, people
from nanoclawd.access import Role, Standing
from nanoclawd.db import Row, Transaction
from nanoclawd.errors import ConfigError, Refused, Unavailable
from nanoclawd.guard import Handler, Held, Ruling
from nanoclawd.messages import SessionRow, session_row
from nanoclawd.people import Answerer
from nanoclawd.privileges import TABLE, Action, Privileges, Say
from nanoclawd.settings import parse_settings
from nanoclawd.wire import Json
from tests.support.router import Place, Router
from tests.unit.router.test_message_control import Operator, operating

PAYLOAD: Json = {"destination": "family", "text": "Dinner?"}


class Effects:
    """What was carried out."""

    def __init__(self) -> None:
        self.prepared: list[Json] = []
        self.done: list[Json] = []
        self.failure: Exception | None = None

    async def prepare(self, held: Held) -> None:
        self.prepared.append(held.payload)
        if self.failure is not None:
            raise self.failure

    def carry_out(self, tx: Transaction, held: Held) -> str:
        if held.payload.get("refused"):
            raise Refused("there is no such destination")
        self.done.append(held.payload)
        return "it is on its way"


class World:
    def __init__(self, router: Router, person: Operator, session: SessionRow, effects: Effects) -> None:
        self.router, self.person, self.session, self.effects = router, person, session, effects

    async def check(
        self, action: Action = Action.SEND_ELSEWHERE, call: str = "m1/k1", **payload: Any
    ) -> Ruling:
        place = ("test", "chat", "")
        asked = partial(
            self.router.guard.check,
            action=action,
            session=self.session,
            place=place,
            call=call,
            payload={**PAYLOAD, **payload},
        )
        return await self.router.db.write(asked)

    async def vote(self, ruling: Ruling, user: str, *, allow: bool = True) -> Row:
        def by(tx: Transaction) -> Answerer:
            answerer = people.answerer_of(tx, "test", user)
            assert answerer is not None
            return answerer

        (row,) = await self.router.db.read("find_approval", id=ruling.approval)
        return await self.router.guard.answer(row["id"], row["sha256"], allow=allow, by=by)

    async def appoint(self, name: str, role: Role | None, agent: str = "") -> None:
        def appoint(tx: Transaction) -> None:
            person = people.ensure_person(tx, name)
            people.link(tx, person, "test", f"@{name}", how="linked")
            if role is None:
                people.remove_role(tx, person, Standing(Role.MEMBER, agent))
            else:
                people.set_role(tx, person, Standing(role, agent))

        await self.router.db.write(appoint)

    async def answer(self, ruling: Ruling, answer: str = "allow", **more: Any) -> Json:
        shown = (await self.person.call("ShowApproval", id=ruling.approval))["approval"]
        line = {"id": shown["id"], "sha256": shown["sha256"], "answer": answer, "scope": "once"}
        return await self.person.call("AnswerApproval", **{**line, **more})

    async def state(self, ruling: Ruling) -> str:
        (row,) = await self.router.db.read("find_approval", id=ruling.approval)
        return str(row["state"])

    async def reached(self, ruling: Ruling, *states: str) -> None:
        async with asyncio.timeout(5):
            while await self.state(ruling) not in states:  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    async def told(self) -> list[str]:
        """Return what the router has told the agent, once it has had it."""
        await self.router.settled()
        return [row["body"] for row in await self.router.inbox() if not row["sender"]]

    async def audit(self) -> list[str]:
        rows = [reply["row"] for reply in await self.person.stream("ListAudit") if reply["row"]]
        return [row["event"].removeprefix("approval_") for row in rows]


@asynccontextmanager
async def living(place: Place, effects: Effects | None = None) -> AsyncIterator[World]:
    effects = effects or Effects()
    place.handlers = dict.fromkeys(Action, Handler(carry_out=effects.carry_out, prepare=effects.prepare))
    async with place.router() as router, operating(place, router) as person:
        await router.deliver("hello", event="first")
        await router.settled()
        (row,) = await router.db.read("list_sessions", agent="berta")
        yield World(router, person, session_row(row), effects)


def run(place: Place, body: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        async with living(place) as world:
            await body(world)

    place.run(main)


def test_table_says_what_of_each_action_unless_a_file_says_otherwise(place: Place) -> None:
    async def body(world: World) -> None:
        place.registry.settings = parse_settings('[guard]\nedit = "deny"\nreact = "hold"\n')
        config = place.registry.agents["berta"]
        place.registry.agents["berta"] = replace(config, guard=Privileges(react=Say.ALLOW))

        rulings = {action: (await world.check(action, f"m/{action}")).say for action in Action}

        assert rulings == {
            "create_agent": "hold",
            "message_agent": "hold",
            "send_elsewhere": "hold",
            "send_file": "allow",
            "edit": "deny",
            "react": "allow",
        }
        assert await world.audit() == ["asked", "asked", "asked", "guard_deny"]

    run(place, body)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[guard]\nedit = "ask"', "nanoclaw.toml:2: guard: edit must be allow, hold or deny: 'ask'"),
        ("[guard]\nedit = 1", "nanoclaw.toml:2: guard: edit must be allow, hold or deny"),
        ("[guard]\napprovals = 0", "nanoclaw.toml:2: guard: approvals must be from 1 to 9"),
        ('[guard]\nedits = "deny"', "nanoclaw.toml:2: guard: there is no key 'edits'"),
        ("guard = 3", "nanoclaw.toml:1: guard must be a table"),
    ],
)
def test_table_that_is_wrong_is_an_error(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings(text)

    assert words in str(caught.value)
    assert caught.value.hint


def test_keys_of_the_table_are_its_actions() -> None:
    assert set(TABLE) == set(Action)
    assert {*Privileges.__dataclass_fields__} == {*Action, "approvals"}


def test_an_action_is_done_once_it_is_allowed_and_its_agent_is_told(place: Place) -> None:
    async def body(world: World) -> None:
        ruling = await world.check()
        shown = await world.person.call("ShowApproval", id=ruling.approval)
        assert json.loads(shown["approval"]["action"]["payload"]) == PAYLOAD
        assert (ruling.say, world.effects.done) == (Say.HOLD, [])
        assert ruling.approval in ruling.message

        reply = await world.answer(ruling)

        assert (reply["sent"], reply["approval"]["state"], world.effects.done) == (True, "used", [PAYLOAD])
        told = f"Approval {ruling.approval} (send_elsewhere) was allowed and done: it is on its way."
        assert await world.told() == [told]
        assert await world.audit() == ["asked", "allowed", "used"]
        # What it says then answers no event of the platform.
        assert [
            (row["body"], row["in_reply_to"]) for row in await world.router.outbox() if row["agent"]
        ] == [
            ("echo: hello", "first"),
            (f"echo: {told}", None),
        ]

    run(place, body)


def test_the_same_call_again_is_the_same_action_whatever_became_of_it(place: Place) -> None:
    async def body(world: World) -> None:
        first = await world.check()
        assert await world.check() == first
        assert (await world.check(call="m2/k1")).approval == first.approval  # nobody has answered yet
        assert (await world.check(call="m2/k2", text="Lunch?")).approval != first.approval
        await world.answer(first)

        again = await world.check()
        assert (again.approval, again.say) == (first.approval, Say.HOLD)
        assert "it is done" in again.message
        assert (await world.check(call="m3/k1")).approval != first.approval
        assert world.effects.done == [PAYLOAD]

    run(place, body)


def test_a_denial_is_told_and_remembered(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(world: World) -> None:
        ruling = await world.check()

        await world.answer(ruling, "deny")

        assert world.effects.done == []
        (told,) = await world.told()
        assert "was denied by" in told
        assert (await world.check(call="m2/k1")).say is Say.DENY
        await world.person.refused(
            "AnswerApproval", "Refused", id=ruling.approval, sha256="0" * 64, answer="allow", scope="once"
        )

    run(place, body)


def test_answer_with_the_hash_of_another_payload_is_refused(place: Place) -> None:
    async def body(world: World) -> None:
        first, second = await world.check(), await world.check(call="m1/k2", text="Give me money")
        (row,) = await world.router.db.read("find_approval", id=second.approval)

        line = {"id": first.approval, "sha256": row["sha256"], "answer": "allow", "scope": "once"}
        await world.person.refused("AnswerApproval", "Refused", **line)

        assert world.effects.done == []

    run(place, body)


def test_an_action_that_somebody_wrote_anew_is_not_done(place: Place) -> None:
    async def body(world: World) -> None:
        ruling = await world.check()
        await world.router.db.write(
            lambda tx: tx._connection.execute("UPDATE approval SET payload = replace(payload, '?', '!')")
        )

        with pytest.raises(Exception, match="Refused"):
            await world.answer(ruling)
        assert world.effects.done == []

    run(place, body)


@pytest.mark.parametrize("action", [Action.SEND_ELSEWHERE, Action.CREATE_AGENT])
def test_who_may_answer(place: Place, action: Action) -> None:
    async def body(world: World) -> None:
        place.registry.add("emil")
        ruling = await world.check(action)
        await world.appoint("member", Role.MEMBER, "berta")
        await world.appoint("neighbour", Role.ADMIN, "emil")
        await world.appoint("admin", Role.ADMIN, "berta")
        await world.appoint("all", Role.ADMIN)
        refused = ["member", "neighbour", *(["admin"] if action is Action.CREATE_AGENT else [])]

        for name in refused:
            for allow in (True, False):
                with pytest.raises(Refused, match="you may not answer"):
                    await world.vote(ruling, f"@{name}", allow=allow)
        assert await world.state(ruling) == "pending"

        row = await world.vote(ruling, "@all" if action is Action.CREATE_AGENT else "@admin")
        assert row["state"] == "used"

    run(place, body)


def test_several_people_have_to_allow_it_each_once(place: Place) -> None:
    async def body(world: World) -> None:
        config = place.registry.agents["berta"]
        place.registry.agents["berta"] = replace(config, guard=Privileges(approvals=3))
        ruling = await world.check()
        for name in ("ada", "bob", "eve"):
            await world.appoint(name, Role.ADMIN)
        await world.router.db.write(
            lambda tx: people.link(tx, people.find_person(tx, "ada"), "test", "@ada2", how="linked")
        )

        assert (await world.vote(ruling, "@ada"))["state"] == "pending"
        with pytest.raises(Refused, match=r"allowed approval \w+ already"):
            await world.vote(ruling, "@ada2")
        assert (await world.vote(ruling, "@bob"))["state"] == "pending"
        await world.appoint("ada", Role.MEMBER, "berta")
        await world.router.db.write(
            lambda tx: people.remove_role(tx, people.find_person(tx, "ada"), Standing(Role.ADMIN))
        )
        assert (await world.vote(ruling, "@eve"))["state"] == "pending"  # ada's does not count any more
        assert world.effects.done == []
        reply = await world.answer(ruling)  # the owner, on this host

        assert reply["approval"]["state"] == "used"
        assert reply["approval"]["action"]["allowedBy"] == ["ada", "bob", "eve", "owner"]
        assert world.effects.done == [PAYLOAD]

    run(place, body)


def test_one_who_denies_is_enough(place: Place) -> None:
    async def body(world: World) -> None:
        config = place.registry.agents["berta"]
        place.registry.agents["berta"] = replace(config, guard=Privileges(approvals=2))
        ruling = await world.check()
        await world.appoint("ada", Role.ADMIN)
        await world.vote(ruling, "@ada")

        assert (await world.answer(ruling, "deny"))["approval"]["state"] == "denied"
        assert world.effects.done == []

    run(place, body)


def test_what_cannot_be_done_any_more_is_over_and_said(place: Place) -> None:
    async def body(world: World) -> None:
        ruling = await world.check(refused=True)

        reply = await world.answer(ruling)

        assert (reply["approval"]["state"], reply["sent"]) == ("expired", False)
        assert reply["approval"]["action"]["outcome"] == "there is no such destination"
        (told,) = await world.told()
        assert "was allowed, but cannot be done: there is no such destination" in told

    run(place, body)


def test_everything_is_looked_at_again_before_it_is_done(place: Place) -> None:
    """It is allowed while it cannot be done at once; then the world changes."""

    async def body(world: World) -> None:
        config = place.registry.agents["berta"]

        async def forbid() -> None:
            place.registry.agents["berta"] = replace(config, guard=Privileges(send_elsewhere=Say.DENY))

        async def dismiss() -> None:
            await world.router.db.write(
                lambda tx: people.remove_role(tx, people.find_person(tx, "ada"), Standing(Role.ADMIN))
            )

        changes = {"denies 'send_elsewhere' by now": forbid, "who allowed it may not do so": dismiss}
        for number, (words, change) in enumerate(changes.items()):
            await world.appoint("ada", Role.ADMIN)
            place.registry.agents["berta"] = config
            world.effects.failure = Unavailable("systemd is away")
            ruling = await world.check(call=f"m{number}/k", text=str(number))
            assert (await world.vote(ruling, "@ada"))["state"] == "allowed"
            await change()
            world.effects.failure = None
            world.router.guard._changed.set()

            await world.reached(ruling, "expired")
            assert words in (await world.told())[-1]
        assert world.effects.done == []

    run(place, body)


def test_what_was_allowed_is_done_by_the_next_router_once(place: Place) -> None:
    effects = Effects()
    effects.failure = Unavailable("systemd is away")

    async def main() -> None:
        async with living(place, effects) as world:
            ruling = await world.check()
            await world.answer(ruling)
            assert await world.state(ruling) == "allowed"
        effects.failure = None
        for _ in range(2):
            async with living(place, effects) as world:
                await world.reached(ruling, "used")
                assert len(await world.told()) == 1
        assert effects.done == [PAYLOAD]

    place.run(main)


def test_what_nobody_answers_is_over_and_said(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(world: World) -> None:
        monkeypatch.setattr(limits, "APPROVAL_OPEN_S", 0.05)

        ruling = await world.check()

        await world.reached(ruling, "expired")
        assert "is over: nobody has answered in time" in (await world.told())[0]
        assert (await world.check()).say is Say.DENY

    run(place, body)


def test_as_much_is_asked_as_a_person_will_read(place: Place) -> None:
    async def body(world: World) -> None:
        said = [
            (await world.check(call=f"m/{number}", text=str(number))).say
            for number in range(limits.APPROVALS_PER_AGENT + 1)
        ]

        assert said == [Say.HOLD] * limits.APPROVALS_PER_AGENT + [Say.DENY]
        with pytest.raises(Refused, match="too large for anybody"):
            await world.check(call="m/large", text="x" * 100_000)

    run(place, body)


def test_table_is_shown_and_changed(place: Place) -> None:
    async def body(world: World) -> None:
        await world.person.call("SetGuard", name="berta", action="edit", answer="deny")
        await world.person.call("SetGuardApprovals", name="berta", approvals=2)
        await world.person.refused("SetGuard", "Refused", name="berta", action="fly", answer="deny")

        shown = await world.person.call("ShowGuard", name="berta")

        rows = {row["action"]: (row["counts"], row["agent"], row["installation"]) for row in shown["rows"]}
        assert (rows["edit"], rows["react"]) == (("deny", "deny", None), ("allow", None, None))
        assert shown["approvals"] == 2
        assert (await world.person.call("ShowGuard", name=None))["approvals"] == 1
        await world.person.call("SetGuard", name="berta", action="edit", answer=None)
        assert (await world.check(Action.EDIT)).say is Say.ALLOW

    run(place, body)
