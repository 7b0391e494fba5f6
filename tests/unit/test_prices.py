"""What models cost, exactly; and what a budget of it says."""

from __future__ import annotations

import re
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoclawd.agents import change_agent, change_table, parse_agent, read_agent
from nanoclawd.budget import KEYS, NO_LIMITS, Budget, Spent, explain, find_stop, from_json, to_json
from nanoclawd.errors import ConfigError
from nanoclawd.prices import DOLLARS_MAX, MILLION, Price, Prices, Tokens, dollars, show
from nanoclawd.settings import parse_settings
from nanoclawd.tomltable import BadValue

COUNTS = st.integers(0, 1 << 40)
PRICES = st.integers(0, 10**9)
TOKENS = st.builds(Tokens, COUNTS, COUNTS, COUNTS, COUNTS)
ROWS = st.builds(Price, PRICES, PRICES, PRICES, PRICES)


@given(ROWS, TOKENS)
def test_a_call_costs_what_its_tokens_cost_rounded_up_to_a_millionth(price: Price, tokens: Tokens) -> None:
    exact = sum(
        Decimal(getattr(tokens, kind)) * getattr(price, kind) / MILLION
        for kind in ("input", "output", "cache_write", "cache_read")
    )

    assert 0 <= price.cost(tokens) - exact < 1


@given(ROWS, TOKENS, TOKENS)
def test_what_is_used_in_parts_is_never_cheaper(price: Price, one: Tokens, other: Tokens) -> None:
    assert price.cost(one + other) <= price.cost(one) + price.cost(other) <= price.cost(one + other) + 1


@given(st.integers(0, DOLLARS_MAX * MILLION))
def test_an_amount_is_what_was_written(amount: int) -> None:
    written = float(Decimal(amount) / MILLION)

    assert dollars(written) == amount
    assert Decimal(show(amount).removeprefix("$").replace(",", "")) * MILLION == amount


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("2.50", "must be an amount"),
        (True, "must be an amount"),
        (-0.01, "must be from 0"),
        (float("nan"), "must be from 0"),
        (float("inf"), "must be from 0"),
        (1 << 20_000, "must be from 0"),
        (0.0000001, "six decimals"),
    ],
    ids=range(7),
)
def test_what_is_no_amount_is_refused(value: Any, words: str) -> None:
    with pytest.raises(BadValue, match=words):
        dollars(value)


def test_amounts_are_shown_as_people_write_them() -> None:
    shown = [show(amount) for amount in (0, 1, 20_000, 1_500_000, 1234_000_001)]

    assert shown == ["$0.00", "$0.000001", "$0.02", "$1.50", "$1,234.000001"]


def test_the_hour_in_the_cache_costs_twice_the_input() -> None:
    price = Price(2 * MILLION, 10 * MILLION, 2_500_000, 200_000)

    assert price.cost(Tokens(cache_write=MILLION)) == 2_500_000
    assert price.cost(Tokens(cache_write=MILLION, hour_write=MILLION)) == 4_000_000


def test_the_own_row_counts_else_the_longest_that_fits_else_the_dearest() -> None:
    a, b, c = Price(1, 9, 1, 1), Price(2, 2, 2, 2), Price(3, 3, 3, 3)
    prices = Prices({"m-1*": a, "m-1.5*": b, "m-1.5-x": c})

    assert [prices.of(name) for name in ("m-1", "m-1.4", "m-1.5-y", "m-1.5-x")] == [a, a, b, c]
    assert prices.find("m-") is None and prices.of("m-") == Price(3, 9, 3, 3)
    assert Prices({"*": a}).of("") == a


