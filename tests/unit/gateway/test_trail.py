"""What the router is told of requests: each, in sums where there are too many, and never in their way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from nanoclawd import credentials
from nanoclawd.gateway import limits
from nanoclawd.gateway.exchange import Exchange
from nanoclawd.gateway.trail import Trail
from nanoclawd.ids import AgentName, CredentialName
from nanoclawd.policy import Policy, Rule
from nanoclawd.wire import Json
from tests.support.varlink_peer import eventually
from tests.unit.gateway.harness import AGENT, HANDLER_PORT, KEY, SESSION, bench, post, read_reply
from tests.unit.gateway.test_proxy import echo, keep

DENIED = b"GET http://%s/%s HTTP/1.1\r\nHost: %s\r\n\r\n"


def run(body: Callable[[], object]) -> None:
    asyncio.run(body())  # type: ignore[arg-type]


async def newest(trail: Trail, after: int = 0) -> list[Json]:
    async with asyncio.timeout(10):
        return await trail.read(after)


def denied(host: bytes, path: bytes = b"") -> bytes:
    return DENIED % (host, path, host)


def failed(reason: str, target: str = "-") -> Exchange:
    return Exchange(target=target, status=403, reason=reason)


def test_what_became_of_a_request_is_told_without_its_query_and_body(directory: Path) -> None:
    async def body() -> None:
        credentials.write(CredentialName("anthropic"), KEY)
        rules = (Rule(host="a.example", port=80, deny=True), Rule(route="anthropic"))
        async with bench(directory, keep([]), rules=rules) as b:
            assert (await b.ask(post(b"secret", path=b"/anthropic/v1/messages?beta=true"))).status == 200
            assert (await b.ask(denied(b"b.example", b"way?x=secret"))).status == 403
            assert (await b.ask(denied(b"a.example"))).status == 403
            assert (await b.ask(b"GET secret HTTP/1.1\r\nHost: x\r\n\r\n")).status == 400
            records = await newest(b.gateway.trail)

        assert "secret" not in str(records) and "beta" not in str(records)
        assert [record["number"] for record in records] == [1, 2, 3, 4]
        assert {(r["agent"], r["session"], r["count"]) for r in records} == {(AGENT, SESSION, 1)}
        keys = ("event", "rule", "reason", "method", "route", "host", "path", "status", "credential")
        assert [tuple(record[key] for key in keys) for record in records] == [
            ("allowed", 2, "", "POST", "anthropic", "", "/v1/messages", 200, "anthropic"),
            ("denied", 0, "no-rule", "GET", "", "b.example:80", "/way", 403, ""),
            ("denied", 1, "denied", "GET", "", "a.example:80", "/", 403, ""),
            ("denied", 0, "target", "GET", "", "", "", 400, ""),
        ]
        assert records[0]["upBytes"] > 6 and records[0]["downBytes"] == 2

    run(body)


def test_a_tunnel_is_told_of_when_a_change_of_the_policy_ends_it(directory: Path) -> None:
    async def body() -> None:
        rules = (Rule(host="127.0.0.1", port=HANDLER_PORT),)
        async with bench(directory, echo, rules=rules) as b:
            reader, writer = await b.connect()
            writer.write(f"CONNECT 127.0.0.1:{b.port} HTTP/1.1\r\nHost: x\r\n\r\nhello".encode())
            await reader.readuntil(b"hello")
            b.gateway.set_policy(AGENT, Policy(rules=()))
            (record,) = await newest(b.gateway.trail)

        assert (record["event"], record["status"], record["reason"]) == ("allowed", 200, "policy-changed")
        assert record["downBytes"] == 5

    run(body)


def test_a_request_that_is_cut_off_without_an_answer_is_told_of(directory: Path) -> None:
    async def body() -> None:
        credentials.write(CredentialName("anthropic"), KEY)
        arrived = asyncio.Event()

        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)
            arrived.set()
            await reader.read()

        async with bench(directory, silent) as b:
            _, writer = await b.connect()
            writer.write(post())
            await arrived.wait()
            b.gateway.detach(AGENT, SESSION)
            (record,) = await newest(b.gateway.trail)

        assert (record["reason"], record["status"], record["credential"]) == ("cut-off", 0, "anthropic")

    run(body)


def test_the_same_denial_again_and_again_is_one_more_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SUM_S", 0.05)

    async def body() -> None:
        trail = Trail()
        for reason in ("no-rule", "denied") * 20:
            trail.add(AGENT, SESSION, failed(reason))
        first = await newest(trail)
        assert [(r["reason"], r["count"]) for r in first] == [("no-rule", 1), ("denied", 1)]

        await eventually(lambda: len(trail._waiting) == 4)
        sums = [(r["reason"], r["count"]) for r in await newest(trail, 2)]
        assert sums == [("no-rule", 19), ("denied", 19)]

        trail.add(AGENT, SESSION, failed("denied"))
        assert [r["count"] for r in await newest(trail, 4)] == [1]
        await trail_ends(trail)

    run(body)


async def trail_ends(trail: Trail) -> None:
    """Take what is left, as the router does at the gateway's end."""
    ending = asyncio.ensure_future(trail.hand_over())
    await asyncio.sleep(0)
    reading = asyncio.ensure_future(trail.read(1 << 30))
    await ending
    reading.cancel()
    await asyncio.wait([reading])


