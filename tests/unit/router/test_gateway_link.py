"""The router hands session listeners to the gateway: all of them, again after either of the two restarts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nanoclawd import asking, gateway_link, paths
from nanoclawd.asking import Request
from nanoclawd.budget import NO_LIMITS, Budget, Spent
from nanoclawd.errors import Unavailable
from nanoclawd.gateway.exchange import Exchange
from nanoclawd.gateway.holds import Holds
from nanoclawd.gateway.ledger import Ledger
from nanoclawd.gateway.trail import Trail
from nanoclawd.gateway.usage import Meter
from nanoclawd.gateway_link import GatewayLink
from nanoclawd.idl import read_interface
from nanoclawd.ids import AgentName, SessionName
from nanoclawd.policy import Decision, Policy, Rule, Rules, Unknown, decide, from_json
from nanoclawd.routes import UsageShape
from nanoclawd.server import Call, Method, Server, Service
from nanoclawd.settings import parse_settings
from nanoclawd.usage import Usage
from nanoclawd.wire import Json
from tests.support.varlink_peer import eventually

BERTA = AgentName("berta")
RULES = (Rule(host="pypi.org", methods=("GET",)),)


def policy_of(agent: AgentName) -> Policy:
    return Policy(rules=RULES)


async def take_over(life: str, records: Sequence[Json]) -> None:
    raise AssertionError("nobody asked for anything")


class NoUsage(Usage):
    """Nobody has a budget, or has spent anything."""

    def __init__(self) -> None:
        self.budget_of = lambda agent: NO_LIMITS

    async def spent_before(self, agent: AgentName, sessions: Collection[str], life: str) -> Json:
        return {"day": "2026-11-22", "tokens": 0, "microdollars": 0, "sessions": []}


class GatewayDouble:
    """The gateway's side of io.nanoclaw.Gateway: keeps what it is given."""

    def __init__(self) -> None:
        self.has: dict[str, int] = {}  #: inode of the listener by session
        self.policies: dict[str, Rules] = {}
        self.unknown: dict[str, Unknown] = {}
        self.holds = Holds(self._decide)
        self.told: Json | None = None  #: what it says of each request that waits
        self.trail = Trail()
        self.ledger = Ledger("life")
        self.budgets: list[Json] = []  #: as SetBudget() was called
        self.nonsense: Json | None = None  #: what it says of its records
        self.hang = asyncio.Event()
        self.hang.set()
        interface = read_interface(paths.INTERFACES / "io.nanoclaw.Gateway.varlink")
        handlers = {"Attach": self._attach, "Detach": self._detach, "Status": self._status}
        handlers |= {"SetPolicy": self._set_policy, "ReadRecords": self._read_records}
        handlers |= {"SetBudget": self._set_budget, "ReadUsage": self._read_usage, "GetLife": self._get_life}
        handlers |= {"ReadHolds": self._read_holds, "AnswerHold": self._answer_hold}
        methods = {name: Method(handler=handler) for name, handler in handlers.items()}
        self.service = Service(interface=interface, methods=methods)

    def put(self, status: int) -> None:
        """Record that a request has ended."""
        self.trail.add(BERTA, SessionName("s1"), Exchange(status=status))

    async def _get_life(self, call: Call) -> Json:
        return {"life": self.ledger.life}

    async def _set_budget(self, call: Call) -> Json:
        self.budgets.append(call.parameters)
        return {}

    async def _read_usage(self, call: Call) -> Json:
        return {"life": self.ledger.life, "sums": await self.ledger.read(call.parameters["after"])}

    def _decide(self, request: Request) -> Decision:
        return decide(self.policies[request.agent], request.ask, self.unknown[request.agent])

    async def _set_policy(self, call: Call) -> Json:
        agent = call.parameters["agent"]
        assert agent in [told["agent"] for told in self.budgets], "the budget comes first"
        self.policies[agent] = tuple(map(from_json, call.parameters["rules"]))
        self.unknown[agent] = Unknown(call.parameters["unknown"])
        self.holds.decide_again()
        return {}

    async def _attach(self, call: Call) -> Json:
        assert call.parameters["agent"] in self.policies, "the policy comes first"
        await self.hang.wait()
        fd = call.connection.take_fd()
        assert fd is not None
        self.has[call.parameters["session"]] = os.fstat(fd).st_ino
        os.close(fd)
        return {}

    async def _read_records(self, call: Call) -> Json:
        if self.nonsense is not None:
            return self.nonsense
        return {"life": self.trail.life, "records": await self.trail.read(call.parameters["after"])}

    async def _read_holds(self, call: Call) -> Json:
        new, gone = await self.holds.read(call.parameters["known"])
        holds = [
            {"id": h.id, "sha256": h.sha256, "request": self.told or asking.to_json(h.request)} for h in new
        ]
        return {"holds": holds, "gone": gone}

    async def _answer_hold(self, call: Call) -> Json:
        told = call.parameters
        if told["answer"] == "pending":
            return {"taken": self.holds.note_pending(told["id"], told["sha256"], told["message"])}
        allowed = told["answer"] == "allowed"
        taken = self.holds.answer(told["id"], told["sha256"], allowed=allowed, message=told["message"])
        return {"taken": taken}

    async def _detach(self, call: Call) -> Json:
        del self.has[call.parameters["session"]]
        return {}

    async def _status(self, call: Call) -> Json:
        sessions = [f"berta/{name}" for name in self.has]
        return {"version": "", "sessions": sessions, "routes": [], "sandbox": []}

    @asynccontextmanager
    async def served(self, *, again: bool = False) -> AsyncIterator[None]:
        """Listen; `again`: this is still the one that listened before."""
        path = paths.gateway_socket()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if not again:
            self.has.clear()
            self.policies.clear()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            serving = asyncio.create_task(Server(self.service, listener, max_fds=1).run())
            try:
                yield
                assert not serving.done(), serving.exception()
            finally:
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)


