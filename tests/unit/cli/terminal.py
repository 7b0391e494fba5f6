"""A terminal with a person at it: nanoclawctl on a real pty, keys in, screen out."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import termios
import time
from pathlib import Path

from tests.unit.cli.conftest import COMMAND

WITHIN_S = 15.0


class Terminal:
    """One nanoclawctl on a pty. `output` is all that it wrote, escape sequences and all."""

    def __init__(self, *arguments: str, columns: int = 80) -> None:
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, columns))
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            # Its controlling terminal, so that Ctrl-C is a signal.
            preexec_fn=lambda: _take_terminal(),
        )
        os.close(slave)
        self.output = ""
        self._seen = 0
        self._bytes = b""

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait(self, text: str) -> str:
        """Wait until `text` appears behind what was waited for before; return what stood between."""
        until = time.monotonic() + WITHIN_S
        while (found := self.output.find(text, self._seen)) < 0:
            left_s = until - time.monotonic()
            assert left_s > 0, f"{text!r} does not appear in {self.output[self._seen :]!r}"
            assert self._read(left_s), f"it ended without {text!r}: {self.output[self._seen :]!r}"
        between = self.output[self._seen : found]
        self._seen = found + len(text)
        return between

    def end(self) -> int:
        """Wait for the end, and return the exit code."""
        while self._read(WITHIN_S):
            pass
        return self.process.wait(WITHIN_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        if self._master >= 0:
            os.close(self._master)
            self._master = -1

    def interrupt(self) -> None:
        """Type Ctrl-C when readline waits: a moment before, it does nothing until the next key."""
        until = time.monotonic() + WITHIN_S
        stat = Path(f"/proc/{self.process.pid}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < until, "it does not wait for keys"
            time.sleep(0.005)
        self.type("\x03")

    def is_echoing(self) -> bool:
        return bool(termios.tcgetattr(self._master)[3] & termios.ECHO)

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self._master], [], [], timeout_s)[0]:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # EIO: nobody has the other side open any more
            return False
        self._bytes += data
        self.output = self._bytes.decode(errors="replace")
        return True


def _take_terminal() -> None:
    import fcntl

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
