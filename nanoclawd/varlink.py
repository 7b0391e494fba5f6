"""Varlink connections over asyncio: framing, limits and descriptors; used by servers and by the router as
client.

Sockets are used directly and not through asyncio's streams: these can neither receive descriptors nor leave
an inherited socket's path alone on close. Source: https://varlink.org, systemd's docs/VARLINK.md.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path

from nanoclawd import limits, wire
from nanoclawd.apart import Apart
from nanoclawd.errors import Unavailable
from nanoclawd.sockets import readable
from nanoclawd.wire import Json, unpack


class Connection:
    """A stream socket with NUL-terminated JSON objects; owns the socket and received descriptors.

    max_fds: how many descriptors it takes and holds at a time. apart: where those of somebody untrusted are
    received and closed.
    """

    def __init__(self, sock: socket.socket, *, max_fds: int = 0, apart: Apart | None = None) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.fds: list[int] = []  #: received and not yet taken; take_fd() or close() ends each
        self.traffic = 0  #: bytes that were read and written, for whoever counts them
        self._max_fds = max_fds
        self._apart = apart
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._scanned = 0
        self._writing = asyncio.Lock()

    async def read(self) -> Json | None:
        """Return the next message, or None at the end of the stream.

        Raises wire.WireError: what came is no message, and the connection cannot be used any further if the
        error's path is 'size' or 'descriptor'.
        """
        while True:
            end = self._buffer.find(b"\0", self._scanned)
            self._scanned = len(self._buffer) if end < 0 else end
            if self._scanned > limits.MESSAGE_BYTES:
                self._buffer.clear()
                raise wire.WireError("size", f"a message is longer than {limits.MESSAGE_BYTES} bytes")
            if end >= 0:
                break
            if not await self._receive():
                return None
        message = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._scanned = 0
        return wire.decode(message)

    async def write(self, message: Json, fd: int | None = None) -> None:
        """Send one message, and `fd` with it. Raises OSError; TimeoutError if nobody reads."""
        data = wire.encode(message) + b"\0"
        async with self._writing, asyncio.timeout(limits.SEND_S):
            self.traffic += len(data)
            if fd is not None:
                # A fresh connection's buffer takes the first byte, which carries the descriptor.
                socket.send_fds(self.sock, [data[:1]], [fd])
                data = data[1:]
            await self._loop.sock_sendall(self.sock, data)

    async def wait_gone(self) -> None:
        """Return when the other side has hung up. What it sends meanwhile is kept, within the limit."""
        while len(self._buffer) <= limits.MESSAGE_BYTES:
            if not await self._receive():
                return

    def take_fds(self) -> list[int]:
        """Return all received descriptors, which the caller now owns."""
        fds, self.fds = self.fds, []
        return fds

    def take_fd(self) -> int | None:
        """Return a received descriptor, which the caller now owns, or None."""
        return self.fds.pop(0) if self.fds else None

    def close(self, then: Callable[[], None] = lambda: None) -> None:
        """Close the socket and what was received and not taken; `then` is called when that is done.

        Harmless if repeated.
        """
        fds, self.fds = self.fds, []
        if self._apart is not None and self.sock.fileno() >= 0:
            # The last one: what waits unread in it goes with it.
            self._apart.close(*fds, self.sock.detach(), then=then)
            return
        for fd in fds:
            os.close(fd)
        self.sock.close()
        then()

    async def _receive(self) -> bool:
        """Add what has come to the buffer, once there is something; False at the end of the stream."""
        while True:
            try:
                return self._recv() if self._apart is None else await self._recv_apart(self._apart)
            except (BlockingIOError, InterruptedError):
                await readable(self.sock)
            except OSError:
                return False

    async def _recv_apart(self, apart: Apart) -> bool:
        await readable(self.sock)
        # Should we be cancelled, what has come is in the buffer all the same.
        return await apart.run(self._recv)

    def _recv(self) -> bool:
        data, ancillary, flags, _ = self.sock.recvmsg(
            65536,
            socket.CMSG_LEN(self._max_fds * array.array("i").itemsize) if self._max_fds else 0,
            socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT,
        )
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._keep(array.array("i", payload[: len(payload) // 4 * 4]))
        if flags & socket.MSG_CTRUNC:  # the kernel has closed those for which there was no room
            raise wire.WireError("descriptor", f"more than {self._max_fds} came")
        self.traffic += len(data)
        self._buffer += data
        return bool(data)

    def _keep(self, received: array.array[int]) -> None:
        for fd in received:
            if len(self.fds) < self._max_fds:
                self.fds.append(fd)
            else:
                os.close(fd)


async def connect(path: Path) -> Connection:
    """Return a connection to the socket `path`. Raises Unavailable."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection = Connection(sock)
        await asyncio.get_running_loop().sock_connect(sock, os.fspath(path))
    except BaseException as exc:  # also a cancel: nobody else knows of the socket
        sock.close()
        if isinstance(exc, OSError):
            raise Unavailable(f"cannot connect to '{path}': {exc.strerror}") from exc
        raise
    return connection


async def call(
    connection: Connection, method: str, parameters: Json, *, fd: int | None = None, more: bool = False
) -> Json:
    """Call `method` and return the (first) reply's parameters. Raises VarlinkError, Unavailable."""
    try:
        await connection.write({"method": method, "parameters": parameters, "more": more}, fd)
        reply = await connection.read()
    except (OSError, wire.WireError) as exc:
        raise Unavailable(f"{method}: {exc}") from exc
    if reply is None:
        raise Unavailable(f"{method}: the other side hung up")
    return unpack(reply)
