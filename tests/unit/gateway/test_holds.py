"""Requests that wait for a person's answer: what they wait for, what is bound, and what bounds them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from nanoclawd import asking
from nanoclawd.gateway import limits
from nanoclawd.gateway.holds import Hold
from nanoclawd.ids import AgentName, SessionName
from nanoclawd.policy import Policy, Rule, Rules, Unknown
from tests.support.varlink_peer import eventually
from tests.unit.gateway.harness import (
    AGENT,
    HANDLER_PORT,
    MODEL_ONLY,
    OK,
    SESSION,
    Bench,
    Reply,
    bench,
    listen,
    read_reply,
    read_request,
)

NAME = "localhost"  # a name, about which a person may be asked; it leads to this host, see reachable()
Seen = list[tuple[str, list[tuple[bytes, bytes]], bytes]]


@pytest.fixture(autouse=True)
def reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was allowed may be connected to, though it is this host."""
    monkeypatch.setattr("nanoclawd.gateway.addresses.refusal", lambda address, named: None)


class World:
    """A gateway that asks about unknown hosts, and what its one server got."""

    def __init__(self, table: Bench, seen: Seen) -> None:
        self.table, self.seen = table, seen
        self.holds = table.gateway.holds

    def request(self, line: str = "GET", path: str = "/x", more: str = "", body: bytes = b"") -> bytes:
        host = f"{NAME}:{self.table.port}"
        length = f"Content-Length: {len(body)}\r\n" if body else ""
        return f"{line} http://{host}{path} HTTP/1.1\r\nHost: {host}\r\n{more}{length}\r\n".encode() + body

    def ask(self, *arguments: str, body: bytes = b"", **more: str) -> asyncio.Task[Reply]:
        return asyncio.create_task(self.table.ask(self.request(*arguments, body=body, **more)))

    async def told(self, number: int = 1) -> list[Hold]:
        """Return the holds that the router is told of, as soon as there are so many."""
        found: list[Hold] = []
        while len(found) < number:
            new, _ = await self.holds.read([hold.id for hold in found])
            found += new
        return found

    def answer(self, hold: Hold, *, allowed: bool = True) -> bool:
        return self.holds.answer(hold.id, hold.sha256, allowed=allowed, message="as said")


def run(
    directory: Path,
    body: Callable[[World], Awaitable[None]],
    *,
    rules: Rules = MODEL_ONLY,
    ask_seconds: int = 60,
) -> None:
    async def main() -> None:
        seen: Seen = []

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            seen.append(await read_request(reader))
            writer.write(OK)

        settings = f"ask_seconds = {ask_seconds}"
        async with bench(directory, handler, settings=settings, rules=rules, unknown=Unknown.ASK) as table:
            await body(World(table, seen))

    asyncio.run(main())


def test_request_waits_and_goes_on_when_it_is_allowed(directory: Path) -> None:
    async def body(world: World) -> None:
        asked = world.ask("POST", "/x?y=z", "X-Mine: 1\r\n", body=b"hello")
        (hold,) = await world.told()

        assert (hold.request.agent, hold.request.session) == (AGENT, SESSION)
        assert hold.request.url == f"http://{NAME}:{world.table.port}/x?y=z"
        assert hold.request.body_bytes == b"hello"
        assert ("x-mine", "1") in hold.request.headers
        assert not world.seen
        assert world.answer(hold)

        assert (await asked).status == 200
        ((line, headers, sent),) = world.seen
        assert (line, sent) == ("POST /x?y=z HTTP/1.1", b"hello")
        assert sorted(headers) == sorted(
            [(n.encode(), v.encode()) for n, v in hold.request.headers] + [(b"content-length", b"5")]
        )
        (record,) = await world.table.gateway.trail.read(0)
        assert (record["event"], record["rule"], record["status"]) == ("allowed", 0, 200)
        assert await world.holds.read([hold.id]) == ([], [hold.id])

    run(directory, body)


