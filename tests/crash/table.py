"""The table of kill points and faults, and what is needed to see one fault again."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from tests.crash.record import Fault


class Table:
    """Counts points and faults by kind of point."""

    def __init__(self, kinds: Iterable[str]) -> None:
        self._points: Counter[str] = Counter(dict.fromkeys(kinds, 0))
        self._faults: dict[str, Counter[Fault]] = defaultdict(Counter)

    @property
    def points(self) -> int:
        return self._points.total()

    @property
    def faults(self) -> int:
        return sum(counter.total() for counter in self._faults.values())

    def add(self, kinds: list[str], faults: Iterable[Fault]) -> None:
        """Add one conversation: what died in it, and what was wrong at its end, counted for the last."""
        self._points.update(kinds)
        for fault in faults:
            self._faults[kinds[-1] if kinds else "nothing died"][fault] += 1

    def render(self) -> str:
        rows = [["what died", "points", *Fault]]
        for name in {**self._points, **self._faults}:
            rows.append([name, self._points[name], *(self._faults[name][fault] for fault in Fault)])
        rows.append(["altogether", *(sum(column) for column in list(zip(*rows[1:], strict=True))[1:])])
        width = max(len(row[0]) for row in rows)
        return "\n".join(f"{row[0]:{width}}" + "".join(f"{cell:>14}" for cell in row[1:]) for row in rows)
