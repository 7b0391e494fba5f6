"""A few lines at the end of a terminal's output that change while something goes on."""

from __future__ import annotations

import os
import shutil
import time
from typing import TextIO

from nanoclawd.cli import output, text

PREVIEW_ROWS = 8  #: of the reply to come
PREVIEW_CHARACTERS = 8192
REDRAW_S = 0.05  #: a fast stream is drawn no faster


class Screen:
    """Shows what an agent does in lines that vanish when the reply comes.

    The pieces of a reply are transient: some may be missing, some may belong to no reply. So they are only a
    preview, cut to a few rows that can always be erased; the reply itself is printed once, whole, below.
    """

    def __init__(self, stream: TextIO, *, preview: bool) -> None:
        self._stream = stream
        self._preview = preview
        self._live = stream.isatty() and os.environ.get("TERM") not in (None, "", "dumb")
        self._drawn: list[str] = []  #: the rows on the screen at present
        self._drawn_at = 0.0
        self._began_at = time.monotonic()
        self._status = ""
        self._text = ""

    def begin(self, status: str) -> None:
        """Start to show what goes on, and the time that it takes."""
        self._began_at = time.monotonic()
        self._text = ""
        self.set_status(status)

    def set_status(self, status: str) -> None:
        self._status = text.one_line(status)
        self._draw()

    def add_text(self, piece: str) -> None:
        """Add a piece of the reply to come to the preview."""
        if self._preview:
            self._text = (self._text + text.visible(piece))[-PREVIEW_CHARACTERS:]
            self.tick()

    def tick(self) -> None:
        """Bring time and preview up to date, unless that was just done."""
        if self._status and time.monotonic() - self._drawn_at >= REDRAW_S:
            self._draw()

    def erase(self) -> None:
        """Take the changing lines away; what is printed next takes their place."""
        if self._drawn:
            self._stream.write(self._to_first_row())
            self._stream.flush()
            self._drawn = []

    def end(self) -> None:
        """Erase, and show nothing until begin()."""
        self.erase()
        self._status = self._text = ""

    def _to_first_row(self) -> str:
        up = f"\x1b[{len(self._drawn) - 1}A" if len(self._drawn) > 1 else ""
        return f"{up}\r\x1b[J"

    def _draw(self) -> None:
        if not self._live:
            return
        columns, lines = shutil.get_terminal_size()
        cells = max(columns - 1, 8)
        seconds = time.monotonic() - self._began_at
        status = f"{self._status} ({output.duration(seconds)})" if seconds >= 2 else self._status
        rows = _wrap(self._text, cells)[-min(PREVIEW_ROWS, max(lines - 2, 0)) :] if self._text else []
        rows.append(text.cut(f"· {status}", cells))
        self._drawn_at = time.monotonic()
        if rows == self._drawn:
            return
        before = self._to_first_row() if self._drawn else "\r"
        # One write, so that a terminal has no chance to show the gap.
        self._stream.write(before + "\n".join(output.colour(output.DIM, row, self._stream) for row in rows))
        self._stream.flush()
        self._drawn = rows


def _wrap(words: str, cells: int) -> list[str]:
    """Return `words` in rows of at most `cells` cells."""
    rows = []
    for line in words.expandtabs(4).rstrip("\n").split("\n")[-PREVIEW_ROWS:]:
        row, used = "", 0
        for char in line:
            size = text.width(char)
            if used + size > cells:
                rows.append(row)
                row, used = "", 0
            row, used = row + char, used + size
        rows.append(row)
    return rows
