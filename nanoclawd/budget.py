"""How much an agent may spend at its models: the table [budget], and what is left of it. Pure."""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass, fields
from datetime import date, timedelta
from typing import Any, NamedTuple

from nanoclawd import prices, tomltable
from nanoclawd.prices import MILLION, dollars
from nanoclawd.tomltable import Rows, whole_number
from nanoclawd.wire import Json

TOKENS_MAX = 1 << 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """The table [budget] of an agent's file, or of nanoclaw.toml for all agents. None: no limit."""

    tokens_per_day: int | None = None  #: of all kinds, and of all sessions, from midnight to midnight here
    tokens_per_session: int | None = None  #: as long as there is the session
    money_per_day: int | None = None  #: in millionths of a dollar
    money_per_session: int | None = None
    requests_per_minute: int | None = None  #: to models, of all sessions

    @property
    def is_of_spending(self) -> bool:
        return self.is_of_session or self.tokens_per_day is not None or self.money_per_day is not None

    @property
    def is_of_session(self) -> bool:
        """Whether it matters what each session has spent."""
        return self.tokens_per_session is not None or self.money_per_session is not None

    def or_default(self, default: Budget) -> Budget:
        """Return this, with what it does not say as in `default`."""
        given = {key: value for key, value in asdict(self).items() if value is not None}
        return Budget(**(asdict(default) | given))


NO_LIMITS = Budget()
KEYS: Rows = {
    "tokens_per_day": whole_number(0, TOKENS_MAX),
    "tokens_per_session": whole_number(0, TOKENS_MAX),
    "money_per_day": dollars,
    "money_per_session": dollars,
    "requests_per_minute": whole_number(1, 60_000),
}
#: Reads [budget].
parse_budget = tomltable.table(Budget, KEYS, hint="write [budget] and below it e.g. money_per_day = 2.50")


@dataclass(slots=True)
class Spent:
    tokens: int = 0
    money: int = 0  #: in millionths of a dollar

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.tokens + other.tokens, self.money + other.money)


class Stop(NamedTuple):
    """A limit that is reached."""

    name: str  #: of the key
    spent: int
    limit: int

    @property
    def is_of_day(self) -> bool:
        return self.name.endswith("_day")

    def __str__(self) -> str:
        per = "today" if self.is_of_day else "in this session"
        if self.name.startswith("money"):
            return f"{prices.show(self.spent)} of {prices.show(self.limit)} spent {per}"
        return f"{self.spent:,} of {self.limit:,} tokens used {per}"


def find_stop(budget: Budget, *, day: Spent, session: Spent) -> Stop | None:
    """Return the first limit that is reached."""
    for name in [*KEYS][:4]:
        limit = getattr(budget, name)
        spent = getattr(day if name.endswith("_day") else session, name.partition("_")[0])
        if limit is not None and spent >= limit:
            return Stop(name, spent, limit)
    return None


def explain(stop: Stop, agent: str, today: str) -> str:
    """Return what the chat is told: which limit, when it is free again, how to raise it."""
    again = "To go on, "
    if stop.is_of_day:
        tomorrow = date.fromisoformat(today) + timedelta(days=1)
        again = f"It is free again on {tomorrow} at 00:00. To go on before, "
    command = f"nanoclawctl budget set {agent} --{stop.name.replace('_', '-')} …"
    return f"The budget of '{agent}' is used up: {stop}. {again}raise it: '{command}'."


def today() -> str:
    """Return the day of this host's calendar, as in 2026-11-22."""
    return time.strftime("%Y-%m-%d")


def plain(key: str, value: int | None) -> int | float | None:
    """Return the value of a key as a file has it."""
    if value is None or not key.startswith("money"):
        return value
    return value / MILLION if value % MILLION else value // MILLION


_NAMES = {field.name: re.sub("_(.)", lambda found: found[1].upper(), field.name) for field in fields(Budget)}


def to_json(budget: Budget) -> Json:
    """Return the budget as the interfaces have it."""
    return {_NAMES[key]: value for key, value in asdict(budget).items()}


def from_json(budget: Json) -> Budget:
    """The reverse, as trusted as the sender."""
    values: dict[str, Any] = {key: budget[name] for key, name in _NAMES.items()}
    return Budget(**values)


def changes_from_json(budget: Json) -> dict[str, int | None]:
    """Return what a call changes of a budget, by key: null stays, -1 takes the limit away."""
    given = {key: budget[name] for key, name in _NAMES.items() if budget[name] is not None}
    return {key: None if value == -1 else value for key, value in given.items()}
