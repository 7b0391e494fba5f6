"""Varlink on a Unix stream socket: JSON messages ended by NUL, each of bounded size."""

from __future__ import annotations

import json
import socket
from typing import Any

MAX_MESSAGE_BYTES = 1024 * 1024  # io.nanoclaw.Agent; the router refuses longer ones
_READ_BYTES = 64 * 1024


class HostAway(Exception):
    """The router is not there (any more): connect again, then say the same again."""


class HostError(Exception):
    """The router answered with an error of the contract."""

    def __init__(self, name: str, parameters: dict[str, Any]) -> None:
        super().__init__(f"{name} {parameters}" if parameters else name)
        self.name = name.removeprefix("io.nanoclaw.Agent.")  #: e.g. "NoSuchTurn"
        self.parameters = parameters


class MessageTooLong(Exception):
    """The message would be over MAX_MESSAGE_BYTES; nothing was sent."""


def render_call(
    method: str, parameters: dict[str, Any], *, more: bool = False, oneway: bool = False
) -> bytes:
    """Return the bytes of one call of io.nanoclaw.Agent. Raises MessageTooLong."""
    call: dict[str, Any] = {"method": "io.nanoclaw.Agent." + method, "parameters": parameters}
    if more:
        call["more"] = True
    if oneway:
        call["oneway"] = True
    # A model may write half of a surrogate pair, which is no UTF-8; ensure_ascii would smuggle it through.
    data = json.dumps(call, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    if len(data) > MAX_MESSAGE_BYTES:
        raise MessageTooLong(f"{method}: {len(data)} bytes")
    return data + b"\0"


class Connection:
    """One connection to the router. Its failures are HostAway; one thread at a time may use it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()
        self._searched = 0  # no NUL before this offset

    @classmethod
    def open(cls, path: str, timeout_s: float) -> Connection:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.settimeout(timeout_s)
        try:
            sock.connect(path)
        except OSError as exc:
            sock.close()
            raise HostAway(f"{path}: {exc.strerror or exc}") from exc
        return cls(sock)

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    def send(self, data: bytes) -> None:
        try:
            self._sock.sendall(data)
        except OSError as exc:
            raise HostAway(str(exc)) from exc

    def read(self) -> None:
        """Read once. Waits at most the timeout of open() if nothing has arrived yet."""
        try:
            data = self._sock.recv(_READ_BYTES)
        except OSError as exc:
            raise HostAway(str(exc)) from exc
        if not data:
            raise HostAway("the router closed the connection")
        self._buffer += data
        if len(self._buffer) > MAX_MESSAGE_BYTES and b"\0" not in self._buffer:
            raise HostAway("the router sent a message over the limit")

    def take(self) -> dict[str, Any] | None:
        """Return the parameters of the next complete reply, None if there is none. Raises HostError."""
        end = self._buffer.find(b"\0", self._searched)
        if end < 0:
            self._searched = len(self._buffer)
            return None
        raw = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        try:
            reply = json.loads(raw)
        except ValueError as exc:
            raise HostAway("the router sent no JSON") from exc
        if not isinstance(reply, dict):
            raise HostAway("the router sent no JSON object")
        parameters = reply.get("parameters") or {}
        if reply.get("error"):
            raise HostError(str(reply["error"]), parameters)
        return dict(parameters)

    def receive(self) -> dict[str, Any]:
        """Wait for the next reply, and return its parameters. Raises HostError."""
        while (reply := self.take()) is None:
            self.read()
        return reply