def test_tunnel_waits_and_what_is_said_in_it_is_not_seen(directory: Path) -> None:
    async def body(world: World) -> None:
        host = f"{NAME}:{world.table.port}"
        reader, writer = await world.table.connect()
        writer.write(f"CONNECT {host} HTTP/1.1\r\nHost: {host}\r\nX-Mine: 1\r\n\r\n".encode())
        (hold,) = await world.told()
        assert hold.request.url == host
        assert not hold.request.headers and not hold.request.body

        assert world.answer(hold)

        assert (await read_reply(reader)).status == 200
        writer.write(b"GET /within HTTP/1.1\r\n\r\n")
        assert (await read_reply(reader)).status == 200
        assert world.seen[0][0] == "GET /within HTTP/1.1"
        # A change of the policy that does not deny it leaves it alone; one that does ends it.

    run(directory, body)


def test_tunnel_that_was_allowed_once_ends_when_a_rule_denies_it(directory: Path) -> None:
    async def main() -> None:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(100):
                writer.write(data)

        async with bench(directory, handler, settings="ask_seconds = 60", unknown=Unknown.ASK) as table:
            world, host = World(table, []), f"{NAME}:{table.port}"
            reader, writer = await table.connect()
            writer.write(f"CONNECT {host} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            world.answer((await world.told())[0])
            assert (await read_reply(reader)).status == 200

            more = Policy(rules=(*MODEL_ONLY, Rule(host="other.example")), unknown=Unknown.ASK)
            table.gateway.set_policy(AGENT, more)
            writer.write(b"y")
            assert await reader.readexactly(1) == b"y"
            denies = Policy(rules=(*MODEL_ONLY, Rule(host=NAME, port=table.port, deny=True)))
            table.gateway.set_policy(AGENT, denies)
            assert await reader.read() == b""

    asyncio.run(main())


def test_denied_request_is_refused_with_the_words_of_the_answer(directory: Path) -> None:
    async def body(world: World) -> None:
        asked = world.ask()
        assert world.answer((await world.told())[0], allowed=False)

        reply = await asked
        assert (reply.status, reply.error["message"]) == (403, "as said")
        assert not world.seen

    run(directory, body)


def test_unanswered_request_is_refused_with_what_to_do(directory: Path) -> None:
    async def body(world: World) -> None:
        asked = world.ask()
        (hold,) = await world.told()
        assert world.holds.note_pending(hold.id, hold.sha256, "see approval a1")

        reply = await asked
        assert (reply.status, reply.error["message"]) == (403, "see approval a1")
        (record,) = await world.table.gateway.trail.read(0)
        assert (record["event"], record["reason"]) == ("denied", "not-answered")
        assert not world.answer(hold)
        assert "router could not be asked" in (await world.ask()).error["message"]
        assert not world.seen

    run(directory, body, ask_seconds=1)


def test_same_requests_share_a_hold_and_one_answer_is_for_one_of_them(directory: Path) -> None:
    async def body(world: World) -> None:
        asked = [world.ask() for _ in range(3)]
        await eventually(lambda: world.holds._places[AGENT] == 3)
        (hold,) = await world.told()
        await eventually(lambda: len(hold.waiters) == 3)

        assert world.answer(hold)

        replies = [await each for each in asked]
        assert sorted(reply.status for reply in replies) == [200, 403, 403]
        assert "used that up" in next(r for r in replies if r.status == 403).error["message"]
        assert len(world.seen) == 1

    run(directory, body)


def test_request_that_differs_in_anything_is_another(directory: Path) -> None:
    async def body(world: World) -> None:
        first, body = ("POST", "/x", "X-Mine: 1\r\n"), b"hello"
        others = [
            (("PUT", "/x", "X-Mine: 1\r\n"), b"hello"),
            (("POST", "/y", "X-Mine: 1\r\n"), b"hello"),
            (("POST", "/x?q", "X-Mine: 1\r\n"), b"hello"),
            (("POST", "/x", "X-Mine: 2\r\n"), b"hello"),
            (("POST", "/x", "X-Mine: 1\r\n"), b"hell0"),
        ]
        asked = [world.ask(*line, body=sent) for line, sent in [(first, body), *others]]
        holds = await world.told(6)

        assert len({hold.sha256 for hold in holds}) == 6
        (one,) = [h for h in holds if h.request.path == "/x" and h.request.body_bytes == body][:1]
        other = next(hold for hold in holds if hold is not one)
        assert not world.holds.answer(one.id, other.sha256, allowed=True, message="")
        assert not world.holds.answer("nonsense", one.sha256, allowed=True, message="")
        assert not world.seen
        for hold in holds:
            world.answer(hold, allowed=False)
        await asyncio.gather(*asked)

    run(directory, body)


@contextlib.asynccontextmanager
async def another_session(world: World, agent: str) -> AsyncIterator[Callable[[bytes], Awaitable[Reply]]]:
    path = world.table.path.with_name(f"{agent}.sock")
    gateway, name = world.table.gateway, AgentName(agent)
    gateway.set_policy(name, Policy(rules=MODEL_ONLY, unknown=Unknown.ASK))
    gateway.attach(name, SessionName("s9"), listen(path))

    async def ask(request: bytes) -> Reply:
        reader, writer = await asyncio.open_unix_connection(path)
        try:
            writer.write(request)
            return await read_reply(reader)
        finally:
            writer.close()
            await writer.wait_closed()

    yield ask


def test_flood_of_one_agent_is_bounded_and_others_still_wait(directory: Path) -> None:
    async def body(world: World) -> None:
        flood = [world.ask("GET", f"/{n}") for n in range(12)]
        await eventually(lambda: sum(each.done() for each in flood) == 12 - limits.HELD_PER_AGENT)
        refused = [each.result() for each in flood if each.done()]
        assert {reply.status for reply in refused} == {429}
        assert "no room for more" in refused[0].error["message"]

        async with another_session(world, "emil") as ask:
            asked = asyncio.create_task(ask(world.request()))  # type: ignore[arg-type]
            holds = await world.told(limits.HELD_PER_AGENT + 1)
            (emils,) = [hold for hold in holds if hold.request.agent == "emil"]
            assert world.answer(emils)
            assert (await asked).status == 200
        # The same of another agent is another request.
        assert emils.sha256 not in {hold.sha256 for hold in holds if hold.request.agent == AGENT}
        for hold in holds:
            world.answer(hold, allowed=False)
        await asyncio.gather(*flood)
        assert not world.holds._places

    run(directory, body)


def test_agent_that_hangs_up_waits_no_more(directory: Path) -> None:
    async def body(world: World) -> None:
        _, writer = await world.table.connect()
        writer.write(world.request())
        (hold,) = await world.told()

        writer.close()

        assert await world.holds.read([hold.id]) == ([], [hold.id])
        assert not world.answer(hold)
        (record,) = await world.table.gateway.trail.read(0)
        assert (record["event"], record["reason"]) == ("denied", "agent-hung-up")

    run(directory, body)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (Policy(rules=MODEL_ONLY), 403),
        (Policy(rules=(Rule(host=NAME, port=HANDLER_PORT, deny=True),), unknown=Unknown.ASK), 403),
        (Policy(rules=(Rule(host=NAME, port=HANDLER_PORT, path="/x"),), unknown=Unknown.ASK), 200),
        (Policy(), 403),
    ],
)
def test_rule_that_comes_meanwhile_decides(directory: Path, change: Policy, status: int) -> None:
    async def body(world: World) -> None:
        asked = world.ask()
        (hold,) = await world.told()
        rules = tuple(Rule(host=NAME, port=world.table.port, path=r.path, deny=r.deny) for r in change.rules)
        if change.rules == MODEL_ONLY:
            rules = MODEL_ONLY

        world.table.gateway.set_policy(AGENT, Policy(rules=rules, unknown=change.unknown))

        assert not world.answer(hold)
        assert (await asked).status == status

    run(directory, body)


