"""Calls to the router that survive its restarts: Varlink, JSON messages ended by NUL."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from . import journal

PROTOCOL = 1
VERSION = "0.1.0"
MAX_MESSAGE_BYTES = 1024 * 1024  # io.nanoclaw.Agent; the router refuses longer ones
# The listener outlives the router, so a call may be accepted by nobody for as long as a restart takes.
REPLY_TIMEOUT_S = 20.0
_INTERFACE = "io.nanoclaw.Agent."
_READ_BYTES = 64 * 1024
_FIRST_WAIT_S = 0.02
_LONGEST_WAIT_S = 5.0
_ONEWAY_WAIT_S = 0.05
_STOPPING_S = 0.25  # how late it may be noticed that a turn is to stop


class HostAway(Exception):
    """The router is not there (any more): connect again, then say the same again."""


class HostError(Exception):
    """The router answered with an error of the contract."""

    def __init__(self, name: str, parameters: object) -> None:
        super().__init__(f"{name} {parameters}" if parameters else name)
        self.name = name.removeprefix(_INTERFACE)  #: e.g. "NoSuchTurn"
        said = parameters if isinstance(parameters, dict) else {}
        #: What is to be done about it, too, in a line; "" if the router does not say.
        self.text = ": ".join(str(said[key]) for key in ("message", "hint") if said.get(key))


class MessageTooLong(ValueError):
    """The message would be over MAX_MESSAGE_BYTES; nothing was sent."""


class Connection:
    """One connection to the router. Its failures are HostAway; one thread at a time may use it."""

    def __init__(self, path: str) -> None:
        """Connect and say hello. Raises HostError, too."""
        self._buffer = b""
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(REPLY_TIMEOUT_S)
        self.fileno, self.close = self._sock.fileno, self._sock.close
        try:
            self._try(self._sock.connect, path)
            self.send("Hello", {"protocol": PROTOCOL, "version": VERSION})
            self.greeting = self.receive()
        except BaseException:
            self.close()
            raise

    def send(self, method: str, parameters: dict[str, Any], **flags: bool) -> None:
        """Send a call; flags are "more" and "oneway". Raises MessageTooLong."""
        call = {"method": _INTERFACE + method, "parameters": parameters, **flags}
        # A model may write half of a surrogate pair, which is no UTF-8; ensure_ascii would let it through.
        data = json.dumps(call, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
        if len(data) > MAX_MESSAGE_BYTES:
            raise MessageTooLong(f"the message is too long: {len(data)} bytes")
        self._try(self._sock.sendall, data + b"\0")

    def receive(self) -> dict[str, Any]:
        """Wait for the next reply, and return its parameters. Raises HostError."""
        while (reply := self.take()) is None:
            self.read()
        return reply

    def read(self) -> None:
        """Read once. Waits at most REPLY_TIMEOUT_S if nothing has arrived yet."""
        data = self._try(self._sock.recv, _READ_BYTES)
        if not data:
            raise HostAway("the router closed the connection")
        self._buffer += data

    def take(self) -> dict[str, Any] | None:
        """Return the parameters of the next complete reply, None if there is none. Raises HostError."""
        raw, end, rest = self._buffer.partition(b"\0")
        if not end:
            return None
        self._buffer = rest
        reply: dict[str, dict[str, Any]] = json.loads(raw)
        parameters = reply.get("parameters", {})
        if "error" in reply:
            error = HostError(str(reply["error"]), parameters)
            # E.g. its disk is full: whoever says the same again later is understood.
            raise HostAway(str(error)) if error.name == "Unavailable" else error
        return parameters

    def _try(self, operation: Callable[[Any], Any], argument: object) -> Any:
        try:
            return operation(argument)
        except OSError as exc:
            raise HostAway(str(exc)) from exc


def backoff() -> Iterator[None]:
    """Wait at each next(): 20 ms, then twice as long each time, up to 5 s."""
    wait_s = _FIRST_WAIT_S
    while True:
        time.sleep(wait_s)  # signals end it: their handler ends the process
        wait_s = min(wait_s * 2, _LONGEST_WAIT_S)
        yield


class Host:
    """The second connection of a runner: every call but Work(), from any thread, one at a time."""

    def __init__(self, path: str) -> None:
        self.is_muted = False  #: this process is being ended; what now fails in it is of no interest
        self._path = path
        self._lock = threading.Lock()
        self._connection: Connection | None = None

    def open(self) -> None:
        """Connect, if that is needed and possible."""
        with self._lock, contextlib.suppress(HostAway, HostError):
            self._connected()

    def call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """Call until it is answered, however long the router is away: each call may be repeated.

        Raises HostError, MessageTooLong.
        """
        waits = backoff()
        while True:
            try:
                return self.call_once(method, parameters)
            except HostAway as exc:
                journal.debug("host-away", method=method, reason=exc)
                next(waits)

    def call_once(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """Call once. Raises HostAway, HostError, MessageTooLong."""
        with self._lock:
            return self._say(method, parameters)

    def call_apart(
        self, method: str, parameters: dict[str, Any], stopping: threading.Event
    ) -> dict[str, Any] | None:
        """Call on a connection of its own, and wait as long as that takes: others are not held up.

        Returns None as soon as `stopping` is set. Raises HostError, MessageTooLong.
        """
        waits = backoff()
        while not stopping.is_set():
            try:
                with contextlib.closing(Connection(self._path)) as connection:
                    connection.send(method, parameters)
                    while (reply := connection.take()) is None and not stopping.is_set():
                        if select.select([connection], [], [], _STOPPING_S)[0]:
                            connection.read()
                    return reply
            except HostAway as exc:
                journal.debug("host-away", method=method, reason=exc)
                next(waits)
        return None

    def tell(self, method: str, parameters: dict[str, Any]) -> None:
        """Say something that may be lost: without a reply, and not at all while the router is away.

        Nothing here waits for the router, or a model's stream would wait with it.
        """
        if self._lock.acquire(timeout=_ONEWAY_WAIT_S):
            try:
                if self._connection is not None and not self.is_muted:
                    with contextlib.suppress(HostAway):
                        self._say(method, parameters, oneway=True)
            finally:
                self._lock.release()

    def _say(self, method: str, parameters: dict[str, Any], **flags: bool) -> dict[str, Any]:
        try:
            connection = self._connected()
            connection.send(method, parameters, **flags)
            return {} if "oneway" in flags else connection.receive()
        except HostAway:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            raise

    def _connected(self) -> Connection:
        if self.is_muted:
            threading.Event().wait()  # the process ends under us
        if self._connection is None:
            self._connection = Connection(self._path)
        return self._connection
