"""What is a command in a chat."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoclawd.commands import COMMANDS, Said, parse, unescape


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("/help", Said("help", "")),
        ("  /STOP  berta \n", Said("stop", "berta")),
        ("/approve\na12", Said("approve", "a12")),
        ("/hlep", Said("hlep", "")),
        ("/tmp", Said("tmp", "")),
        ("/tmp is full", None),
        ("/etc/passwd", None),
        ("/stop/it", None),
        ("//help", None),
        ("say /help", None),
        ("> /help", None),
        ("@berta /help", None),
        ("/", None),
        ("/ help", None),
        ("/" + "x" * 33, None),
        ("/ﬀ", None),
        ("", None),
    ],
)
def test_what_is_a_command(text: str, said: Said | None) -> None:
    assert parse(text) == said


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("//help", "/help"),
        (" //stop berta", "/stop berta"),
        ("//server/share", "//server/share"),
        ("///help", "///help"),
        ("/tmp is full", "/tmp is full"),
        ("hello", "hello"),
    ],
)
def test_one_more_slash_makes_it_a_message(text: str, meant: str) -> None:
    assert unescape(text) == meant


@given(st.text())
def test_whatever_is_written_can_be_said_to_an_agent(text: str) -> None:
    escaped = f"/{text.lstrip()}" if parse(text) else text

    assert parse(escaped) is None
    assert unescape(escaped).strip() in (text.strip(), text.strip()[1:] if text.strip()[:2] == "//" else "")


def test_each_command_is_its_own_word() -> None:
    assert all(parse(f"/{word} x") == Said(word, "x") for word in COMMANDS)