def test_answer_that_comes_with_a_denial_allows_nothing(directory: Path) -> None:
    """As if the router's answer and a new policy crossed."""

    async def body(world: World) -> None:
        asked = world.ask()
        (hold,) = await world.told()
        world.table.gateway.allowances[AGENT].policy = Policy(rules=MODEL_ONLY)

        assert not world.answer(hold)

        assert (await asked).status == 403
        assert not world.seen

    run(directory, body)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET http://127.0.0.1/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 403),
        (b"CONNECT 169.254.169.254:80 HTTP/1.1\r\nHost: 169.254.169.254:80\r\n\r\n", 403),
        (b"CONNECT [::ffff:10.0.0.1]:80 HTTP/1.1\r\nHost: x\r\n\r\n", 403),
        (b"CONNECT 168.63.129.16:80 HTTP/1.1\r\nHost: x\r\n\r\n", 403),
        (b"GET http://denied.example/ HTTP/1.1\r\nHost: denied.example\r\n\r\n", 403),
        (b"CONNECT narrow.example:443 HTTP/1.1\r\nHost: narrow.example\r\n\r\n", 403),
        (b"GET /r/nothing/x HTTP/1.1\r\nHost: x\r\n\r\n", 403),
        (b"GET http://a.example/../x HTTP/1.1\r\nHost: a.example\r\n\r\n", 400),
        (b"GET http://a.example/%1b[2J HTTP/1.1\r\nHost: a.example\r\n\r\n", 400),
        (b"GET http://a.example/x HTTP/1.1\r\nHost: b.example\r\n\r\n", 400),
        (b"GET http://a.example/" + b"x" * 9000 + b" HTTP/1.1\r\nHost: a.example\r\n\r\n", 414),
        (
            b"POST http://a.example/x HTTP/1.1\r\nHost: a.example\r\n"
            b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc",
            400,
        ),
        (
            b"POST http://a.example/x HTTP/1.1\r\nHost: a.example\r\nContent-Length: 20000\r\n\r\n"
            + b"x" * 20000,
            413,
        ),
    ],
)
def test_what_nobody_is_asked_about(
    directory: Path, monkeypatch: pytest.MonkeyPatch, request_: bytes, status: int
) -> None:
    monkeypatch.undo()  # addresses are looked at
    rules = (
        Rule(host="denied.example", port=80, deny=True),
        Rule(host="narrow.example", methods=("GET",)),
        *MODEL_ONLY,
    )

    async def body(world: World) -> None:
        assert (await world.table.ask(request_)).status == status
        assert not world.holds._holds

    monkeypatch.setenv("XDG_CONFIG_HOME", str(directory / "config"))
    run(directory, body, rules=rules)


