"""Figures: what was measured, what the budget says, how the table shows both. Nothing here measures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

VALUE = "value"  #: the one number of a figure that is no distribution


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """One budget: a statistic, and where it has to stay."""

    limit: float
    at_least: bool = False  #: True: not below the limit; False: not above it

    def holds(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One row of the table."""

    name: str
    unit: str  #: "ms", "MB", "x" (a ratio), "1/s" …
    stats: Mapping[str, float]  #: p50, p95, p99, min, max of a distribution; else only VALUE
    n: int = 1  #: samples
    bounds: Mapping[str, Bound] = field(default_factory=dict)  #: by the statistic that they bind
    upstream: str = ""  #: what the upstream project needs, in words

    @property
    def typical(self) -> float:
        """The median, or the one number that there is."""
        return self.stats.get("p50", self.stats.get(VALUE, math.nan))

    @property
    def verdict(self) -> str:
        """Return "met", "missed", or "" if there is no budget."""
        if not self.bounds:
            return ""
        return "met" if all(bound.holds(self.stats[key]) for key, bound in self.bounds.items()) else "missed"

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            "n": self.n,
            **{key: round(value, 4) for key, value in self.stats.items()},
            "budget": {key: str(bound) for key, bound in self.bounds.items()},
            "verdict": self.verdict,
            "upstream": self.upstream,
        }


def quantile(samples: Sequence[float], share: float) -> float:
    """Return the smallest sample that at least `share` of all (0 < share ≤ 1) do not exceed.

    The nearest-rank method: always something that was measured. Raises ValueError without samples.
    """
    if not samples:
        raise ValueError("no samples")
    return sorted(samples)[max(1, math.ceil(share * len(samples))) - 1]


def distribution(name: str, unit: str, samples: Sequence[float], **more: Any) -> Figure:
    """Return the figure of many samples; `more` are further fields of it."""
    stats = {
        "p50": quantile(samples, 0.50),
        "p95": quantile(samples, 0.95),
        "p99": quantile(samples, 0.99),
        "min": min(samples),
        "max": max(samples),
    }
    return Figure(name=name, unit=unit, stats=stats, n=len(samples), **more)


def single(name: str, unit: str, value: float, **more: Any) -> Figure:
    """Return the figure of one number; `more` are further fields of it."""
    return Figure(name=name, unit=unit, stats={VALUE: value}, **more)


def ratio(name: str, above: Figure, below: Figure, **more: Any) -> Figure:
    """Return how often the typical value of `below` is in that of `above`."""
    return single(name, "x", above.typical / below.typical, **more)


def order_faults(sent: Mapping[str, Sequence[str]], got: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Count what went wrong with replies by chat: "lost", "repeated", "foreign", "out of order".

    A reply is out of order if it came before one that was asked for earlier in the same chat.
    """
    faults = {"lost": 0, "repeated": 0, "foreign": 0, "out of order": 0}
    for chat in sent.keys() | got.keys():
        asked = {event: place for place, event in enumerate(sent.get(chat, ()))}
        replies = got.get(chat, ())
        faults["lost"] += len(asked.keys() - set(replies))
        faults["foreign"] += sum(event not in asked for event in replies)
        seen: set[str] = set()
        first = []
        for event in replies:
            if event in seen:
                faults["repeated"] += 1
            elif event in asked:
                first.append(asked[event])
            seen.add(event)
        faults["out of order"] += sum(later < earlier for earlier, later in itertools.pairwise(first))
    return faults


# --- the table --------------------------------------------------------------------------------------

COLUMNS = ("p50", "p95", "p99", "min", "max")
NAME_WIDTH = 54


def render(figures: Sequence[Figure]) -> list[str]:
    """Return the lines of the table."""
    heading = [f"{'':<{NAME_WIDTH}} {'n':>5}", *(f"{column:>8}" for column in COLUMNS)]
    lines = [" ".join(heading) + f" {'':<4} {'budget':<20} {'':<6} upstream 2.0.64"]
    return lines + [_line(figure).rstrip() for figure in figures]


def _line(figure: Figure) -> str:
    cells = [f"{figure.name:<{NAME_WIDTH}} {figure.n if figure.n > 1 else '':>5}"]
    if VALUE in figure.stats:
        cells += [f"{shorten(figure.stats[VALUE]):>8}", *(f"{'':>8}" for _ in COLUMNS[1:])]
    else:
        cells += [f"{shorten(figure.stats[column]):>8}" for column in COLUMNS]
    bounds = [f"{'' if key == VALUE else key + ' '}{bound}" for key, bound in figure.bounds.items()]
    return (
        " ".join(cells) + f" {figure.unit:<4} {', '.join(bounds):<20} {figure.verdict:<6} {figure.upstream}"
    )


def shorten(value: float) -> str:
    """Return a number with as many digits as one reads: three, or all before the point."""
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
