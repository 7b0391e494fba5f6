"""What agents have spent, what they may still spend, and what the router is told of it.

A call begins if no limit is reached by what was spent and what the calls that run may cost at most; if only
these would reach it, it waits for them. So a budget is exceeded by the cost of one call at most, the last
that began, however many come at once.

Sums only grow, and are told whole: whoever reads them twice, or after a restart, counts nothing twice.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import astuple, dataclass, field, fields

from nanoclawd import budget, journal
from nanoclawd.budget import Budget, Spent, Stop
from nanoclawd.gateway import limits
from nanoclawd.gateway.usage import Meter
from nanoclawd.ids import AgentName, SessionName
from nanoclawd.policy import Denied
from nanoclawd.prices import NO_TOKENS, Prices, Tokens
from nanoclawd.rates import Rate
from nanoclawd.wire import Json

OTHERS = "(others)"  #: in place of the names of models that are too many
REASON = "budget-"  #: of a refusal, before the name of the limit


class OverBudget(Denied):
    """Refused before it left. `is_news`: the first one for this stop."""

    def __init__(self, stop: Stop, agent: AgentName, day: str, *, is_news: bool) -> None:
        super().__init__(402, REASON + stop.name, budget.explain(stop, agent, day))
        self.is_news = is_news


@dataclass(slots=True)
class Use:
    """What one call has cost, for its line in the journal."""

    model: str = ""
    tokens: Tokens = NO_TOKENS
    money: int = 0  #: millionths of a dollar
    is_estimate: bool = False

    def describe(self) -> Json:
        tokens = {
            f"{field.name}_tokens": getattr(self.tokens, field.name) for field in fields(self.tokens)[:4]
        }
        estimate = True if self.is_estimate else None
        return {"model": self.model or None, **tokens, "microdollars": self.money, "estimate": estimate}


@dataclass(slots=True)
class _Sum:
    """What was used in one day by one session with one model, in this gateway's life."""

    number: int = 0  #: of its last change
    calls: int = 0
    estimated: int = 0
    unpriced: int = 0
    tokens: Tokens = NO_TOKENS
    money: int = 0


@dataclass(slots=True, eq=False)
class _Running:
    session: SessionName
    meter: Meter
    prices: Prices

    def may_cost(self) -> Spent:
        model, tokens = self.meter.expected()
        price = self.prices.of(model) if model else self.prices.dearest
        return Spent(tokens.total, price.cost(tokens))


@dataclass(slots=True)
class _Account:
    """One agent's."""

    budget: Budget
    told_on: str  #: the day of what follows
    day_before: Spent  #: spent on that day before this gateway's life
    sessions_before: Mapping[SessionName, Spent]
    rate: Rate | None
    days: dict[str, Spent] = field(default_factory=dict)
    sessions: dict[SessionName, Spent] = field(default_factory=dict)
    running: set[_Running] = field(default_factory=set)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    stopped: set[tuple[str, SessionName | None]] = field(default_factory=set)  #: that was told of

    def find_stop(self, session: SessionName, day: str, *, also_running: bool) -> Stop | None:
        spent_day = self.days.get(day, Spent())
        if day <= self.told_on:
            spent_day += self.day_before
        spent_session = self.sessions.get(session, Spent()) + self.sessions_before.get(session, Spent())
        for call in self.running if also_running else ():
            cost = call.may_cost()
            spent_day += cost
            if call.session == session:
                spent_session += cost
        return budget.find_stop(self.budget, day=spent_day, session=spent_session)


