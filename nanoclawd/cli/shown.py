"""Which deliveries were shown, so that none is shown twice, not even after a kill -9 before its report."""

from __future__ import annotations

import os
from pathlib import Path

from nanoclawd import paths

KEEP = 500  #: keys in the file when it is read; unreported deliveries are few


def shown_file() -> Path:
    return paths.state() / "terminal" / "shown"


class Shown:
    """The keys of deliveries that were printed. A file that cannot be kept costs only this safety."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                keys = file.read(KEEP << 10).split("\n")[:-1]  # a last line without its end was not finished
        except OSError:
            keys = []
        self._keys = set(keys)
        if len(keys) > 2 * KEEP:
            self._write("".join(f"{key}\n" for key in keys[-KEEP:]), os.O_TRUNC)

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def add(self, key: str) -> None:
        """Remember `key`; call it as soon as the text is out. Another terminal's additions stay."""
        self._keys.add(key)
        if "\n" not in key:
            self._write(f"{key}\n", os.O_APPEND)

    def _write(self, text: str, flag: int) -> None:
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # One write(2) of a short line to a file opened for appending is not mixed with another's.
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | flag, 0o600)
            try:
                os.write(descriptor, text.encode())
            finally:
                os.close(descriptor)
        except OSError:
            pass
