"""A budget at the gateway: what is counted, what is refused, what waits, and what the router is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from nanoclawd import budget, policy
from nanoclawd.budget import Budget, Spent
from nanoclawd.gateway import limits
from nanoclawd.gateway.ledger import OTHERS, Ledger, OverBudget
from nanoclawd.gateway.usage import OUTPUT_TOKENS, Meter
from nanoclawd.ids import AgentName, SessionName
from nanoclawd.policy import Denied
from nanoclawd.prices import Price, Prices
from nanoclawd.routes import UsageShape
from nanoclawd.wire import Json
from tests.support.varlink_peer import eventually
from tests.unit.gateway.harness import AGENT, SESSION, bench, post, read_request

MODEL = "claude-sonnet-5-5"  # 2 and 10 dollars
BODY = json.dumps({"messages": ["x" * 2_000], "model": MODEL, "max_tokens": 200}).encode()
PLAIN_COST = 1_000 * 2 + 200 * 10  # of the answer below, in millionths
ANSWER = json.dumps({"model": MODEL, "usage": {"input_tokens": 1_000, "output_tokens": 200}}).encode()
DAY = "2026-11-22"


@pytest.fixture(autouse=True)
def day(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calendar."""
    day = [DAY]
    monkeypatch.setattr(budget, "today", lambda: day[0])
    return day


def run(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 30))


async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        await read_request(reader)
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        writer.write(head % len(ANSWER) + ANSWER)


async def told(ledger: Ledger, after: int = 0) -> list[Json]:
    async with asyncio.timeout(5):
        return await ledger.read(after)


