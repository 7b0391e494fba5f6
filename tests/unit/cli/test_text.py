"""What agents say cannot drive a terminal, whatever it is."""

from __future__ import annotations

import json
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from nanoclawd.cli import output, text

ANY = st.text(st.characters(exclude_categories=[]))  # halves of surrogate pairs too


@given(ANY)
def test_nothing_that_a_terminal_obeys_is_left(words: str) -> None:
    shown = text.visible(words)

    shown.encode()  # no half of a pair
    for char in shown:
        assert char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp")
        assert unicodedata.bidirectional(char) not in (
            "LRE",
            "RLE",
            "PDF",
            "LRO",
            "RLO",
            "LRI",
            "RLI",
            "FSI",
            "PDI",
        )


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Zs"])))
def test_what_can_be_seen_stays_as_it_is(words: str) -> None:
    assert text.visible(words) == words


@given(ANY)
def test_json_holds_the_exact_text_and_is_as_harmless(words: str) -> None:
    shown = text.visible_json(json.dumps({"text": words}, ensure_ascii=False))

    assert json.loads(shown) == {"text": words}
    assert text.visible(shown) == shown


@given(ANY, st.integers(1, 40))
def test_cut_text_fits(words: str, cells: int) -> None:
    assert text.width(text.cut(text.one_line(words), cells)) <= cells


def test_wide_and_joining_characters_are_counted_as_terminals_do() -> None:
    assert [text.width(words) for words in ("ab", "漢字", "e\u0301", "a\u200db")] == [2, 4, 1, 2]


def test_sizes_and_spans_are_written_as_people_do() -> None:
    assert [output.size(count) for count in (None, 0, 1023, 1536, 300 << 20)] == [
        "-",
        "0B",
        "1023B",
        "1.5K",
        "300M",
    ]
    assert [output.duration(s) for s in (0, 61, 90_000)] == ["0 s", "1 min 1 s", "1 d 1 h"]
