"""A Varlink client over asyncio, with descriptors: NUL-terminated JSON on a Unix socket.

Source: https://varlink.org; descriptors travel with the first byte of their message (man 3 cmsg,
SCM_RIGHTS).
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any

Json = dict[str, Any]

MESSAGE_BYTES = 4 * 1024 * 1024  #: the longest message that is read; the router's own limit is lower
FDS = 16  #: descriptors that one message may carry
READ_BYTES = 65536


class RouterAway(Exception):
    """The router cannot be reached, or hung up; try again later."""


class CallError(Exception):
    """The router answered a call with an error."""

    def __init__(self, name: str, parameters: Json) -> None:
        super().__init__(str(parameters.get("message") or name))
        self.name = name.rsplit(".", 1)[-1]  #: e.g. "Unavailable"
        self.parameters = parameters


class Connection:
    """One connection; calls on it are answered in order, so it has one caller at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._fds: list[int] = []

    @classmethod
    async def open(cls, path: str) -> Connection:
        """Connect to the socket `path`. Raises RouterAway."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            await asyncio.get_running_loop().sock_connect(sock, path)
        except BaseException as exc:  # a cancel too: nobody else knows of the socket
            sock.close()
            if isinstance(exc, OSError):
                raise RouterAway(f"cannot connect to '{path}': {exc.strerror}") from exc
            raise
        return cls(sock)

    def close(self) -> None:
        """Close it, and descriptors that nobody took."""
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        self._sock.close()

    async def call(self, method: str, parameters: Json, fds: Sequence[int] = ()) -> Json:
        """Return the reply's parameters. Raises CallError, RouterAway."""
        await self._send({"method": method, "parameters": parameters}, fds)
        return _unpack(await self._receive())

    async def call_for_fd(self, method: str, parameters: Json) -> int:
        """Return the descriptor that came with the reply; the caller closes it.

        Raises CallError, RouterAway.
        """
        await self.call(method, parameters)
        if len(self._fds) != 1:
            raise RouterAway(f"{method}: came with {len(self._fds)} descriptors in place of one")
        return self._fds.pop()

    async def stream(self, method: str, parameters: Json) -> AsyncIterator[Json]:
        """Yield the parameters of each reply. Raises CallError, RouterAway."""
        await self._send({"method": method, "parameters": parameters, "more": True}, ())
        while True:
            reply = await self._receive()
            yield _unpack(reply)
            if not reply.get("continues"):
                return

    async def _send(self, message: Json, fds: Sequence[int]) -> None:
        data = json.dumps(message, ensure_ascii=False).encode() + b"\0"
        try:
            if fds:
                # The other side has answered all that came before, so there is room for a byte.
                socket.send_fds(self._sock, [data[:1]], fds)
                data = data[1:]
            await self._loop.sock_sendall(self._sock, data)
        except OSError as exc:
            raise RouterAway(f"the router hung up: {exc.strerror}") from exc

    async def _receive(self) -> Json:
        scanned = 0
        while (end := self._buffer.find(b"\0", scanned)) < 0:
            scanned = len(self._buffer)
            if scanned > MESSAGE_BYTES:
                raise RouterAway("the router's message is too long")
            await _readable(self._sock)
            try:
                data, fds, _, _ = socket.recv_fds(self._sock, READ_BYTES, FDS, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                continue
            except OSError as exc:
                raise RouterAway(f"the connection broke: {exc.strerror}") from exc
            self._fds += fds
            if not data:
                raise RouterAway("the router hung up")
            self._buffer += data
        message = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        reply = json.loads(message)
        if not isinstance(reply, dict):
            raise RouterAway("the router's message is no object")
        return reply


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(sock, wake)
    try:
        await ready
    finally:
        loop.remove_reader(sock)


def _unpack(reply: Json) -> Json:
    parameters: Json = reply.get("parameters") or {}
    if "error" in reply:
        raise CallError(str(reply["error"]), parameters)
    return parameters
