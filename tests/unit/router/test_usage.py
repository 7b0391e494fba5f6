"""What the gateway has counted, as the router keeps it, shows it, and tells a next gateway."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from nanoclawd import budget
from nanoclawd.budget import NO_LIMITS, Budget
from nanoclawd.db import Database
from nanoclawd.ids import AgentName
from nanoclawd.usage import Usage
from nanoclawd.wire import Json

BERTA, EMIL = AgentName("berta"), AgentName("emil")
TODAY, BEFORE, OLD = "2026-11-22", "2026-11-21", "2026-01-01"


@pytest.fixture(autouse=True)
def today(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "today", lambda: TODAY)


class Store:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.limits: dict[str, Budget] = {}
        self.usage: Usage

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        db = await Database.open(self.path)
        writing = asyncio.create_task(db.run())
        self.usage = Usage(db, lambda agent: self.limits.get(agent, NO_LIMITS))
        try:
            yield
        finally:
            writing.cancel()
            await asyncio.wait([writing])
            await db.close()

    def run(self, body: Callable[[], Awaitable[None]]) -> None:
        async def main() -> None:
            async with self.open():
                await body()

        asyncio.run(main())

    async def list(self, by: str = "agent", agent: str | None = None, since: str = "") -> list[Json]:
        return [row async for row in self.usage.list(by, agent, since)]

    async def stops(self) -> list[tuple[str, str, str]]:
        return [
            (agent, session, stop.name) async for agent, session, stop in self.usage.stops([BERTA, EMIL])
        ]

    def sql(self, statement: str) -> list[Any]:
        with closing(sqlite3.connect(self.path)) as connection, connection:
            return connection.execute(statement).fetchall()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "db")


def told(
    day: str = TODAY, *, agent: str = BERTA, session: str = "s1", model: str = "m", times: int = 1
) -> Json:
    """A sum as the gateway tells it, of so many like calls."""
    counts = {
        "calls": 1,
        "estimated": 1,
        "unpriced": 0,
        "input": 10,
        "output": 5,
        "cacheWrite": 2,
        "cacheRead": 3,
    }
    counts |= {"microdollars": 1000}
    names = {"day": day, "agent": agent, "session": session, "model": model}
    return {"number": 7, **names, **{name: count * times for name, count in counts.items()}}


def test_what_is_told_twice_counts_once_and_lives_add_up(store: Store) -> None:
    async def body() -> None:
        for life, times in (("a", 1), ("a", 3), ("a", 3), ("b", 2)):
            await store.usage.take_over(life, [told(times=times)])
        (row,) = await store.list()

        assert (row["calls"], row["input"], row["cacheRead"], row["microdollars"]) == (5, 50, 15, 5000)
        assert (row["estimated"], row["tokensLeft"], row["microdollarsLeft"]) == (5, None, None)

    store.run(body)


def test_a_next_gateway_hears_what_was_spent_before_it_and_not_what_it_counts_itself(store: Store) -> None:
    async def body() -> None:
        await store.usage.take_over(
            "a", [told(), told(BEFORE, times=2), told(session="s2"), told(agent=EMIL)]
        )
        await store.usage.take_over("b", [told(times=9)])

        spent = await store.usage.spent_before(BERTA, {"s1", "s3"}, "b")

        assert spent == {
            "day": TODAY,
            "tokens": 2 * 20,
            "microdollars": 2 * 1000,
            "sessions": [{"session": "s1", "tokens": 3 * 20, "microdollars": 3 * 1000}],
        }
        nothing = await store.usage.spent_before(AgentName("new"), set(), "b")
        assert (nothing["tokens"], nothing["sessions"]) == (0, [])

    store.run(body)


def test_usage_is_shown_by_agent_session_and_day_with_what_is_left(store: Store) -> None:
    store.limits[BERTA] = Budget(money_per_day=1500, tokens_per_day=30, money_per_session=5000)

    async def body() -> None:
        await store.usage.take_over(
            "a", [told(), told(BEFORE), told(session="s2", model="n"), told(agent=EMIL)]
        )

        agents, days = await store.list(), await store.list("day", since=TODAY)
        sessions = await store.list("session", BERTA)

        assert [(r["agent"], r["calls"], r["tokensLeft"], r["microdollarsLeft"]) for r in agents] == [
            (BERTA, 3, 0, 0),
            (EMIL, 1, None, None),
        ]
        assert [(r["session"], r["calls"], r["microdollarsLeft"]) for r in sessions] == [
            ("s1", 2, 3000),
            ("s2", 1, 4000),
        ]
        assert [(r["day"], r["calls"]) for r in days] == [(TODAY, 3)]

    store.run(body)


def test_who_is_stopped_is_known(store: Store) -> None:
    store.limits[BERTA] = Budget(money_per_day=2000)
    store.limits[EMIL] = Budget(tokens_per_session=30)

    async def body() -> None:
        await store.usage.take_over("a", [told(), told(BEFORE), told(agent=EMIL), told(BEFORE, agent=EMIL)])
        assert await store.stops() == [(EMIL, "s1", "tokens_per_session")]
        await store.usage.take_over("a", [told(times=2)])
        assert await store.stops() == [(BERTA, "", "money_per_day"), (EMIL, "s1", "tokens_per_session")]
        store.limits.clear()
        assert await store.stops() == []

    store.run(body)


def test_a_limit_of_nothing_stops_who_has_spent_nothing(store: Store) -> None:
    store.limits[BERTA] = Budget(money_per_day=0)

    async def body() -> None:
        assert await store.stops() == [(BERTA, "", "money_per_day")]

    store.run(body)


def test_old_days_are_summed_up_and_budgets_of_sessions_still_know_them(store: Store) -> None:
    async def body() -> None:
        old = [told(OLD), told("2026-01-02"), told(OLD, session="s2"), told(BEFORE)]
        await store.usage.take_over("a", old)
        before = await store.usage.spent_before(BERTA, {"s1", "s2"}, "c")

        for _ in range(2):
            await store.usage.prune(30)

        assert await store.usage.spent_before(BERTA, {"s1", "s2"}, "c") == before
        assert store.sql("SELECT day, session, calls FROM usage ORDER BY 1, 2") == [
            ("", "s1", 2),
            ("", "s2", 1),
            (BEFORE, "s1", 1),
        ]
        # What came later to be old is added.
        await store.usage.take_over("b", [told(OLD)])
        await store.usage.prune(30)
        assert store.sql("SELECT calls FROM usage WHERE day = '' AND session = 's1'") == [(3,)]

    store.run(body)


def test_days_of_the_gateway_that_runs_are_not_summed_up(store: Store) -> None:
    async def body() -> None:
        await store.usage.take_over("a", [told(OLD)])
        store.sql("UPDATE router SET gateway_life = 'a'")
        await store.usage.prune(30)
        await store.usage.take_over("a", [told(OLD)])

        assert store.sql("SELECT day, calls FROM usage") == [(OLD, 1)]

    store.run(body)
