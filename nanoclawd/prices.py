"""What models cost, in whole millionths of a dollar; prices are such amounts for a million tokens. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from decimal import Decimal
from typing import Any

from nanoclawd import tomltable
from nanoclawd.tomltable import BadValue, line_of_text

MILLION = 1_000_000
DOLLARS_MAX = 1_000_000_000
MODELS = 1000  #: rows of [prices]
MODEL_CHARACTERS = 128
FAST = "fast:"  #: stands before the name of a model that answers in fast mode


@dataclass(frozen=True, slots=True)
class Tokens:
    """What one or several calls have used."""

    input: int = 0  #: without what the cache had, or took
    output: int = 0
    cache_write: int = 0
    cache_read: int = 0
    hour_write: int = 0  #: of cache_write: what is kept for an hour

    @property
    def total(self) -> int:
        return self.input + self.output + self.cache_write + self.cache_read

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def most(self, other: Tokens) -> Tokens:
        """Return the greater of each, as of two reports on the same call."""
        return Tokens(*map(max, astuple(self), astuple(other)))


NO_TOKENS = Tokens()


@dataclass(frozen=True, slots=True)
class Price:
    """Millionths of a dollar for a million tokens."""

    input: int
    output: int
    cache_write: int
    cache_read: int

    def cost(self, tokens: Tokens) -> int:
        """Return millionths of a dollar, rounded up."""
        # What is kept for an hour costs twice the input, by all who offer it.
        hour = tokens.hour_write * max(0, 2 * self.input - self.cache_write)
        exact: int = hour + sum(
            getattr(tokens, each.name) * getattr(self, each.name) for each in fields(self)
        )
        return -(-exact // MILLION)


@dataclass(frozen=True, slots=True)
class Prices:
    """A table of them."""

    rows: Mapping[str, Price]

    @property
    def dearest(self) -> Price:
        return Price(*map(max, zip(*map(astuple, self.rows.values()), strict=True)))

    def find(self, model: str) -> Price | None:
        """Return the model's price: of its own row, or of the longest that ends in "*" and fits."""
        if model in self.rows:
            return self.rows[model]
        ends = (n for n in range(len(model), -1, -1) if f"{model[:n]}*" in self.rows)
        return next((self.rows[f"{model[:n]}*"] for n in ends), None)

    def of(self, model: str) -> Price:
        """Return the model's price; of one that has none, the highest that there is."""
        return self.find(model) or self.dearest


def dollars(value: Any) -> int:
    """Return an amount of dollars as millionths of one. Raises BadValue."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadValue("must be an amount of dollars", "write it without quotes, as in 2.50")
    if not 0 <= value <= DOLLARS_MAX:  # false for NaN too
        raise BadValue(f"must be from 0 to {DOLLARS_MAX}", "remove it for the default")
    amount = Decimal(str(value))  # what the person wrote, not the float that is closest to it
    if amount * MILLION % 1:
        raise BadValue("has more than six decimals", "write it as in 2.50")
    return int(amount * MILLION)


def show(amount: int) -> str:
    """Return millionths of a dollar as people write them: all decimals that count, at least two."""
    whole, rest = divmod(amount, MILLION)
    decimals = f"{rest:06}".rstrip("0").ljust(2, "0")
    return f"${whole:,}.{decimals}"


_NAME = line_of_text(
    MODEL_CHARACTERS,
    r"[^*\s]*\*?",
    "is not a model's name",
    'write the API\'s name, with "*" only at its end',
)
#: Reads [prices].
parse_prices = tomltable.by_name(
    tomltable.table(
        Price,
        dict.fromkeys(("input", "output", "cache_write", "cache_read"), dollars),
        required=("input", "output", "cache_write", "cache_read"),
        hint="write {input = …, output = …, cache_write = …, cache_read = …}",
    ),
    _NAME,
    max_count=MODELS,
)
