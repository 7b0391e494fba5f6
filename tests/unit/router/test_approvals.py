"""What waits for a person's answer: asked once, bound to all of it, used once, remembered, expired."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from nanoclawd import asking, gateway_link, limits, people, retention
from nanoclawd.approvals import Approvals
from nanoclawd.asking import Request
from nanoclawd.db import now_ms
from nanoclawd.gateway.holds import Hold
from nanoclawd.policy import Decision, Denied, Rule, Unknown, Way, to_json
from nanoclawd.wire import Json
from tests.support.router import Place, Router
from tests.support.varlink_peer import eventually
from tests.unit.router.test_gateway_link import GatewayDouble, running
from tests.unit.router.test_message_control import Operator, operating

HOST = "a.example"


class World:
    """A router, a gateway that asks it, and a person."""

    def __init__(self, router: Router, gateway: GatewayDouble, person: Operator, sessions: Json) -> None:
        self.router, self.gateway, self.person = router, gateway, person
        self.sessions = sessions  #: name of the session, by agent

    def request(self, agent: str = "berta", **more: Any) -> Request:
        plain = {"way": Way.PLAIN, "method": "GET", "host": HOST, "port": 80, "path": "/x", "target": "/x?y"}
        return Request(**{**plain, "agent": agent, "session": self.sessions[agent], **more})

    def tunnel(self, host: str = HOST) -> Request:
        name = self.sessions["berta"]
        return Request(agent="berta", session=name, way=Way.TUNNEL, method="CONNECT", host=host, port=443)

    def ask(self, request: Request, timeout_s: float = 30) -> asyncio.Task[Decision]:
        return asyncio.create_task(self.gateway.holds.wait(request, timeout_s))

    async def gone(self, request: Request) -> str:
        """Ask, and hang up as soon as a person is asked; returns the approval's id."""
        asked = self.ask(request)
        await self.pending(request)
        asked.cancel()
        await asyncio.wait([asked])
        await eventually(lambda: not self.router.holds.waits(request.sha256))
        return (await self.approvals())[-1]["id"]

    def hold(self, request: Request) -> Hold | None:
        return self.gateway.holds._holds.get(request.sha256)

    async def pending(self, request: Request) -> None:
        """Return when the gateway has been told which approval it is."""
        await eventually(lambda: (hold := self.hold(request)) and "stays open" in hold.pending)

    async def approvals(self, **wanted: str) -> list[Json]:
        replies = await self.person.stream("ListApprovals", **wanted)
        return [reply["approval"] for reply in replies if reply["approval"]]

    async def waiting(self) -> Json:
        (approval,) = await self.approvals(state="pending")
        return approval

    async def answer(self, id: str, answer: str = "allow", scope: str = "once", **more: Any) -> Json:
        shown = (await self.person.call("ShowApproval", id=id))["approval"]
        line = {"id": id, "sha256": shown["sha256"], "answer": answer, "scope": scope}
        return await self.person.call("AnswerApproval", **{**line, **more})

    async def refused(self, id: str, error: str, **more: Any) -> str:
        shown = {"sha256": "0" * 64}
        if error != "NotFound":
            shown = (await self.person.call("ShowApproval", id=id))["approval"]
        line = {"id": id, "sha256": shown["sha256"], "answer": "allow", "scope": "once", "seconds": None}
        found = await self.person.refused("AnswerApproval", error, **{**line, **more})
        return str(found["message"])

    async def audit(self) -> list[tuple[str, str]]:
        rows = [reply["row"] for reply in await self.person.stream("ListAudit") if reply["row"]]
        return [
            (row["event"].removeprefix("approval_"), json.loads(row["detail"]).get("scope", ""))
            for row in rows
        ]


@asynccontextmanager
async def living(place: Place, gateway: GatewayDouble, *agents: str) -> AsyncIterator[World]:
    """One life of a router, with a session of each agent."""
    async with (
        place.router() as router,
        operating(place, router) as person,
        gateway.served(again=bool(gateway.policies)),
        running(router.gateway, left=True),
    ):
        sessions = {}
        for agent in agents or ("berta",):
            config = place.registry.agents[agent]
            place.registry.agents[agent] = replace(config, unknown=Unknown.ASK)
            await router.deliver("hello", agent=agent, chat=f"chat of {agent}")
            (row,) = await router.db.read("list_sessions", agent=agent)
            sessions[agent] = row["name"]
        await router.settled()
        await router.gateway.refresh()
        task = asyncio.create_task(router.approvals.run())
        try:
            yield World(router, gateway, person, sessions)
        finally:
            task.cancel()
            await asyncio.wait([task])


