"""The line that the person types: editing, history, and interruption by what must be shown above it."""

from __future__ import annotations

import os
import re
import readline
import select
import shutil
import signal
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from nanoclawd.cli import output, text

HISTORY = 1000  #: entries kept
HISTORY_CHARACTERS = 4096  #: a longer entry, e.g. a pasted file, is not kept
PASTE_S = 0.05  #: what follows a line within this time was not typed
WAKE_AGAIN_S = 0.02


class Woken(Exception):
    """Something is there to be shown. What was typed is there again at the next read()."""


class Prompt:
    """Reads lines with readline(3). Only one, and only in the main thread, because it uses signals."""

    def __init__(self, words: str, history: Path, *, is_waiting: Callable[[], bool]) -> None:
        """`is_waiting` says whether something is there to be shown already."""
        self.words = words
        self.typed = ""  #: what the next read() begins with
        self.dropped = False  #: the last KeyboardInterrupt threw away what was typed
        self._history = history
        self._is_waiting = is_waiting
        self._away = threading.Event()  #: read() is not called
        self._away.set()
        self._in_line = False  #: readline waits for keys, and can be interrupted
        self._main = threading.main_thread().ident or 0
        # Pasted lines stay together. Python switches this off, as its own prompt cannot take it.
        readline.parse_and_bind("set enable-bracketed-paste on")
        readline.parse_and_bind("tab: self-insert")
        readline.set_startup_hook(self._start_line)
        signal.signal(signal.SIGUSR1, self._on_wake)
        self._load()

    def wake(self) -> None:
        """Let read() raise Woken, if it is waiting; from another thread. Returns when that has happened."""
        # Again and again, since a signal may come when it cannot act: readline drops exceptions while it
        # starts, and looks for signals only when one interrupts its select(2), not when one came before.
        while not self._away.is_set():
            signal.pthread_kill(self._main, signal.SIGUSR1)
            self._away.wait(WAKE_AGAIN_S)

    def read(self) -> str:
        """Return what the person typed, without the final line end; several lines if they were pasted.

        Raises EOFError if the person leaves, KeyboardInterrupt, and Woken.
        """
        before = readline.get_current_history_length()
        lines: list[str] = []
        while True:
            try:
                line = self._read_line(self.words if not lines else "… ")
            except Woken:
                self.typed = "\n".join([*lines, self.typed])
                raise
            except KeyboardInterrupt:
                self.dropped = bool(lines or readline.get_line_buffer())
                raise
            more = line.endswith("\\")
            lines.append(line[:-1] if more else line)
            if not more and not select.select([sys.stdin], [], [], PASTE_S)[0]:
                break
        entry = "\n".join(lines)
        if len(lines) > 1:
            for number in reversed(range(before, readline.get_current_history_length())):
                readline.remove_history_item(number)
            readline.add_history(entry)
        if entry.strip():
            self._save()
        return entry

    def _read_line(self, words: str) -> str:
        # Invariant: who adds something to show does so before wake(). So it is seen here, or it interrupts.
        self._away.clear()
        begun = False
        before = readline.get_current_history_length()
        try:
            if self._is_waiting():
                raise Woken
            begun = True
            return input(words)
        except Woken:
            if begun:
                # The line was complete, and the signal came before input() could return it?
                if not self.typed and readline.get_current_history_length() > before:
                    return readline.get_history_item(before + 1)
                self._erase(words)
            raise
        finally:
            self._in_line = False
            self._away.set()

    def _on_wake(self, _signal: int, _frame: FrameType | None) -> None:
        if self._in_line:
            self._in_line = False
            self.typed = readline.get_line_buffer()
            raise Woken

    def _start_line(self) -> None:
        readline.insert_text(self.typed)
        self.typed = ""
        self._in_line = True  # last: from here on an exception is not dropped

    def _erase(self, words: str) -> None:
        """Take prompt and typed text off the screen; the cursor is taken to be at the end."""
        columns = shutil.get_terminal_size().columns
        rows = [
            text.width(text.visible(row)) // columns for row in f"{_plain(words)}{self.typed}".split("\n")
        ]
        up = sum(rows) + len(rows) - 1
        sys.stdout.write((f"\x1b[{up}A" if up else "") + "\r\x1b[J")
        sys.stdout.flush()

    def _load(self) -> None:
        try:
            with open(self._history, encoding="utf-8", errors="replace") as file:
                for line in file.readlines(HISTORY * HISTORY_CHARACTERS)[-HISTORY:]:
                    readline.add_history(_ESCAPE.sub(_unescape, line.rstrip("\n")))
        except OSError:
            pass

    def _save(self) -> None:
        """Write the history; without it the chat is as good, so that failures do not matter."""
        last = readline.get_current_history_length()
        entries = [
            readline.get_history_item(number) for number in range(max(1, last - HISTORY + 1), last + 1)
        ]
        lines = [
            entry.replace("\\", "\\\\").replace("\n", "\\n") + "\n"
            for entry in entries
            if entry and len(entry) <= HISTORY_CHARACTERS
        ]
        draft = self._history.with_name(f".{self._history.name}.{os.getpid()}")
        try:
            self._history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with open(descriptor, "w", encoding="utf-8", errors="replace") as file:
                file.writelines(lines)
            draft.replace(self._history)
        except OSError:
            pass


_ESCAPE = re.compile(r"\\(.)")


def _unescape(found: re.Match[str]) -> str:
    return "\n" if found[1] == "n" else found[1]


def styled(words: str) -> str:
    """Return a prompt in bold, with the marks that tell readline which characters take no room."""
    bold = output.colour(output.BOLD, "\0")
    before, _, after = bold.partition("\0")
    return f"\x01{before}\x02{words}\x01{after}\x02" if before else words


def _plain(words: str) -> str:
    """Return a prompt without what takes no room."""
    while "\x01" in words:
        before, _, rest = words.partition("\x01")
        words = before + rest.partition("\x02")[2]
    return words


@contextmanager
def no_echo() -> Iterator[None]:
    """Keep what is typed meanwhile for the next prompt, instead of showing it in the middle of something."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(descriptor, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)