def test_largest_request_fits_into_what_the_router_is_told(directory: Path) -> None:
    async def body(world: World) -> None:
        long = "/" + "x" * 7000
        more = b"".join(b"X-%d: %s\r\n" % (n, b"\xff" * 1000) for n in range(8))
        host = f"{NAME}:{world.table.port}"
        sent = b"\xff" * asking.BODY_BYTES
        head = f"POST http://{host}{long} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(sent)}\r\n"
        asked = asyncio.create_task(world.table.ask(head.encode() + more + b"\r\n" + sent))
        (hold,) = await world.told()

        assert hold.request.body_bytes == sent
        assert len(hold.request.canonical) <= asking.REQUEST_CHARACTERS
        assert asking.parse(hold.request.canonical) == hold.request
        assert asking.from_json(asking.to_json(hold.request)) == hold.request
        world.answer(hold)
        assert (await asked).status == 200
        assert world.seen[0][2] == sent

    run(directory, body)


def test_connection_goes_on_after_an_answer(directory: Path) -> None:
    async def body(world: World) -> None:
        reader, writer = await world.table.connect()
        writer.write(world.request("POST", body=b"hello"))
        (hold,) = await world.told()
        writer.write(world.request("GET", "/second"))  # early, while the first one waits
        world.answer(hold, allowed=False)
        assert (await read_reply(reader)).status == 403
        (hold,) = await world.told()
        assert hold.request.path == "/second" and not hold.request.body
        world.answer(hold)
        assert (await read_reply(reader)).status == 200

    run(directory, body)


def test_gateway_that_ends_says_so_and_allows_nothing(directory: Path) -> None:
    async def body(world: World) -> None:
        host = f"{NAME}:{world.table.port}"
        tunnel = f"CONNECT {host} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        asked = [world.ask(), asyncio.create_task(world.table.ask(tunnel))]
        await world.told(2)

        await world.table.gateway.drain()

        for reply in await asyncio.gather(*asked):
            assert (reply.status, "ask again" in reply.error["message"]) == (403, True)
        assert not world.seen

    run(directory, body)