@asynccontextmanager
async def running(link: GatewayLink, *, left: bool = False) -> AsyncIterator[None]:
    task = asyncio.create_task(link.run(left=left))
    try:
        yield
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(gateway_link, "_RETRY_S", 0.001)


def test_gateway_has_what_lives_also_after_its_restart() -> None:
    async def run() -> None:
        gateway, link = GatewayDouble(), GatewayLink(policy_of, take_over, NoUsage())
        with contextlib.ExitStack() as stack:
            listeners = {str(n): stack.enter_context(socket.socket(socket.AF_UNIX)) for n in range(5)}
            inodes = {name: os.fstat(sock.fileno()).st_ino for name, sock in listeners.items()}
            async with running(link):
                for name, listener in listeners.items():  # before there is a gateway
                    link.attach(BERTA, SessionName(name), listener)
                for _ in range(2):
                    async with gateway.served():
                        await eventually(lambda: gateway.has == inodes)
                async with gateway.served():
                    link.detach(BERTA, SessionName("3"))
                    del inodes["3"]
                    await eventually(lambda: gateway.has == inodes)
                    link.detach(BERTA, SessionName("0"))
                    link.attach(BERTA, SessionName("0"), listeners["3"])  # the session's next life
                    inodes["0"] = os.fstat(listeners["3"].fileno()).st_ino
                    await eventually(lambda: gateway.has == inodes)

    asyncio.run(run())


@pytest.mark.parametrize("adopted", [[], ["1"]])
def test_gateway_keeps_nothing_that_ended_without_a_router(adopted: list[str]) -> None:
    async def run() -> None:
        gateway, link, next_link = (
            GatewayDouble(),
            GatewayLink(policy_of, take_over, NoUsage()),
            GatewayLink(policy_of, take_over, NoUsage()),
        )
        with contextlib.ExitStack() as stack:
            listeners = {str(n): stack.enter_context(socket.socket(socket.AF_UNIX)) for n in range(3)}
            async with gateway.served():
                async with running(link):
                    for name, listener in listeners.items():
                        link.attach(BERTA, SessionName(name), listener)
                    await eventually(lambda: sorted(gateway.has) == [*listeners])
                for name in adopted:
                    next_link.attach(BERTA, SessionName(name), listeners[name])
                async with running(next_link, left=True):
                    await eventually(lambda: [*gateway.has] == adopted)

    asyncio.run(run())


def test_session_that_ends_while_others_are_handed_over_disturbs_none(
    capfd: pytest.CaptureFixture[str],
) -> None:
    async def run() -> None:
        gateway, link = GatewayDouble(), GatewayLink(policy_of, take_over, NoUsage())
        gateway.hang.clear()
        listeners = {name: socket.socket(socket.AF_UNIX) for name in "abc"}
        async with gateway.served(), running(link):
            for name, listener in listeners.items():
                link.attach(BERTA, SessionName(name), listener)
            for _ in range(20):
                await asyncio.sleep(0)
            link.detach(BERTA, SessionName("b"))
            listeners["b"].close()
            gateway.hang.set()
            await eventually(lambda: sorted(gateway.has) == ["a", "c"])
        for listener in listeners.values():
            listener.close()

    asyncio.run(run())
    assert "gateway-away" not in capfd.readouterr().err


def test_gateway_that_does_not_answer_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    async def run() -> None:
        monkeypatch.setattr(gateway_link, "_ANSWER_S", 0.02)
        gateway, link = GatewayDouble(), GatewayLink(policy_of, take_over, NoUsage())
        gateway.hang.clear()
        with socket.socket(socket.AF_UNIX) as listener:
            async with gateway.served(), running(link):
                link.attach(BERTA, SessionName("a"), listener)
                await eventually(lambda: "did not answer" in capfd.readouterr().err)
                gateway.hang.set()
                await eventually(lambda: list(gateway.has) == ["a"])

    asyncio.run(run())