def test_what_a_call_costs_is_counted_and_told_whole(
    directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async def body() -> None:
        async with bench(directory, answers) as b:
            for _ in range(3):
                assert (await b.ask(post(BODY))).status == 200
            await eventually(lambda: b.gateway.ledger._number == 3)
            (total,) = await told(b.gateway.ledger)
            assert [total] == await told(b.gateway.ledger)

        shown = {
            "input": 3_000,
            "output": 600,
            "cacheWrite": 0,
            "cacheRead": 0,
            "estimated": 0,
            "unpriced": 0,
        }
        assert total == shown | {
            "number": 3,
            "day": DAY,
            "agent": AGENT,
            "session": SESSION,
            "model": MODEL,
            "calls": 3,
            "microdollars": 3 * PLAIN_COST,
        }

    run(body)
    line = next(line for line in capfd.readouterr().err.splitlines() if "request:" in line)
    assert f"model={MODEL} input_tokens=1000 output_tokens=200" in line and "microdollars=4000" in line


def test_a_budget_that_is_used_up_refuses_before_anything_leaves(
    directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async def body() -> None:
        limit = Budget(money_per_day=2 * PLAIN_COST)
        async with bench(directory, answers, budget=limit) as b:
            replies = [await b.ask(post(BODY)) for _ in range(7)]
            assert len(b.connections) == 1  # kept between the two calls
            records = await b.gateway.trail.read(0)
            # What has nothing to do with models goes on.
            counted = await b.ask(post(BODY, path=b"/anthropic/v1/messages/count_tokens"))
            assert counted.status == 200

        assert [reply.status for reply in replies] == [200, 200, *[402] * 5]
        assert replies[2].error["type"] == "budget_error"
        assert (
            replies[2]
            .error["message"]
            .startswith("The budget of 'berta' is used up: $0.008 of $0.008 spent")
        )
        reasons = [record["reason"] for record in records]
        assert reasons == ["", "", "budget-money_per_day"]  # one row, however many are refused

    run(body)
    assert capfd.readouterr().err.count("reason=budget-money_per_day") == 1


def test_a_raised_budget_counts_at_once_and_so_does_a_new_day(directory: Path, day: list[str]) -> None:
    async def body() -> None:
        async with bench(directory, answers, budget=Budget(money_per_day=1)) as b:
            ledger = b.gateway.ledger

            async def statuses() -> list[int]:
                return [(await b.ask(post(BODY))).status for _ in range(2)]

            assert await statuses() == [200, 402]
            ledger.set_budget(AGENT, Budget(money_per_day=PLAIN_COST + 1), DAY, Spent(), {})
            assert await statuses() == [200, 402]
            day[0] = "2026-11-23"
            assert await statuses() == [200, 200]  # the second would be the first over it
            assert await statuses() == [402, 402]
            sums = await told(ledger)

        assert [(s["day"], s["calls"]) for s in sums] == [(DAY, 2), ("2026-11-23", 2)]

    run(body)


def test_what_was_spent_before_this_life_counts(directory: Path, day: list[str]) -> None:
    async def body() -> None:
        async with bench(directory, answers, budget=Budget()) as b:
            ledger, limit = b.gateway.ledger, Budget(tokens_per_day=5_000, tokens_per_session=9_000)
            ledger.set_budget(AGENT, limit, DAY, Spent(5_000, 0), {})
            assert (await b.ask(post(BODY))).status == 402
            day[0] = "2026-11-23"
            assert (await b.ask(post(BODY))).status == 200
            ledger.set_budget(AGENT, limit, DAY, Spent(0, 0), {SESSION: Spent(9_000, 0)})
            reply = await b.ask(post(BODY))
            assert reply.status == 402 and "tokens used in this session" in reply.error["message"]

    run(body)


def test_requests_a_minute_are_refused_with_a_time(directory: Path) -> None:
    async def body() -> None:
        async with bench(directory, answers, budget=Budget(requests_per_minute=2)) as b:
            replies = [await b.ask(post(BODY)) for _ in range(3)]

        assert [reply.status for reply in replies] == [200, 200, 429]
        assert 20 <= int(replies[2].header(b"retry-after") or b"0") <= 30

    run(body)


def test_an_agent_of_whom_no_budget_was_told_may_not_ask_models(directory: Path) -> None:
    async def body() -> None:
        async with bench(directory, answers) as b:
            b.gateway.ledger._accounts.clear()
            assert (await b.ask(post(BODY))).status == 503

    run(body)


# --- at once ----------------------------------------------------------------------------------------


def test_many_at_once_exceed_a_budget_by_one_call_at_most(directory: Path) -> None:
    arrived: list[int] = []

    async def body() -> None:
        go = asyncio.Event()

        async def together(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            """Answer as soon as there are as many at once as the budget has room for."""
            await read_request(reader)
            arrived.append(1)
            if len(arrived) == 3:
                go.set()
            await go.wait()
            head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            writer.write(head % len(ANSWER) + ANSWER)

        async with bench(directory, together, budget=Budget(money_per_day=3 * PLAIN_COST - 1)) as b:
            replies = await asyncio.gather(*(b.ask(post(BODY)) for _ in range(12)))
            (total,) = await told(b.gateway.ledger)

        assert sorted(reply.status for reply in replies) == [200] * 3 + [402] * 9
        assert total["microdollars"] == 3 * PLAIN_COST

    run(body)
    assert len(arrived) == 3


def test_without_a_budget_nobody_waits(directory: Path) -> None:
    arrived: list[int] = []

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        arrived.append(1)
        await reader.read()

    async def body() -> None:
        async with bench(directory, hold) as b:
            asking = [asyncio.ensure_future(b.ask(post(BODY))) for _ in range(8)]
            await eventually(lambda: len(arrived) == 8)
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

    run(body)


# --- what breaks off ----------------------------------------------------------------------------------

START = {
    "type": "message_start",
    "message": {"model": MODEL, "usage": {"input_tokens": 700, "output_tokens": 1}},
}


async def streams(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Begin an answer, and never end it."""
    await read_request(reader)
    data = b"data: %s\n\n" % json.dumps(START).encode()
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))
    await reader.read()


def test_who_hangs_up_early_pays_for_what_was_asked(directory: Path) -> None:
    async def body() -> None:
        go = asyncio.Event()

        async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await go.wait()
            await streams(reader, writer)

        async with bench(directory, late, budget=Budget(money_per_day=10**9)) as b:
            _, writer = await b.connect()
            writer.write(post(BODY))
            await eventually(lambda: b.connections)
            writer.close()
            go.set()  # only now the endpoint tells
            (total,) = await told(b.gateway.ledger)

        assert (total["calls"], total["estimated"], total["input"], total["model"]) == (1, 1, 700, MODEL)
        assert 1 <= total["output"] <= 200

    run(body)


def test_an_endpoint_that_dies_leaves_an_estimate(directory: Path) -> None:
    async def dies(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)

    async def body() -> None:
        async with bench(directory, dies, budget=Budget(money_per_day=10**9)) as b:
            assert (await b.ask(post(BODY))).status == 502
            (total,) = await told(b.gateway.ledger)

        assert (total["estimated"], total["input"], total["output"]) == (1, -(-len(BODY) // 2), 200)

    run(body)


def test_what_never_left_costs_nothing(directory: Path) -> None:
    async def body() -> None:
        async with bench(directory, None, budget=Budget(money_per_day=10**9)) as b:
            assert (await b.ask(post(BODY))).status == 502
            assert b.gateway.ledger._sums == {}

    run(body)


def test_a_route_that_tells_what_it_costs_is_metered(
    directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    used = {"prompt_tokens": 30, "completion_tokens": 12}

    async def chat(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, headers, _ = await read_request(reader)
        assert dict(headers)[b"accept-encoding"] == b"identity"
        answer = json.dumps({"model": "local", "usage": used}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(answer), answer))

    async def body() -> None:
        route = '[[routes]]\nname = "chat"\nendpoint = "http://127.0.0.1:PORT"\nmethods = ["POST"]\n'
        route += 'usage = "openai"\n'
        rules = (policy.Rule(route="chat"),)
        async with bench(directory, chat, settings=route, rules=rules) as b:
            request = post(b"{}", path=b"/r/chat/v1/chat/completions", headers=b"Accept-Encoding: gzip\r\n")
            for _ in range(2):
                assert (await b.ask(request)).status == 200
            await eventually(lambda: b.gateway.ledger._number == 2)
            (total,) = await told(b.gateway.ledger)

        assert (total["model"], total["input"], total["output"], total["unpriced"]) == ("local", 60, 24, 2)
        assert total["microdollars"] > 0

    run(body)
    assert (
        capfd.readouterr().err.count("model-without-price: it counts as the dearest") == 1
    )  # for two calls


# --- the ledger alone ----------------------------------------------------------------------------------

PRICES = Prices({"m*": Price(1_000_000, 1_000_000, 0, 0)})


def made(tokens: int = 10, model: str = "m") -> Meter:
    meter = Meter(UsageShape.ANTHROPIC, size_bytes=2)
    meter.ask(b"{}")
    meter.answer(200, b"application/json")
    meter.feed(json.dumps({"model": model, "usage": {"input_tokens": tokens}}).encode())
    return meter


async def spend(ledger: Ledger, session: str = "s1", *, tokens: int = 10, model: str = "m") -> None:
    async with ledger.call(AGENT, SessionName(session), made(tokens, model), PRICES):
        pass


def limited(limit: Budget = budget.NO_LIMITS) -> Ledger:
    ledger = Ledger("life")
    ledger.set_budget(AGENT, limit, DAY, Spent(), {})
    return ledger


def test_a_session_has_a_budget_of_its_own() -> None:
    async def body() -> None:
        ledger = limited(Budget(tokens_per_session=15))
        for session in ("s1", "s1", "s2"):
            await spend(ledger, session)
        with pytest.raises(OverBudget):
            await spend(ledger, "s1")
        await spend(ledger, "s2")

    run(body)


def test_only_what_has_changed_is_told_and_old_days_go_once_they_are_stored(day: list[str]) -> None:
    async def body() -> None:
        ledger = limited()
        await spend(ledger, "s1")
        await spend(ledger, "s2")
        first = await told(ledger)
        await spend(ledger, "s1")
        assert [(s["session"], s["calls"]) for s in await told(ledger, first[-1]["number"])] == [("s1", 2)]
        day[0] = "2026-11-23"
        await spend(ledger, "s1")
        # A router that begins anew hears of what is not known to be on disk.
        assert [(s["day"], s["session"]) for s in await told(ledger)] == [
            (DAY, "s1"),
            ("2026-11-23", "s1"),
        ]

    run(body)


def test_names_of_models_cannot_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MODELS", 3)

    async def body() -> None:
        ledger = limited()
        for number in range(20):
            await spend(ledger, model=f"m{number}")
        sums = {s["model"]: s["calls"] for s in await told(ledger)}

        assert sums == {"m0": 1, "m1": 1, "m2": 1, OTHERS: 17}

    run(body)


def test_who_waits_for_others_is_refused_when_they_have_spent_it_all() -> None:
    async def body() -> None:
        ledger = limited(Budget(tokens_per_day=50))
        outcomes: list[Any] = []

        async def second() -> None:
            try:
                await spend(ledger)
                outcomes.append("went")
            except Denied as exc:
                outcomes.append(exc.status)

        async with ledger.call(AGENT, SESSION, made(60), PRICES):
            waiting = asyncio.ensure_future(second())
            await asyncio.sleep(0)
            assert not waiting.done()  # the first may use as much as any answer has
            assert OUTPUT_TOKENS > 50
        await waiting

        assert outcomes == [402]

    run(body)


def test_the_last_sums_are_handed_over_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        ledger = limited()
        await spend(ledger)
        ending = asyncio.ensure_future(ledger.hand_over())
        (total,) = await told(ledger)
        assert not ending.done()
        reading = asyncio.ensure_future(ledger.read(total["number"]))
        await ending
        reading.cancel()
        monkeypatch.setattr(limits, "HAND_OVER_S", 0.01)
        await spend(ledger)
        await ledger.hand_over()  # nobody comes

    run(body)


def test_another_agent_is_not_bounded() -> None:
    async def body() -> None:
        ledger = limited(Budget(tokens_per_day=1))
        await spend(ledger)
        emil = AgentName("emil")
        ledger.set_budget(emil, Budget(tokens_per_day=1), DAY, Spent(), {})
        async with ledger.call(emil, SESSION, made(), PRICES):
            pass
        with pytest.raises(OverBudget):
            await spend(ledger)

    run(body)
