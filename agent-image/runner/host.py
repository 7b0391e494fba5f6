"""Calls to the router that survive its restarts."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

from . import journal
from .protocol import PROTOCOL, VERSION, Settings, parse_settings
from .wire import Connection, HostAway, HostError, render_call

# The listener outlives the router, so a call may be accepted by nobody for as long as a restart takes.
REPLY_TIMEOUT_S = 20.0
_FIRST_WAIT_S = 0.02
_LONGEST_WAIT_S = 5.0
_ONEWAY_WAIT_S = 0.05


def open_greeted(path: str) -> tuple[Connection, Settings]:
    """Connect and say hello. Raises HostAway, HostError."""
    connection = Connection.open(path, REPLY_TIMEOUT_S)
    try:
        connection.send(render_call("Hello", {"protocol": PROTOCOL, "version": VERSION}))
        return connection, parse_settings(connection.receive())
    except BaseException:
        connection.close()
        raise


class Backoff:
    """How long to wait before connecting again: 20 ms, doubled each time up to 5 s."""

    def __init__(self) -> None:
        self._next_s = _FIRST_WAIT_S

    def wait(self) -> None:
        time.sleep(self._next_s)  # signals end it: their handler ends the process
        self._next_s = min(self._next_s * 2, _LONGEST_WAIT_S)

    def reset(self) -> None:
        self._next_s = _FIRST_WAIT_S


class Host:
    """The second connection of a runner: every call but Work(), from any thread, one at a time."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._is_muted = False

    def mute(self) -> None:
        """Say nothing more: this process is being ended, and what now fails in it is of no interest."""
        self._is_muted = True

    def open(self) -> None:
        """Connect, if that is needed and possible."""
        with self._lock, contextlib.suppress(HostAway, HostError):
            self._connected()

    def call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """Call until it is answered, however long the router is away: each call may be repeated.

        Raises HostError, wire.MessageTooLong.
        """
        data = render_call(method, parameters)
        backoff = Backoff()
        while True:
            try:
                return self._call_once(data)
            except HostAway as exc:
                journal.debug("host-away", method=method, reason=exc)
                backoff.wait()

    def try_call(self, method: str, parameters: dict[str, Any]) -> bool:
        """Call once; say whether it was answered. Raises HostError."""
        try:
            self._call_once(render_call(method, parameters))
        except HostAway:
            return False
        return True

    def tell(self, method: str, parameters: dict[str, Any]) -> None:
        """Say something that may be lost: without a reply, and not at all while the router is away.

        Nothing here waits for the router, or a model's stream would wait with it.
        """
        if not self._lock.acquire(timeout=_ONEWAY_WAIT_S):
            return
        try:
            if self._connection is not None and not self._is_muted:
                self._connection.send(render_call(method, parameters, oneway=True))
        except HostAway:
            self._drop()
        finally:
            self._lock.release()

    def _call_once(self, data: bytes) -> dict[str, Any]:
        with self._lock:
            try:
                connection = self._connected()
                connection.send(data)
                return connection.receive()
            except HostAway:
                self._drop()
                raise

    def _connected(self) -> Connection:
        if self._is_muted:
            threading.Event().wait()  # the process ends under us
        if self._connection is None:
            self._connection, _ = open_greeted(self._path)
        return self._connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
