"""What patterns can say, that they say the same as regular expressions, and that nobody can make them
slow.
"""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoclawd import limits
from nanoclawd.errors import Refused
from nanoclawd.patterns import check_pattern, matches

ATOMS = ["a", "b", "B", " ", r"\d", r"\w", r"\s", "[ab]", "[^a]", ".", r"\b", r"\.", "^", "$", "7"]
PATTERNS = st.lists(st.sampled_from([*ATOMS, *ATOMS, ".*", "|"]), min_size=1, max_size=12).map("".join)
TEXTS = st.text(st.sampled_from("abAB 7.\né"), max_size=20)


@given(PATTERNS, TEXTS)
def test_a_pattern_fits_what_the_same_regular_expression_does(pattern: str, text: str) -> None:
    expected = re.search(pattern.replace(".*", r"[\s\S]*"), text, re.IGNORECASE) is not None

    assert matches(pattern, text) is expected


@pytest.mark.parametrize(
    ("pattern", "fitting", "other"),
    [
        (r"\bbot\b", "Ask the BOT!", "robots"),
        ("^!deploy", "!deploy now", "no !deploy"),
        (r"deploy.*prod$", "please deploy\nthis to prod", "prod deploy"),
        (r"help|\?$", "is it so?", "it is so"),
        (r"#\d\d\d", "see #123", "see #12"),
        (r"3\.14\*", "3.14*", "3x14*"),
    ],
)
def test_examples(pattern: str, fitting: str, other: str) -> None:
    assert check_pattern(pattern) == pattern

    assert matches(pattern, fitting)
    assert not matches(pattern, other)


@pytest.mark.parametrize(
    "pattern",
    [
        *("", "x" * (limits.PATTERN_CHARACTERS + 1)),
        *("(a+)+$", "a+", "a?", "a{3}", "(a)", r"(?s:a)", "a**", "[", "]", "a]", "[]", "[z-a]", "\\"),
        *(r"\1", r"\Z", r"\pL", r"[\b]", r"[\n]", "[a--b]", "[a&&b]", "[[a]", "a\\"),
        *("|", "a|", "|a", ".*", ".", "..", ".*.*", r"\b", "^", r"[\s\S]", r"\w", r"a|\w", r"[^\d]|\d"),
    ],
)
def test_what_is_wrong_or_fits_any_message_is_refused(pattern: str) -> None:
    with pytest.raises(Refused) as refused:
        check_pattern(pattern)

    assert refused.value.hint


@given(st.text(max_size=limits.PATTERN_CHARACTERS))
def test_any_text_is_a_pattern_or_is_refused(pattern: str) -> None:
    try:
        check_pattern(pattern)
    except Refused:
        return
    matches(pattern, "whatever\n" * 10)


BOMBS = [
    (".*".join("a" * 85), "a" * limits.TEXT_BYTES),
    ("a" * 250 + "b", "a" * limits.TEXT_BYTES),
    (".*".join(["aa", *"a" * 80, "b"]), "a" * limits.TEXT_BYTES),
    (r"\w" * 120 + "!", "a" * limits.TEXT_BYTES),
    ("|".join(["a.*a.*b"] * 32), "a" * limits.TEXT_BYTES),
]


@pytest.mark.parametrize(("pattern", "text"), BOMBS)
def test_no_pattern_and_no_text_make_it_slow(pattern: str, text: str) -> None:
    """What grows with the square of the text takes minutes here, what grows faster years."""
    began = time.process_time()

    matches(check_pattern(pattern), text)

    assert time.process_time() - began < 1
