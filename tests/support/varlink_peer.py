"""A Varlink client for tests of our servers: may break every rule, and checks each reply by its contract."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from nanoclawd import paths
from nanoclawd.idl import Interface, Method, read_interface
from nanoclawd.server import SERVICE
from nanoclawd.sockets import readable
from nanoclawd.wire import Json, VarlinkError, unpack

WAIT_S = 30.0  #: only ever reached by a test that fails


def _error_calls(interface: Interface) -> Interface:
    """Return `interface` with its errors as methods, so that their parameters can be checked."""
    methods = {name: Method(type, type) for name, type in interface.errors.items()}
    return Interface(name=interface.name, text="", methods=methods, types=interface.types, errors={})


CONTRACTS = {
    interface.name: interface
    for interface in (
        read_interface(paths.INTERFACES / f"{SERVICE}.varlink"),
        read_interface(paths.INTERFACES / "io.nanoclaw.Agent.varlink"),
        read_interface(paths.INTERFACES / "io.nanoclaw.Channel.varlink"),
    )
}
ERRORS = {name: _error_calls(interface) for name, interface in CONTRACTS.items()}


def check_reply(method: str, reply: Json, contracts: Iterable[Interface] = ()) -> None:
    """Raise WireError or AssertionError if `reply` is not what the contract of `method` allows."""
    known = CONTRACTS | {interface.name: interface for interface in contracts}
    interface_name, _, member = method.rpartition(".")
    assert set(reply) <= {"parameters", "continues", "error"}, reply
    if "error" in reply:
        error_interface, _, error = reply["error"].rpartition(".")
        assert error_interface in (interface_name, SERVICE), reply
        errors = ERRORS | {interface.name: _error_calls(interface) for interface in contracts}
        assert error in errors[error_interface].methods, f"{reply['error']} is not in the contract"
        errors[error_interface].check_parameters(error, reply["parameters"])
    else:
        known[interface_name].check_reply(member, reply["parameters"])


async def eventually(condition: Callable[[], object]) -> None:
    """Return as soon as `condition` holds: for what has no event to wait for."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def _encode(method: str, parameters: Json) -> bytes:
    return json.dumps({"method": method, "parameters": parameters}).encode() + b"\0"


class Peer:
    """One connection. Every wait ends with TimeoutError, and so the test with a failure."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.contracts: tuple[Interface, ...] = ()
        self._asked: list[tuple[str, bool]] = []

    @classmethod
    async def connect(cls, path: Path) -> Peer:
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
        try:  # a test's directory may have a longer path than a socket can
            short = f"/proc/self/fd/{directory}/{path.name}"
            return cls(*await asyncio.open_unix_connection(short, limit=4 << 20))
        finally:
            os.close(directory)

    async def __aenter__(self) -> Peer:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        self.writer.close()
        with suppress(OSError):  # the other side was faster
            await self.writer.wait_closed()

    async def send(self, method: str, parameters: Json | None = None, **flags: bool) -> None:
        if not flags.get("oneway"):
            self._asked.append((method, flags.get("more", False)))
        await self.send_raw(json.dumps({"method": method, "parameters": parameters or {}, **flags}).encode())

    async def send_raw(self, data: bytes) -> None:
        """Send one message, whatever it is."""
        self.writer.write(data + b"\0")
        async with asyncio.timeout(WAIT_S):
            await self.writer.drain()

    async def receive(self) -> Json | None:
        """Return the next reply, checked; None at the end of the stream."""
        async with asyncio.timeout(WAIT_S):
            try:
                data = await self.reader.readuntil(b"\0")
            except (asyncio.IncompleteReadError, ConnectionResetError):
                return None
        reply: Json = json.loads(data[:-1])
        if self._asked:
            method, _ = self._asked[0]
            if not reply.get("continues"):
                self._asked.pop(0)
            check_reply(method, reply, self.contracts)
        return reply

    async def result(self) -> Json:
        """Return the parameters of the next reply. Raises VarlinkError, EOFError."""
        reply = await self.receive()
        if reply is None:
            raise EOFError("the server hung up")
        if "error" in reply:
            raise VarlinkError(reply["error"], reply["parameters"])
        parameters: Json = reply["parameters"]
        return parameters

    async def call(self, method: str, parameters: Json | None = None, **flags: bool) -> Json:
        await self.send(method, parameters, **flags)
        return await self.result()

    async def call_with_fds(self, method: str, parameters: Json, fds: Sequence[int]) -> Json:
        """Call with descriptors, which stay the caller's."""
        self._asked.append((method, False))
        with self._raw() as sock:
            # The socket's buffer takes what our tests say.
            socket.send_fds(sock, [_encode(method, parameters)], fds)
        return await self.result()

    async def call_for_fd(self, method: str, parameters: Json) -> int:
        """Return the descriptor that a reply carries. Raises VarlinkError, EOFError."""
        data = b""
        found: list[int] = []
        self.writer.transport.pause_reading()  # type: ignore[attr-defined]  # it would drop descriptors
        with self._raw() as sock:
            sock.send(_encode(method, parameters))
            while not data.endswith(b"\0"):
                async with asyncio.timeout(WAIT_S):
                    await readable(sock)
                piece, fds, _, _ = socket.recv_fds(sock, 65536, 1)
                found += fds
                data += piece
                if not piece:
                    raise EOFError("the server hung up")
        self.writer.transport.resume_reading()  # type: ignore[attr-defined]
        unpack(json.loads(data[:-1]))
        (fd,) = found
        return fd

    def _raw(self) -> socket.socket:
        return socket.socket(fileno=os.dup(self.writer.get_extra_info("socket").fileno()))