def run(place: Place, body: Callable[[World], Awaitable[None]], *agents: str) -> None:
    for agent in agents:
        place.registry.add(agent)

    async def main() -> None:
        async with living(place, GatewayDouble(), *agents) as world:
            await body(world)

    place.run(main)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_link, "_RETRY_S", 0.001)


def test_request_is_asked_about_once_and_its_chat_is_told(place: Place) -> None:
    async def body(world: World) -> None:
        adapter = await world.router.attach("chat of berta")
        await adapter.reply()
        request = world.request(method="POST", body=base64.b64encode(b"hello").decode())
        asked = [world.ask(request) for _ in range(2)]
        await world.pending(request)

        approval = await world.waiting()
        shown = await world.person.call("ShowApproval", id=approval["id"][:4])
        assert approval["request"]["url"] == "http://a.example/x?y"
        assert (approval["request"]["bodyBytes"], approval["sha256"]) == (5, request.sha256)
        assert (approval["chat"], approval["session"]) == ("chat of berta", world.sessions["berta"])
        assert "No rule" in shown["why"]
        assert len(shown["choices"]) == 6
        assert "POST of /x and all below it at http://a.example:80" in shown["choices"][1]["what"]
        line = "'berta' wants to reach something. It waits for somebody who may answer it, as approval {}."
        assert await adapter.reply() == line.format(approval["id"])
        assert await world.audit() == [("asked", "")]
        for each in asked:
            each.cancel()
        await asyncio.wait(asked)

    run(place, body)


def test_what_was_allowed_once_goes_once(place: Place) -> None:
    async def body(world: World) -> None:
        request = world.request()
        asked = world.ask(request)
        await world.pending(request)
        id = (await world.waiting())["id"]

        reply = await world.answer(id)

        assert reply["sent"]
        assert (reply["approval"]["state"], reply["approval"]["scope"]) == ("used", "once")
        assert f"(uid {os.getuid()})" in reply["approval"]["decidedBy"]
        assert ((await asked).allowed, (await asked).reason) == (True, "approved")
        assert "answered by" in await world.refused(id, "Refused")
        again = await world.gone(request)
        assert again != id
        assert await world.audit() == [("asked", ""), ("allowed", "once"), ("used", ""), ("asked", "")]

    run(place, body)


def test_what_was_allowed_later_waits_for_the_very_same_request(place: Place) -> None:
    async def body(world: World) -> None:
        request = world.request(body="aGVsbG8=", method="POST")
        id = await world.gone(request)
        assert not (await world.answer(id))["sent"]

        others = [
            {"body": "aGVsbG9v"},
            {"path": "/y", "target": "/y?y"},
            {"target": "/x?z"},
            {"method": "PUT"},
            {"headers": (("x-more", "1"),)},
            {"port": 81},
            {"session": "terminal_9"},
            {"agent": "emil"},
        ]
        for other in others:
            asked = world.ask(replace(request, **other), 0.2)
            with pytest.raises(Denied):
                await asked
        assert (await world.approvals(state="allowed"))[0]["id"] == id

        assert (await world.ask(request)).allowed
        assert [a["id"] for a in await world.approvals(state="used")] == [id]
        with pytest.raises(Denied, match="stays open"):
            await world.ask(request, 0.2)

    run(place, body, "berta", "emil")


def test_approval_of_one_agent_is_none_of_another(place: Place) -> None:
    async def body(world: World) -> None:
        id = await world.gone(world.request())
        await world.answer(id, scope="for", seconds=60)
        assert [rule.until > 0 for rule in world.router.approvals.policy("berta").rules] == [False, True]  # type: ignore[arg-type]
        with pytest.raises(Denied, match="stays open"):
            await world.ask(world.request("emil"), 0.2)

    run(place, body, "berta", "emil")


