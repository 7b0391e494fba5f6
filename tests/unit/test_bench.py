"""The arithmetic of the benchmarks, and how their table reads."""

from __future__ import annotations

import pytest

from tests.bench.figures import Bound, distribution, order_faults, quantile, ratio, render, shorten, single


def test_a_quantile_is_a_sample_that_was_measured() -> None:
    samples = [5.0, 1.0, 4.0, 2.0, 3.0]

    assert [quantile(samples, share) for share in (0.01, 0.5, 0.8, 0.99, 1.0)] == [1, 3, 4, 5, 5]


def test_p99_of_two_hundred_samples_is_not_the_worst() -> None:
    samples = [float(number) for number in range(1, 201)]

    assert (quantile(samples, 0.99), max(samples)) == (198, 200)


def test_no_samples_have_no_quantile() -> None:
    with pytest.raises(ValueError, match="no samples"):
        quantile([], 0.5)


def test_a_distribution_is_judged_by_each_of_its_bounds() -> None:
    bounds = {"p50": Bound(limit=10), "p99": Bound(limit=50)}

    assert distribution("a", "ms", [9.0, 9.0, 50.0], bounds=bounds).verdict == "met"
    assert distribution("b", "ms", [9.0, 9.0, 51.0], bounds=bounds).verdict == "missed"
    assert distribution("c", "ms", [9.0, 11.0, 50.0], bounds=bounds).verdict == "missed"


def test_a_bound_may_be_a_floor() -> None:
    bounds = {"value": Bound(limit=10, at_least=True)}

    assert single("a", "x", 10, bounds=bounds).verdict == "met"
    assert single("b", "x", 9.9, bounds=bounds).verdict == "missed"


def test_without_a_budget_there_is_no_verdict() -> None:
    assert single("a", "ms", 1e9).verdict == ""


def test_a_ratio_compares_typical_values() -> None:
    above = distribution("cold", "ms", [400.0, 500.0, 9000.0])
    below = single("bare", "ms", 250)

    assert ratio("ratio", above, below).typical == 2


def test_faults_of_replies_are_counted_by_kind() -> None:
    sent = {"one": ["a", "b", "c"], "two": ["d", "e"]}

    assert set(order_faults(sent, {"one": ["a", "b", "c"], "two": ["d", "e"]}).values()) == {0}
    assert order_faults(sent, {"one": ["a", "c", "b", "b"], "three": ["x"]}) == {
        "lost": 2,
        "repeated": 1,
        "foreign": 1,
        "out of order": 1,
    }


def test_a_row_of_the_table_shows_statistics_budget_and_verdict() -> None:
    figure = distribution("warm", "ms", [1.0, 2.0, 3.0], bounds={"p50": Bound(limit=10)}, upstream="650 ms")

    row = render([figure])[1]

    assert " ".join(row.split()) == "warm 3 2.00 3.00 3.00 1.00 3.00 ms p50 ≤ 10 met 650 ms"
    assert len(render([single("a", "x", 1)])[0]) < 160


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (0.234, "0.23"), (12.34, "12.3"), (123.4, "123"), (12345.6, "12346")]
)
def test_numbers_have_the_digits_that_one_reads(value: float, shown: str) -> None:
    assert shorten(value) == shown
