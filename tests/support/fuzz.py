"""What all fuzz tests share: how hard they try, and strategies for what is nearly right."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from nanoclawd import idl
from nanoclawd.idl import Interface, Type

T = TypeVar("T")
#: NANOCLAW_FUZZ=100 makes each test try a hundred times as much as by default, where it takes some seconds.
EFFORT = float(os.environ.get("NANOCLAW_FUZZ", "1"))
#: CPU seconds for the worst input that may come; a hundred times what it takes.
WORST_S = 2.0


class Long(str):
    """A text that nobody wants to read in the report of a failure."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"Long({self[:8]!r}…, {len(self)} characters)"


#: Also what JSON can spell and UTF-8 cannot hold, and what no C program takes.
TEXTS = st.text(st.characters(exclude_categories=[]), max_size=20)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | TEXTS
    | st.sampled_from(["", "\0", "\ud800", Long("x" * 300_000), 1 << 63, -(1 << 63) - 1, 10**400, 1e308])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


def fuzzed(examples: int, *, shrink: bool = True) -> settings:
    """Return settings for that many examples at the usual effort. shrink: make one that fails smaller."""
    ignored = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    phases = set(Phase) - (set() if shrink else {Phase.shrink, Phase.explain})
    return settings(
        max_examples=int(examples * EFFORT), deadline=None, suppress_health_check=ignored, phases=phases
    )


@contextmanager
def bounded_time() -> Iterator[None]:
    """Fail if the block takes longer than any input may. CPU time: other processes do not count."""
    began = time.process_time()
    yield
    assert time.process_time() - began < WORST_S


def allowed(interface: Interface, expected: Type, depth: int = 0) -> st.SearchStrategy[Any]:
    """Return a strategy of what `expected` allows."""
    text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
    match expected.kind:
        case "bool":
            return st.booleans()
        case "int":
            return st.integers(-(1 << 63), (1 << 63) - 1)
        case "float":
            return st.floats(allow_nan=False, allow_infinity=False) | st.integers(-1000, 1000)
        case "string":
            return text
        case "object":
            return st.dictionaries(text, st.integers(), max_size=2)
        case "enum":
            return st.sampled_from(expected.values)
        case "name":
            return allowed(interface, interface.types[expected.name], depth)
        case "maybe":
            if depth > 3:
                return st.none()
            return st.none() | allowed(interface, idl._inner(expected), depth + 1)
        case "array":
            return st.lists(allowed(interface, idl._inner(expected), depth + 1), max_size=2)
        case "map":
            return st.dictionaries(text, allowed(interface, idl._inner(expected), depth + 1), max_size=2)
    fields = expected.fields or {}
    return st.fixed_dictionaries(
        {name: allowed(interface, inner, depth + 1) for name, inner in fields.items()}
    )


@st.composite
def mutated(draw: st.DrawFn, right: st.SearchStrategy[Any]) -> Any:
    """Return something of `right`, with one place changed, removed or added, or as it is."""
    value = draw(right)
    return draw(st.just(value) | _changed(value))


def _changed(value: Any) -> st.SearchStrategy[Any]:
    """Return a strategy of what `value` becomes if one place in it is changed."""
    ways: list[st.SearchStrategy[Any]] = [VALUES]
    match value:
        case dict():
            ways.append(st.builds(lambda k, v: value | {k: v}, TEXTS, VALUES))
            for key in value:
                ways.append(st.just({k: v for k, v in value.items() if k != key}))
                ways.append(st.deferred(_at(value, key)))
        case list():
            ways.append(VALUES.map(lambda v: [*value, v]))
            ways.append(VALUES.map(lambda v: [v] * 1025))
            if value:
                ways.append(_changed(value[0]).map(lambda v: [v, *value[1:]]))
        case str():
            ways.append(TEXTS.map(lambda t: value + t))
            ways.append(st.sampled_from([Long(value * 1000), value[:-1], value + "\0", value + "\ud800"]))
    return st.one_of(ways)


def _at(value: dict[str, Any], key: str) -> Callable[[], st.SearchStrategy[Any]]:
    return lambda: _changed(value[key]).map(lambda inner: value | {key: inner})


@st.composite
def damaged(draw: st.DrawFn, text: str, parts: list[str]) -> str:
    """Return `text` with pieces removed, doubled, or replaced by `parts` or by anything."""
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 30)))
        piece = draw(st.sampled_from([*parts, "", text[start:end] * 2]) | st.text(max_size=5))
        text = text[:start] + piece + text[end:]
    return text