def test_a_flood_of_different_requests_is_summed_up_and_told_of_whole(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "RECORDS_BURST", 5)
    monkeypatch.setattr(limits, "SUM_S", 60)

    async def body() -> None:
        credentials.write(CredentialName("anthropic"), KEY)
        async with bench(directory, keep([])) as b:
            trail = b.gateway.trail
            reader, writer = await b.connect()
            for number in range(30):
                trail.add(AGENT, SESSION, Exchange(method=f"M{number}", status=403, reason="method"))
            for _ in range(7):
                writer.write(post())
                await read_reply(reader)
            trail.add(AgentName("emil"), SESSION, Exchange(status=200))
            assert len(await newest(trail)) == 6  # one of them is another agent's
            await trail_ends_with(trail, 8)
            records = list(trail._waiting)

        assert sum(record["count"] for record in records) == 38
        *_, first, second = records
        assert (first["reason"], first["count"], first["method"]) == ("method", 25, "")
        assert (second["route"], second["credential"], second["count"]) == ("anthropic", "anthropic", 7)
        assert second["downBytes"] == 14

    run(body)


async def trail_ends_with(trail: Trail, number: int) -> None:
    ending = asyncio.ensure_future(trail.hand_over())
    await eventually(lambda: len(trail._waiting) == number)
    ending.cancel()
    await asyncio.wait([ending])


def test_a_flood_that_has_ended_leaves_no_debt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RECORDS_BURST", 2)
    monkeypatch.setattr(limits, "RECORDS_PER_S", 100.0)

    async def body() -> None:
        trail = Trail()
        for number in range(5000):
            trail.add(AGENT, SESSION, Exchange(status=200 + number))
        await asyncio.sleep(0.05)  # five times as long as one takes
        before = trail._number
        trail.add(AGENT, SESSION, Exchange(status=99))
        assert trail._number == before + 1
        await trail_ends(trail)

    run(body)


def test_what_has_no_room_is_only_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RECORDS", 3)

    async def body() -> None:
        trail = Trail()
        for number in range(10):
            trail.add(AGENT, SESSION, Exchange(status=200 + number))
        assert [r["number"] for r in await newest(trail)] == [1, 2, 3]
        reading = asyncio.ensure_future(trail.read(3))
        await asyncio.sleep(0)
        trail.add(AGENT, SESSION, Exchange(status=999))
        assert [(r["number"], r["status"]) for r in await reading] == [(11, 999)]

    run(body)


def test_what_nobody_takes_at_the_end_is_counted_in_the_journal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(limits, "HAND_OVER_S", 0.01)

    async def body() -> None:
        trail = Trail()
        for _ in range(3):
            trail.add(AGENT, SESSION, failed("no-rule"))
        await trail.hand_over()

    run(body)
    assert "records-lost" in (told := capfd.readouterr().err) and "records=2" in told
