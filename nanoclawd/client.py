"""A blocking Varlink client for short-lived programs, which need no event loop."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from nanoclawd import limits, wire
from nanoclawd.errors import Unavailable
from nanoclawd.wire import Json, unpack


class Client:
    """One connection to a Varlink service; calls on it are answered in order. Use as a context manager."""

    def __init__(self, path: Path, *, timeout_s: float | None = None) -> None:
        """Connect to the socket `path`. Raises Unavailable. `timeout_s` bounds each wait for a reply."""
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._buffer = b""
        self._sock.settimeout(timeout_s)
        try:
            self._sock.connect(os.fspath(path))
        except OSError as exc:
            self._sock.close()
            raise Unavailable(
                f"cannot connect to '{path}': {exc.strerror}",
                hint="try 'systemctl --user start nanoclaw', then 'nanoclawctl doctor'",
            ) from exc

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._sock.close()

    def call(self, method: str, parameters: Json | None = None, fds: Sequence[int] = ()) -> Json:
        """Return the reply's parameters; `fds` go with the call. Raises VarlinkError, Unavailable."""
        self._send({"method": method, "parameters": parameters or {}}, fds)
        return unpack(self._receive())

    def stream(self, method: str, parameters: Json | None = None) -> Iterator[Json]:
        """Send the call at once; yield the parameters of each reply. Raises VarlinkError, Unavailable."""
        self._send({"method": method, "parameters": parameters or {}, "more": True})
        return self._replies()

    def _replies(self) -> Iterator[Json]:
        while True:
            reply = self._receive()
            yield unpack(reply)
            if not reply.get("continues"):
                return

    def _send(self, message: Json, fds: Sequence[int] = ()) -> None:
        data = wire.encode(message) + b"\0"
        try:
            if fds:
                socket.send_fds(self._sock, [data[:1]], fds)
                data = data[1:]
            self._sock.sendall(data)
        except OSError as exc:
            raise Unavailable(f"the other side hung up: {exc.strerror}") from exc

    def _receive(self) -> Json:
        while b"\0" not in self._buffer:
            try:
                data = self._sock.recv(65536)
            except TimeoutError as exc:
                raise Unavailable("no answer in time", hint="see 'journalctl --user -u nanoclaw'") from exc
            except OSError as exc:
                raise Unavailable(f"the connection broke: {exc.strerror}") from exc
            if not data:
                raise Unavailable("the other side hung up", hint="see 'journalctl --user -u nanoclaw'")
            self._buffer += data
            if len(self._buffer) > 2 * limits.MESSAGE_BYTES:
                raise Unavailable("the answer is too long")
        message, _, self._buffer = self._buffer.partition(b"\0")
        try:
            return wire.decode(message)
        except wire.WireError as exc:
            raise Unavailable(f"the answer cannot be read: {exc}") from exc