def test_for_a_while_is_a_rule_with_an_end_that_a_restart_keeps(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = GatewayDouble()

    async def main() -> None:
        async with living(place, gateway) as world:
            request = world.request(target="/x?y", path="/x")
            asked = world.ask(request)
            await world.pending(request)
            reply = await world.answer((await world.waiting())["id"], scope="for", seconds=3600)
            assert reply["sent"] and (await asked).reason == "allowed"
            until = reply["approval"]["expiresAt"]
            rule = Rule(host=HOST, port=80, methods=("GET",), path="/x", until=until)
            assert gateway.policies["berta"] == (Rule(route="echo"), rule)
            policy = await world.person.call("ShowPolicy", name="berta")
            assert (policy["unknown"], policy["rules"][1]["until"]) == ("ask", until)
            line = {"name": "berta", "url": "http://a.example/x/z", "method": "GET"}
            assert (await world.person.call("TestPolicy", **line))["rule"] == 2
            line["url"] = "http://a.example/y"
            assert (await world.person.call("TestPolicy", **line))["reason"] == "ask"
        async with living(place, gateway) as world:
            await eventually(lambda: gateway.policies["berta"][1:] == (rule,))
            # The gateway itself looks at the time: no router need tell it.
            monkeypatch.setattr("nanoclawd.policy.time.time", lambda: until + 1)
            assert gateway._decide(request).reason == "ask"

    place.run(main)


def test_what_was_allowed_for_a_while_ends(place: Place) -> None:
    async def body(world: World) -> None:
        request = world.request()
        id = await world.gone(request)
        await world.answer(id, scope="for", seconds=1)
        assert world.gateway._decide(request).allowed

        await eventually(lambda: len(world.gateway.policies["berta"]) == 1)

        assert [a["state"] for a in await world.approvals()] == ["expired"]
        assert (await world.audit())[-1] == ("expired", "")
        assert await world.gone(request) != id

    run(place, body)


def test_always_is_a_rule_behind_all_others(place: Place) -> None:
    async def body(world: World) -> None:
        request, tunnel = world.request(), world.tunnel()
        asked = world.ask(request)
        await world.pending(request)
        reply = await world.answer((await world.waiting())["id"], scope="always")
        assert (reply["sent"], reply["rule"]) == (True, "allow a.example:80 GET /x")
        assert (await asked).number == 1
        await world.answer(await world.gone(tunnel), "deny", "always")

        rules = world.router.place.registry.agents["berta"].policy
        assert rules == (
            Rule(host=HOST, port=80, methods=("GET",), path="/x"),
            Rule(host=HOST, deny=True),
        )
        assert world.gateway._decide(request).allowed
        assert world.gateway._decide(tunnel).reason == "denied"
        events = [event for event, _ in await world.audit()]
        assert events == ["asked", "AddRule", "allowed", "asked", "AddRule", "denied"]

    run(place, body)


def test_denial_is_remembered_for_the_host_unless_it_is_for_once(place: Place) -> None:
    async def body(world: World) -> None:
        request = world.request()
        asked = world.ask(request)
        await world.pending(request)
        await world.answer((await world.waiting())["id"], "deny")
        assert "denied this" in (await asked).message
        asked = world.ask(request)
        await world.pending(request)

        await world.answer((await world.waiting())["id"], "deny", "for", seconds=3600)

        assert (await asked).reason == "denied"
        assert world.gateway._decide(world.request(path="/other", target="/other")).reason == "denied"
        assert world.gateway._decide(world.tunnel()).reason == "ask"  # another port
        assert world.gateway._decide(world.tunnel("b.example")).reason == "ask"
        assert await world.approvals(state="pending") == []

    run(place, body)


def test_answers_that_are_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(world: World) -> None:
        id = await world.gone(world.request())
        assert "no approval 'b0'" in await world.refused("b0", "NotFound")
        assert "no approval ''" in await world.refused("", "NotFound")
        assert "its hash differs" in await world.refused(id, "Refused", sha256="0" * 64)
        for wrong in ({"scope": "for"}, {"seconds": 3}, {"scope": "for", "seconds": 0}):
            await world.person.refused(
                "AnswerApproval",
                "Refused",
                **{"id": id, "sha256": (await world.waiting())["sha256"], "answer": "allow", "scope": "once"}
                | {"seconds": None, **wrong},
            )
        await world.router.place.registry.add_rule("berta", Rule(host=HOST, port=80, deny=True))
        assert "nothing to allow any more" in await world.refused(id, "Refused")
        assert [a["state"] for a in await world.approvals()] == ["pending"]

    run(place, body)


def test_row_that_somebody_wrote_anew_allows_nothing(place: Place) -> None:
    async def body(world: World) -> None:
        request = world.request()
        id = await world.gone(request)
        other = replace(request, host="evil.example").canonical
        world.router.db._writer.execute("UPDATE approval SET payload = ?", (other,))

        assert "its hash differs" in await world.refused(id, "Refused")
        assert (await world.person.call("ShowApproval", id=id))["approval"]["request"] is None

    run(place, body)


def test_nobody_answers_and_it_expires(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "APPROVAL_OPEN_S", 0.3)

    async def body(world: World) -> None:
        request, looked = world.request(), asyncio.Event()
        approvals = world.router.approvals
        tell = approvals.on_expiry
        monkeypatch.setattr(approvals, "on_expiry", lambda: (tell(), looked.set()))
        id = await world.gone(request)
        async with asyncio.timeout(30):
            while [a["state"] for a in await world.approvals()] != ["expired"]:
                await looked.wait()
                looked.clear()
        assert "has expired" in await world.refused(id, "Refused")
        assert await world.audit() == [("asked", ""), ("expired", "")]
        assert await world.gone(request) != id

    run(place, body)


def test_time_counts_though_nobody_has_noted_it(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(self: Approvals) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Approvals, "run", never)
    monkeypatch.setattr(limits, "APPROVAL_OPEN_S", 0.0)
    monkeypatch.setattr(limits, "APPROVAL_ONCE_S", 0.0)

    async def body(world: World) -> None:
        request = world.request()
        id = await world.gone(request)
        assert [a["state"] for a in await world.approvals()] == ["pending"]
        assert "has expired" in await world.refused(id, "Refused")

        monkeypatch.setattr(limits, "APPROVAL_OPEN_S", 60)
        id = await world.gone(request)
        await world.answer(id)  # allowed, and over at once
        with pytest.raises(Denied, match="stays open"):
            await world.ask(request, 0.2)

    run(place, body)


def test_restart_of_the_router_in_mid_hold_loses_and_allows_nothing(place: Place) -> None:
    gateway = GatewayDouble()

    async def main() -> None:
        async with living(place, gateway) as world:
            request = world.request()
            asked = world.ask(request)
            await world.pending(request)
            id = (await world.waiting())["id"]
        assert not asked.done()
        async with living(place, gateway) as world:
            await eventually(lambda: world.router.holds.waits(request.sha256))
            assert (await world.waiting())["id"] == id
            assert (await world.answer(id))["sent"]
            assert (await asked).allowed

    place.run(main)


def test_answer_that_the_router_could_not_tell_any_more_is_told_by_the_next(place: Place) -> None:
    gateway = GatewayDouble()

    async def main() -> None:
        async with living(place, gateway) as world:
            request = world.request()
            asked = world.ask(request)
            await world.pending(request)
            row = await world.router.approvals.find((await world.waiting())["id"])
            await world.router.approvals.answer(
                row["id"],
                row["sha256"],
                allow=True,
                scope="once",  # type: ignore[arg-type]
                until=now_ms() + 60_000,
                by=partial(people.answerer_here, by="ada"),
            )
        assert not asked.done()
        async with living(place, gateway) as world:
            assert (await asked).allowed
            assert [a["state"] for a in await world.approvals()] == ["used"]

    place.run(main)


def test_what_did_not_reach_the_gateway_is_used_up_and_not_sent_twice(place: Place) -> None:
    async def body(world: World) -> None:
        request = world.request()
        asked = world.ask(request, 1)
        await world.pending(request)
        id = (await world.waiting())["id"]
        world.gateway.holds.answer = lambda *_, **__: False  # type: ignore[method-assign]

        assert not (await world.answer(id))["sent"]

        with pytest.raises(Denied):
            await asked
        assert (await world.approvals())[0]["state"] == "used"
        assert await world.gone(request) != id

    run(place, body)


def test_flood_of_hosts_is_bounded_and_others_are_still_asked_about(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "APPROVALS_PER_AGENT", 10)

    async def body(world: World) -> None:
        adapter = await world.router.attach("chat of berta")
        await adapter.reply()
        for n in range(10):
            await world.gone(world.tunnel(f"h{n}.example"))
        refused = await world.ask(world.tunnel("one-more.example"))
        assert "10 requests of this agent" in refused.message and not refused.allowed
        await world.gone(world.request("emil"))

        assert len(await world.approvals(state="pending", agent="berta")) == 10
        rows = [row for row in await world.router.outbox() if row["key"].endswith(".ask")]
        assert [row["chat"] for row in rows].count("chat of berta") == limits.ASK_NOTICES_BURST
        assert [row["chat"] for row in rows].count("chat of emil") == 1

    run(place, body, "berta", "emil")


def test_agent_of_the_same_name_inherits_nothing(place: Place) -> None:
    async def body(world: World) -> None:
        request = world.request()
        await world.answer(await world.gone(request))
        await world.answer(await world.gone(world.tunnel()), "allow", "for", seconds=60)
        await world.answer(await world.gone(world.tunnel("b.example")), "deny", "for", seconds=60)
        await world.gone(world.tunnel("c.example"))

        await world.router.approvals.forget("berta")
        await world.router.gateway.refresh()

        assert world.gateway.policies["berta"] == (Rule(route="echo"),)
        assert [a["state"] for a in await world.approvals()] == ["expired", "expired", "denied", "expired"]
        with pytest.raises(Denied, match="stays open"):
            await world.ask(request, 0.2)

    run(place, body)


def test_answer_to_one_question_ends_others_that_it_answers(place: Place) -> None:
    async def body(world: World) -> None:
        for target in ("/x", "/x/y", "/z"):
            await world.gone(world.request(path=target, target=target))

        await world.answer((await world.approvals())[0]["id"], "allow", "for", seconds=60)
        assert [a["state"] for a in await world.approvals()] == ["allowed", "expired", "pending"]
        await world.answer((await world.waiting())["id"], "deny", "for", seconds=60)
        assert await world.approvals(state="pending") == []
        await world.gone(world.tunnel())
        await world.person.call("AddRule", name="berta", rule=to_json(Rule(host=HOST)))
        assert await world.approvals(state="pending") == []

    run(place, body)


@pytest.mark.parametrize(
    "nonsense",
    [
        {"sha256": "0" * 64},
        {"body": "not base64"},
        {"body": "a"},
        {"headers": [{"name": "x", "value": "\x00" * 20_000}]},
        {"way": "route"},
        {"session": "no such session"},
        {"agent": "nobody"},
        None,
    ],
)
def test_gateway_that_tells_nonsense_harms_only_itself(place: Place, nonsense: Json | None) -> None:
    async def body(world: World) -> None:
        told = {"id": "h1", "sha256": "", "request": asking.to_json(world.request())}
        if nonsense is not None:
            told["request"] |= {k: v for k, v in nonsense.items() if k != "sha256"}
            with contextlib.suppress(ValueError):
                told["sha256"] = asking.from_json(told["request"]).sha256
            told |= {k: v for k, v in nonsense.items() if k == "sha256"}

        taken = asyncio.Event()

        async def read(known: list[str]) -> tuple[list[Any], list[str]]:
            if known:
                taken.set()
                await asyncio.Event().wait()
            hold = SimpleNamespace(id="h1", sha256=told["sha256"], request=None)
            return ([hold], []) if nonsense is not None else ([], [])

        world.gateway.told = told["request"]
        world.gateway.holds.read = read  # type: ignore[assignment, method-assign]
        reading = asyncio.create_task(world.router.holds.run())
        try:
            await eventually(lambda: taken.is_set() or reading.done())
        finally:
            reading.cancel()
            await asyncio.wait([reading])
        assert await world.approvals() == []

    run(place, body)


def test_retention_takes_what_is_over(place: Place) -> None:
    async def body(world: World) -> None:
        await world.answer(await world.gone(world.tunnel("a.example")), "deny")
        await world.answer(await world.gone(world.tunnel("b.example")), "allow", "always")
        await world.answer(await world.gone(world.tunnel("c.example")), "allow", "for", seconds=60)
        await world.gone(world.tunnel("d.example"))

        await retention.prune(world.router.db, before=now_ms() - 1000)
        assert len(await world.approvals()) == 4
        await retention.prune(world.router.db, before=now_ms() + 1000)
        assert [a["state"] for a in await world.approvals()] == ["allowed", "pending"]

    run(place, body)