def test_our_table_has_the_models_of_the_provider_and_people_may_change_it() -> None:
    ours = parse_settings("").prices
    text = '[prices."claude-sonnet-5-5*"]\ninput = 1.5\noutput = 7\ncache_write = 2\ncache_read = 0.15\n'

    changed = parse_settings(text).prices

    assert ours.find("claude-sonnet-5-5-20260928") == Price(2 * MILLION, 10 * MILLION, 2_500_000, 100_000)
    assert changed.find("claude-sonnet-5-5") == Price(1_500_000, 7 * MILLION, 2 * MILLION, 150_000)
    assert changed.find("claude-opus-5") == ours.find("claude-opus-5")
    assert ours.find("fast:claude-opus-4-6") is None  # not the price of the slow one


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('[prices]\n"a*b" = {}\n', 2, "prices: 'a*b' is not a model's name"),
        ('[prices]\n"a" = 3\n', 2, "prices: 'a' must be a table"),
        ('[prices."a"]\ninput = 1\n', 1, "prices: 'a': output is missing"),
        ('[prices."a"]\ninput = "1"\n', 2, "prices: 'a': input must be an amount of dollars"),
        ('[prices."a"]\nin = 1\n', 2, "prices: 'a': there is no key 'in'"),
        ("[budget]\nmoney_per_day = 1.2345678\n", 2, "budget: money_per_day has more than six decimals"),
        ("[budget]\ntokens_per_day = 2.5\n", 2, "budget: tokens_per_day must be a whole number"),
        ("[budget]\nmoney_per_month = 2\n", 2, "budget: there is no key 'money_per_month'"),
        ("budget = 3\n", 1, "budget must be a table"),
        ('[[routes]]\nname = "a"\nendpoint = "https://a"\nusage = "all"\n', 4, "usage must be anthropic or"),
    ],
)
def test_what_is_wrong_names_line_and_key(text: str, line: int, words: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        parse_settings(text)

    assert f"nanoclaw.toml:{line}: " in str(wrong.value) and words in str(wrong.value)
    assert wrong.value.hint


# --- budgets ----------------------------------------------------------------------------------------


def test_an_agents_file_goes_before_the_default_key_by_key() -> None:
    text = "[budget]\nmoney_per_day = 2.5\nrequests_per_minute = 7\n"
    agent = parse_agent(text, Path("berta.toml")).budget
    default = parse_settings("[budget]\nmoney_per_day = 1\ntokens_per_session = 9\n").budget

    assert agent == Budget(money_per_day=2_500_000, requests_per_minute=7)
    assert agent.or_default(default) == Budget(
        money_per_day=2_500_000, requests_per_minute=7, tokens_per_session=9
    )
    assert NO_LIMITS.or_default(default) == default


BUDGETS = st.builds(
    Budget,
    **{key: st.none() | st.integers(1, 10_000) for key in KEYS},
)


@given(BUDGETS)
def test_a_budget_is_the_same_behind_the_wire(limit: Budget) -> None:
    assert from_json(to_json(limit)) == limit


def test_a_change_of_the_file_leaves_its_budget(tmp_path: Path) -> None:
    path = tmp_path / "berta.toml"
    path.write_text('model = "a"\n\n[budget]\nmoney_per_day = 2.50 # enough\n')

    change_agent(path, {"model": "b"})
    assert "money_per_day = 2.50 # enough" in path.read_text()
    assert read_agent(path).budget == Budget(money_per_day=2_500_000)


FILES = [
    "",
    'model = "a"\n',
    '# mine\n[budget]\nmoney_per_day = 2.50 # enough\n\n# others\n[[policy]]\nroute = "a"\n',
    '[[policy]]\nroute = "a"\n\n  [ budget ]\n# tokens\ntokens_per_day = 5',
    "budget = {money_per_day = 1}\n",
]


@pytest.mark.parametrize("text", FILES)
def test_limits_are_changed_where_they_stand(tmp_path: Path, text: str) -> None:
    path = tmp_path / "berta.toml"
    path.write_text(text)
    before = read_agent(path)

    changed = change_table(path, "budget", {"money_per_day": 3.25, "tokens_per_day": 7})
    assert changed == read_agent(path) == replace(before, budget=changed.budget)
    assert changed.budget == Budget(money_per_day=3_250_000, tokens_per_day=7)
    assert all(comment in path.read_text() for comment in re.findall("#.*", text))

    assert change_table(path, "budget", {"money_per_day": None, "tokens_per_day": None}).budget == NO_LIMITS
    assert read_agent(path) == replace(before, budget=NO_LIMITS)


def test_a_limit_that_is_wrong_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "berta.toml"
    path.write_text(FILES[2])

    with pytest.raises(ConfigError, match="budget: requests_per_minute must be from 1"):
        change_table(path, "budget", {"requests_per_minute": 0})
    assert path.read_text() == FILES[2]


@given(BUDGETS, COUNTS, COUNTS, COUNTS, COUNTS)
def test_a_limit_stops_when_it_is_reached_and_not_before(
    limit: Budget, tokens: int, money: int, session_tokens: int, session_money: int
) -> None:
    spent = {
        "tokens_per_day": tokens,
        "money_per_day": money,
        "tokens_per_session": session_tokens,
        "money_per_session": session_money,
    }
    reached = [key for key in spent if (most := getattr(limit, key)) is not None and spent[key] >= most]

    stop = find_stop(limit, day=Spent(tokens, money), session=Spent(session_tokens, session_money))

    assert (stop is None) == (not reached)
    if stop is not None:
        assert stop.name in reached and (stop.spent, stop.limit) == (
            spent[stop.name],
            getattr(limit, stop.name),
        )


def test_the_chat_is_told_what_is_spent_and_when_it_is_free_again() -> None:
    limit = Budget(money_per_day=MILLION, tokens_per_session=1000)
    of_day = find_stop(limit, day=Spent(0, 1_020_000), session=Spent())
    of_session = find_stop(limit, day=Spent(), session=Spent(1234, 0))

    assert of_day and of_session
    assert explain(of_day, "berta", "2026-12-31") == (
        "The budget of 'berta' is used up: $1.02 of $1.00 spent today. "
        "It is free again on 2027-01-01 at 00:00. "
        "To go on before, raise it: 'nanoclawctl budget set berta --money-per-day …'."
    )
    assert explain(of_session, "berta", "2026-12-31") == (
        "The budget of 'berta' is used up: 1,234 of 1,000 tokens used in this session. "
        "To go on, raise it: 'nanoclawctl budget set berta --tokens-per-session …'."
    )
