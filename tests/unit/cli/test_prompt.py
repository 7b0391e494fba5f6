"""The line that the person types, where no terminal can be made to do it."""

from __future__ import annotations

import os
import readline
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanoclawd.cli.prompt import Prompt, Woken


@pytest.fixture
def prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Prompt]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    before = signal.getsignal(signal.SIGUSR1)
    reading, writing = os.pipe()
    with open(reading) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        yield Prompt("you> ", is_waiting=lambda: False)
    os.close(writing)
    signal.signal(signal.SIGUSR1, before)
    readline.set_startup_hook(None)
    readline.clear_history()


def as_c_code_does(_: str) -> str:
    """Be interrupted with a result at hand: CPython's _Py_CheckFunctionResult()."""
    try:
        raise Woken
    except Woken as exc:
        raise SystemError("input returned a result with an exception set") from exc


def test_message_comes_in_the_moment_in_which_a_line_is_complete(
    prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    def complete(words: str) -> str:
        readline.add_history("typed")
        return as_c_code_does(words)

    monkeypatch.setattr("builtins.input", complete)

    assert prompt.read() == "typed"


def test_message_comes_in_the_moment_in_which_a_key_does(
    prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    def incomplete(words: str) -> str:
        prompt.typed = "typ"
        return as_c_code_does(words)

    monkeypatch.setattr("builtins.input", incomplete)

    with pytest.raises(Woken):
        prompt.read()

    assert prompt.typed == "typ"
