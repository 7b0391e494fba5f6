"""The line that the person types: editing, history, and interruption by what must be shown above it."""

from __future__ import annotations

import json
import readline
import select
import shutil
import signal
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from nanoclawd.cli import output, text
from nanoclawd.cli.conversation import Lines

HISTORY = 1000  #: entries kept
HISTORY_CHARACTERS = 4096  #: a longer entry, e.g. a pasted file, is not kept
PASTE_S = 0.05  #: what follows a line within this time was not typed
WAKE_AGAIN_S = 0.02


class Woken(Exception):
    """Something is there to be shown. What was typed is there again at the next read()."""


class Prompt:
    """Reads lines with readline(3). Only one, and only in the main thread, because it uses signals."""

    def __init__(self, words: str, *, is_waiting: Callable[[], bool]) -> None:
        """`is_waiting` says whether something is there to be shown already."""
        self._words = words
        self.typed = ""  #: what the next read() begins with
        self.dropped = False  #: the last KeyboardInterrupt threw away what was typed
        self._history = Lines("history", HISTORY)  #: each entry is a JSON string, as it may have lines
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
        for line in self._history.lines:
            with suppress(ValueError):
                readline.add_history(str(json.loads(line)))

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
                line = self._read_line(self._words if not lines else "… ")
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
        if entry.strip() and len(entry) <= HISTORY_CHARACTERS:
            self._history.add(json.dumps(entry))
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
            # The marks tell readline which characters take no room.
            before_words, _, after_words = output.colour(output.BOLD, "\0").partition("\0")
            return input(f"\x01{before_words}\x02{words}\x01{after_words}\x02")
        except (Woken, SystemError) as exc:
            # Raised while C code has a result already, the one comes as the cause of the other.
            if isinstance(exc, SystemError) and not isinstance(exc.__cause__, Woken):
                raise
            if begun:
                # The line was complete, and the signal came before input() could return it?
                if not self.typed and readline.get_current_history_length() > before:
                    return readline.get_history_item(before + 1)
                self._erase(words)
            raise Woken from None
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
        rows = [text.width(text.visible(row)) // columns for row in f"{words}{self.typed}".split("\n")]
        up = sum(rows) + len(rows) - 1
        sys.stdout.write((f"\x1b[{up}A" if up else "") + "\r\x1b[J")
        sys.stdout.flush()


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
