"""Kill points: where a life of the router can be made to end, counted and injected from outside the product.

A point lies before and after each COMMIT, before, in the middle of and after each send on a socket of ours,
and before and after each thing said to systemd. The product knows nothing of it: what it calls is wrapped.
"""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import threading
from collections.abc import Callable
from enum import StrEnum
from typing import Any, TypeVar

T = TypeVar("T")


class Kind(StrEnum):
    """What the process was about when it died."""

    BEFORE_COMMIT = "before a COMMIT"
    AFTER_COMMIT = "right after a COMMIT"
    BEFORE_SEND = "before a send"
    IN_SEND = "in the middle of a send"
    AFTER_SEND = "after a send"
    BEFORE_SYSTEMD = "before a call to systemd"
    AFTER_SYSTEMD = "after a call to systemd"


class Points:
    """Counts the points of this process, and kills it at one of them."""

    def __init__(self, kill_at: int | None, last_words: Callable[[int, Kind, str], None]) -> None:
        self.count = 0
        self._counting = threading.Lock()
        self._kill_at = kill_at
        self._last_words = last_words  #: tells the driver; no part of the life that ends

    def reach(self, kind: Kind, what: str, *, dying: Callable[[], object] = lambda: None) -> None:
        """Die here if this is the point, and do `dying` before."""
        with self._counting:  # the database has a thread of its own
            self.count += 1
            last = self.count == self._kill_at
        if last:
            dying()
            self._last_words(self.count, kind, what)
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()  # in another thread than the one that the signal was given to

    def around(self, before: Kind, after: Kind, what: str, action: Callable[[], T]) -> T:
        self.reach(before, what)
        result = action()
        self.reach(after, what)
        return result

    def send(self, what: str, data: Any, send: Callable[[Any], T]) -> T:
        """Send `data`; if this process dies in the middle, half of it is on its way."""
        self.reach(Kind.BEFORE_SEND, what)
        self.reach(Kind.IN_SEND, what, dying=lambda: send(memoryview(data)[: len(data) // 2]))
        result = send(data)
        self.reach(Kind.AFTER_SEND, what)
        return result


def inject(points: Points) -> None:
    """Wrap the commits and sends of this process, for good."""
    wrap_commits(points)
    _wrap_sends(points)


def wrap_commits(points: Points) -> None:
    class Counted(sqlite3.Connection):
        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            def run() -> sqlite3.Cursor:
                return sqlite3.Connection.execute(self, sql, *parameters)

            if sql != "COMMIT":
                return run()
            return points.around(Kind.BEFORE_COMMIT, Kind.AFTER_COMMIT, "", run)

        def executescript(self, script: str) -> sqlite3.Cursor:
            def run() -> sqlite3.Cursor:
                return sqlite3.Connection.executescript(self, script)

            return points.around(Kind.BEFORE_COMMIT, Kind.AFTER_COMMIT, "migration", run)

    real = sqlite3.connect
    sqlite3.connect = lambda *args, **more: real(*args, **{"factory": Counted, **more})


def _wrap_sends(points: Points) -> None:
    def is_ours(sock: socket.socket) -> str:
        """Return the name that a listener gave the socket; pairs, as asyncio has them, have none."""
        if sock.family != socket.AF_UNIX:
            return ""
        try:
            return os.path.basename(str(sock.getsockname() or sock.getpeername()))
        except OSError:  # not connected any more
            return ""

    def wrap(name: str) -> None:
        real = getattr(socket.socket, name)

        def send(sock: socket.socket, data: Any, *args: Any) -> Any:
            if not (path := is_ours(sock)):
                return real(sock, data, *args)
            return points.send(path, data, lambda part: real(sock, part, *args))

        setattr(socket.socket, name, send)

    wrap("send")
    wrap("sendall")
