"""Rates: a burst at once, then so many a second; what came too early counts."""

from __future__ import annotations

import time

import pytest

from nanoclawd.rates import Rate


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)


def test_a_burst_is_in_order_and_then_each_waits_for_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    rate = Rate(per_s=10, burst=3)

    waits = [rate.take() for _ in range(5)]

    assert waits == pytest.approx([0, 0, 0, 0.1, 0.2])


def test_the_burst_comes_back_with_time_and_grows_no_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    rate = Rate(per_s=10, burst=3)
    rate.take(3)

    clock.now_s += 0.2
    soon = [rate.take() for _ in range(3)]
    clock.now_s += 3600
    later = [rate.take() for _ in range(4)]

    assert soon == pytest.approx([0, 0, 0.1])
    assert later == pytest.approx([0, 0, 0, 0.1])


def test_what_came_too_early_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    rate = Rate(per_s=10, burst=1)

    assert rate.take(11) == pytest.approx(1)
    clock.now_s += 0.5
    assert rate.take() == pytest.approx(0.6)
