"""A credential in an answer is covered, however the answer is cut into pieces."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from nanoclawd.gateway.redact import Redactor

SECRET = b"aab-aaab"
TEXTS = st.lists(st.sampled_from([b"a", b"aa", b"b", b"-", b"A", b"x", SECRET, SECRET.upper()])).map(
    b"".join
)


@given(TEXTS, st.lists(st.integers(0, 60)))
def test_secret_is_covered_across_pieces_and_nothing_else_is(text: bytes, cuts: list[int]) -> None:
    redactor = Redactor([SECRET, SECRET + b"-long"])
    places = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]

    pieces = [redactor.feed(text[a:b]) for a, b in pairwise(places)]
    shown = b"".join(pieces) + redactor.end()

    assert len(shown) == len(text)
    assert SECRET not in shown.lower()
    assert all(s in (t, ord("*")) for s, t in zip(shown, text, strict=True))
    if SECRET not in text.lower():
        assert shown == text


def test_what_cannot_be_the_beginning_of_a_secret_passes_at_once() -> None:
    assert Redactor([b"sk-ant-1"]).feed(b"data: {}\n\n") == b"data: {}\n\n"


def test_without_a_secret_everything_passes() -> None:
    redactor = Redactor([])

    assert (redactor.feed(b"abc"), redactor.end(), redactor.holds(b"")) == (b"abc", b"", False)
