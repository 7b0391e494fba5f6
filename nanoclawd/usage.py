"""What agents have used of models, in the router's database: counted by the gateway."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from datetime import date, timedelta
from functools import partial

from nanoclawd import budget, journal
from nanoclawd.budget import Budget, Spent, Stop
from nanoclawd.db import Database, Transaction
from nanoclawd.ids import AgentName
from nanoclawd.wire import Json

_COLUMNS = {"cacheWrite": "cache_write", "cacheRead": "cache_read", "microdollars": "money"}
_BySession = dict[tuple[str, str], Spent]  #: agent and session


class Usage:
    """`budget_of` tells an agent's budget at this moment."""

    def __init__(self, db: Database, budget_of: Callable[[AgentName], Budget]) -> None:
        self._db = db
        self.budget_of = budget_of

    async def take_over(self, life: str, sums: Sequence[Json]) -> None:
        """Store what the gateway has counted since its start `life`. Raises Unavailable."""

        def store(tx: Transaction) -> None:
            for each in sums:
                row = {_COLUMNS.get(key, key): value for key, value in each.items() if key != "number"}
                tx.all("set_usage", life=life, **row)

        await self._db.write(store)

    async def spent_before(self, agent: AgentName, sessions: Collection[str], life: str) -> Json:
        """Return what SetBudget() of io.nanoclaw.Gateway takes; `life` knows itself what it has counted."""
        day = budget.today()
        before = {"agent": agent, "without": life}
        of_day = _by_agent(await self._read("spent_before", day=day, **before))[agent]
        spent = await self._read("spent_before", day=None, **before) if sessions else {}
        return {
            "day": day,
            "tokens": of_day.tokens,
            "microdollars": of_day.money,
            "sessions": [
                {"session": name, "tokens": each.tokens, "microdollars": each.money}
                for (_, name), each in spent.items()
                if name in sessions
            ],
        }

    async def stops(self, agents: Iterable[AgentName]) -> AsyncIterator[tuple[AgentName, str, Stop]]:
        """Yield which limits are reached: one for an agent and "" if it is of the day, else by session."""
        limits = {agent: limit for agent in agents if (limit := self.budget_of(agent)).is_of_spending}
        if not limits:
            return
        today = _by_agent(await self._read("spent", day=budget.today()))
        spent = await self._read("spent", day=None)
        for agent, limit in limits.items():
            sessions = {name: each for (of, name), each in spent.items() if of == agent}
            for session, each in {"": Spent(), **sessions}.items():
                if stop := budget.find_stop(limit, day=today[agent], session=each):
                    yield agent, session, stop
                    if stop.is_of_day:
                        break

    async def list(self, by: str, agent: str | None, since: str) -> AsyncIterator[Json]:
        """Yield sums by agent, session or day, from a day on, and what is left of the budget of each."""
        spent = await self._read("spent", day=budget.today() if by == "agent" else None)
        today = _by_agent(spent)
        per = "day" if by == "agent" else by
        for row in await self._db.read("list_usage", by=by, agent=agent, since=since):
            tokens = money = None
            if by != "day":
                limit, name = self.budget_of(row["agent"]), row["agent"]
                each = today[name] if by == "agent" else spent.get((name, row["session"]), Spent())
                tokens = _left(getattr(limit, f"tokens_per_{per}"), each.tokens)
                money = _left(getattr(limit, f"money_per_{per}"), each.money)
            yield {**dict(row), "tokensLeft": tokens, "microdollarsLeft": money}

    async def prune(self, days: int) -> None:
        """Sum up what is older than so many days: budgets of sessions still need it. Raises Unavailable."""
        before = str(date.fromisoformat(budget.today()) - timedelta(days=days))
        if pruned := await self._db.write(partial(_prune, before=before)):
            journal.info("usage-summed-up", rows=pruned)

    async def _read(self, query: str, **parameters: str | None) -> _BySession:
        rows = await self._db.read(query, **parameters)
        return {(row["agent"], row["session"]): Spent(row["tokens"], row["money"]) for row in rows}


def _by_agent(spent: _BySession) -> dict[str, Spent]:
    total: dict[str, Spent] = defaultdict(Spent)
    for (agent, _), each in spent.items():
        total[agent] += each
    return total


def _prune(tx: Transaction, before: str) -> int:
    (read,) = tx.all("gateway_read")
    old = {"day": before, "running": read["gateway_life"]}
    tx.all("sum_up_usage", **old)
    return len(tx.all("delete_old_usage", **old))


def _left(limit: int | None, spent: int) -> int | None:
    return None if limit is None else max(0, limit - spent)