@pytest.mark.parametrize(
    "nonsense",
    [
        {},
        {"life": "x", "records": []},
        {"life": "x", "records": [{"number": "1"}]},
        {"life": 1, "records": []},
    ],
)
def test_gateway_that_tells_nonsense_of_what_it_decides_still_gets_its_sessions(
    capfd: pytest.CaptureFixture[str], nonsense: Json
) -> None:
    told = []

    def tell() -> str:
        told.append(capfd.readouterr().err)
        return "".join(told)

    async def run() -> None:
        gateway, link = GatewayDouble(), GatewayLink(policy_of, take_over, NoUsage())
        gateway.nonsense = nonsense
        with socket.socket(socket.AF_UNIX) as listener:
            async with gateway.served(), running(link):
                link.attach(BERTA, SessionName("a"), listener)
                await eventually(lambda: list(gateway.has) == ["a"])
                await eventually(lambda: "records-not-read" in tell())
        assert "gateway-away" not in tell()

    asyncio.run(run())


def test_status_of_a_gateway_that_is_away() -> None:
    with pytest.raises(Unavailable, match="cannot connect"):
        asyncio.run(GatewayLink(policy_of, take_over, NoUsage()).status())


def test_policy_that_changes_is_in_force_when_refresh_returns() -> None:
    async def run() -> None:
        rules: Rules = RULES
        gateway, link = GatewayDouble(), GatewayLink(lambda _: Policy(rules=rules), take_over, NoUsage())
        with socket.socket(socket.AF_UNIX) as listener:
            async with gateway.served(), running(link):
                link.attach(BERTA, SessionName("a"), listener)
                await link.refresh()
                assert gateway.policies == {"berta": RULES} and list(gateway.has) == ["a"]
                for rules in ((), (Rule(route="x", deny=True), *RULES)):
                    await link.refresh()
                    assert gateway.policies == {"berta": rules}

    asyncio.run(run())


def test_refresh_does_not_wait_for_a_gateway_that_nobody_needs() -> None:
    asyncio.run(GatewayLink(policy_of, take_over, NoUsage()).refresh())


def test_refresh_tells_of_a_gateway_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        monkeypatch.setattr(gateway_link, "_ANSWER_S", 0.02)
        link = GatewayLink(policy_of, take_over, NoUsage())
        with socket.socket(socket.AF_UNIX) as listener:
            async with running(link):
                link.attach(BERTA, SessionName("a"), listener)
                with pytest.raises(Unavailable, match="did not take"):
                    await link.refresh()

    asyncio.run(run())


class Book(NoUsage):
    """What was asked and told, for one test."""

    def __init__(self) -> None:
        self.limit = Budget(money_per_session=7)
        self.budget_of = lambda agent: self.limit
        self.stored: list[tuple[str, Json]] = []

    async def spent_before(self, agent: AgentName, sessions: Collection[str], life: str) -> Json:
        spent = [{"session": name, "tokens": 1, "microdollars": 2} for name in sorted(sessions)]
        return {"day": "2026-11-22", "tokens": 3, "microdollars": 4, "sessions": spent}

    async def take_over(self, life: str, sums: Sequence[Json]) -> None:
        self.stored += [(life, each) for each in sums]


def test_budget_is_told_before_sessions_and_again_when_it_or_they_change() -> None:
    async def run() -> None:
        gateway, book = GatewayDouble(), Book()
        link = GatewayLink(policy_of, take_over, book)
        with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as other:
            async with gateway.served(), running(link):
                link.attach(BERTA, SessionName("a"), one)
                await link.refresh()
                await link.refresh()
                link.attach(BERTA, SessionName("b"), other)
                await link.refresh()
                book.limit = Budget(money_per_day=9)
                await link.refresh()
            told = [
                (each["budget"]["moneyPerSession"], [s["session"] for s in each["sessions"]])
                for each in gateway.budgets
            ]
            assert told == [(7, ["a"]), (7, ["a", "b"]), (None, [])]
            assert gateway.budgets[0]["tokens"] == 3 and gateway.budgets[-1]["budget"]["moneyPerDay"] == 9

    asyncio.run(run())


def test_what_was_spent_is_stored_again_by_a_next_router() -> None:
    async def run() -> None:
        gateway, session = GatewayDouble(), SessionName("a")
        gateway.ledger.set_budget(BERTA, NO_LIMITS, "2026-11-22", Spent(), {})
        meter = Meter(UsageShape.ANTHROPIC, size_bytes=1)
        meter.feed(b'{"model": "m", "usage": {"input_tokens": 5}}')
        async with gateway.ledger.call(BERTA, session, meter, parse_settings("").prices):
            pass
        with socket.socket(socket.AF_UNIX) as listener:
            async with gateway.served():
                for _ in range(2):
                    book = Book()
                    link = GatewayLink(policy_of, take_over, book)
                    async with running(link):
                        link.attach(BERTA, session, listener)
                        await eventually(lambda book=book: len(book.stored) == 1)
                    assert [(life, each["input"]) for life, each in book.stored] == [("life", 5)]

    asyncio.run(run())