class Ledger:
    def __init__(self, life: str) -> None:
        self.life = life  #: names this gateway's start
        self._accounts: dict[AgentName, _Account] = {}
        self._sums: dict[tuple[str, AgentName, SessionName, str], _Sum] = {}
        self._number = 0
        self._read = 0  #: up to there the router has it on disk
        self._changed = asyncio.Event()
        self._unpriced: set[str] = set()

    def set_budget(
        self, agent: AgentName, limit: Budget, day: str, spent: Spent, sessions: Mapping[SessionName, Spent]
    ) -> None:
        """Take over an agent's budget, and what it had spent before this life: on `day`, and by session."""
        account = self._accounts.get(agent)
        if account is None:
            account = self._accounts[agent] = _Account(limit, day, spent, sessions, None)
        per_minute = limit.requests_per_minute
        if account.rate is None or per_minute != account.budget.requests_per_minute:
            account.rate = Rate(per_minute / 60, per_minute) if per_minute else None
        if limit != account.budget:
            account.stopped.clear()
        account.budget, account.told_on = limit, day
        account.day_before, account.sessions_before = spent, sessions
        account.changed.set()

    @contextlib.asynccontextmanager
    async def call(
        self, agent: AgentName, session: SessionName, meter: Meter, prices: Prices
    ) -> AsyncIterator[Use]:
        """Let a call begin as soon as the budget allows it, and count what it has cost at its end.

        What is yielded is filled then. Raises Denied if the budget does not allow it.
        """
        if (account := self._accounts.get(agent)) is None:  # only a bug of the router's
            raise Denied(503, "no-budget", "The gateway was not told this agent's budget.")
        if account.rate and (wait_s := account.rate.take()):
            message = (
                f"The budget of '{agent}' allows {account.budget.requests_per_minute} requests a minute."
            )
            raise Denied(429, f"{REASON}requests_per_minute", message, ("retry-after", f"{wait_s:.0f}"))
        while True:
            day = budget.today()
            if stop := account.find_stop(session, day, also_running=False):
                what = stop.name, None if stop.is_of_day else session
                is_news = what not in account.stopped
                account.stopped.add(what)
                raise OverBudget(stop, agent, day, is_news=is_news)
            if not account.find_stop(session, day, also_running=True):
                break
            account.changed.clear()
            await account.changed.wait()
        account.stopped = {what for what in account.stopped if what[1] not in (None, session)}
        running, use = _Running(session, meter, prices), Use()
        account.running.add(running)
        try:
            yield use
        finally:
            account.running.remove(running)
            self._count(agent, session, account, running, use)
            account.changed.set()

    def is_bounded(self, agent: AgentName) -> bool:
        """Say whether it matters what the agent's calls cost."""
        return self._accounts[agent].budget.is_of_spending

    def look_again(self, agent: AgentName) -> None:
        """More is known of a call that runs: others may not have to wait for it."""
        self._accounts[agent].changed.set()

    def _count(
        self, agent: AgentName, session: SessionName, account: _Account, running: _Running, use: Use
    ) -> None:
        used, use.is_estimate = running.meter.end()
        if not used:
            return
        day = budget.today()
        if day not in account.days:
            self._forget_before(day)
        for nth, (model, tokens) in enumerate(used.items()):
            is_priced = running.prices.find(model) is not None
            if not is_priced:
                self._warn(model)
            money = running.prices.of(model).cost(tokens)
            use.model, use.tokens, use.money = use.model or model, use.tokens + tokens, use.money + money
            total = self._sum(day, agent, session, model)
            total.calls += nth == 0
            total.estimated += nth == 0 and use.is_estimate
            total.unpriced += nth == 0 and not is_priced
            total.tokens += tokens
            total.money += money
        spent = Spent(use.tokens.total, use.money)
        account.days[day] = account.days.get(day, Spent()) + spent
        account.sessions[session] = account.sessions.get(session, Spent()) + spent
        self._changed.set()

    def _sum(self, day: str, agent: AgentName, session: SessionName, model: str) -> _Sum:
        key = day, agent, session, model
        if key not in self._sums and sum(other[:3] == key[:3] for other in self._sums) >= limits.MODELS:
            key = *key[:3], OTHERS
        self._number += 1
        total = self._sums.setdefault(key, _Sum())
        total.number = self._number
        return total

    def _warn(self, model: str) -> None:
        if model not in self._unpriced and len(self._unpriced) < limits.MODELS:
            self._unpriced.add(model)
            text = "it counts as the dearest; a row of [prices] in nanoclaw.toml says otherwise"
            journal.warning("model-without-price", text, model=model)

    def _forget_before(self, day: str) -> None:
        """Forget days that are over, as far as the router has them."""
        self._sums = {key: s for key, s in self._sums.items() if key[0] >= day or s.number > self._read}
        for account in self._accounts.values():
            account.days = {old: spent for old, spent in account.days.items() if old >= day}

    # --- for the router ----------------------------------------------------------------------------

    async def read(self, after: int) -> list[Json]:
        """Return sums that have changed since the change number `after`; wait until there are some.

        Those up to that number the router has on disk.
        """
        self._read = max(self._read, after)
        self._changed.set()
        while not (found := self._after(after)):
            self._changed.clear()
            await self._changed.wait()
        return found

    async def hand_over(self) -> None:
        """Return when the router has everything, or after a while without it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limits.HAND_OVER_S):
                while self._after(self._read):
                    self._changed.clear()
                    await self._changed.wait()
        if left := self._after(self._read):
            journal.warning("usage-lost", "the router is away, and does not know of it", sums=len(left))

    def _after(self, number: int) -> list[Json]:
        changed = [(key, total) for key, total in self._sums.items() if total.number > number]
        changed.sort(key=lambda each: each[1].number)
        return [self._describe(*each) for each in changed[: limits.RECORDS_AT_ONCE]]

    @staticmethod
    def _describe(key: tuple[str, AgentName, SessionName, str], total: _Sum) -> Json:
        names = ("input", "output", "cacheWrite", "cacheRead")
        return {
            **dict(zip(("day", "agent", "session", "model"), key, strict=True)),
            "number": total.number,
            "calls": total.calls,
            "estimated": total.estimated,
            "unpriced": total.unpriced,
            **dict(zip(names, astuple(total.tokens)[:4], strict=True)),
            "microdollars": total.money,
        }
