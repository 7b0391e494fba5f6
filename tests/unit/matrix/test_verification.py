"""Verification by emoji: what both sides read."""

from __future__ import annotations

from nanoclaw_matrix.verification import NAMES, describe


def test_emoji_are_called_as_the_specification_does() -> None:
    shown = [describe(index) for index in range(64)]

    assert (shown[0], shown[34], shown[36], shown[53]) == (
        "🐶 Dog",
        "🔧 Spanner",
        "👍 Thumbs Up",
        "✈️ Aeroplane",
    )
    assert len({*shown}) == 64
    assert not {line.split(" ", 1)[1] for line in shown} & NAMES.keys()
