"""A Varlink server: accepts connections, checks each call against its interface, runs the handler.

What is malformed, too large or unknown gets a named error of org.varlink.service and costs bounded memory;
who calls too fast waits.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from nanoclawd import journal, limits, paths, wire
from nanoclawd.apart import Apart
from nanoclawd.errors import NanoclawError
from nanoclawd.idl import Interface, read_interface
from nanoclawd.rates import Rate
from nanoclawd.sockets import accept
from nanoclawd.varlink import Connection
from nanoclawd.version import VERSION
from nanoclawd.wire import Json, VarlinkError, printable

SERVICE = "org.varlink.service"


class _Gone(Exception):
    """The other side went away, or does not read."""


@dataclass(slots=True)
class Call:
    """One call in progress: its checked parameters, and how to answer before the end."""

    method: str
    parameters: Json
    more: bool
    connection: Connection
    caller: Caller
    apart: Apart  #: where to do what may hang: with descriptors of the caller's
    fd: int | None = None  #: goes with the reply, which closes it

    async def send(self, parameters: Json) -> None:
        """Send one reply of several; the handler's return value is the last. Only if `more`."""
        await _write(self.connection, {"parameters": parameters, "continues": True})

    async def send_all(self, replies: AsyncIterator[Json], empty: Json) -> Json:
        """Send all but the last of `replies`, and return that, or `empty`: it is what the handler returns.

        Without `more` there can be only one, the first.
        """
        last = None
        async for reply in replies:
            if last is None:
                last = reply
            elif self.more:
                await self.send(last)
                last = reply
        return empty if last is None else last


@dataclass(slots=True)
class Caller:
    """What handlers remember about one connection; `closed` is set when the other side has gone."""

    identity: Any = None  #: whatever the listener stands for, e.g. a session
    memory: dict[str, Any] = field(default_factory=dict)
    on_close: list[Callable[[], None]] = field(default_factory=list)


#: Answers a call; its return value is the only or the last reply. May raise VarlinkError or NanoclawError.
Handler = Callable[[Call], Awaitable[Json]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One row of a service's table: no row, no answer."""

    handler: Handler
    more: bool | None = (
        None  #: True: must be called with "more"; None: may; False: "more" makes no difference
    )


class Service:
    """The interfaces and the method table behind one kind of listener."""

    def __init__(self, *, interface: Interface, methods: Mapping[str, Method]) -> None:
        if set(methods) != set(interface.methods):
            raise ValueError(
                f"{interface.name}: table and interface differ: {set(methods) ^ set(interface.methods)}"
            )
        self.interface = interface
        self.methods = methods
        self._service = read_interface(paths.INTERFACES / f"{SERVICE}.varlink")

    async def answer(self, call: Call) -> Json:
        """Run the handler of `call`. Raises VarlinkError."""
        interface_name, _, name = call.method.rpartition(".")
        if interface_name == SERVICE:
            return self._answer_service(name, call.parameters)
        if interface_name != self.interface.name:
            raise VarlinkError(
                f"{SERVICE}.InterfaceNotFound", {"interface": printable(interface_name[:256])}
            )
        method = self.methods.get(name)
        if method is None:
            raise VarlinkError(f"{SERVICE}.MethodNotFound", {"method": printable(call.method[:256])})
        if method.more and not call.more:
            raise VarlinkError(f"{SERVICE}.ExpectedMore")
        call.parameters = _checked(self.interface, name, call.parameters)
        try:
            return await method.handler(call)
        except NanoclawError as exc:
            error = type(exc).__name__
            raise VarlinkError(
                f"{interface_name}.{error}", {"message": exc.message[:4096], "hint": exc.hint[:1024]}
            ) from exc

    def _answer_service(self, name: str, parameters: Json) -> Json:
        if name not in self._service.methods:
            raise VarlinkError(f"{SERVICE}.MethodNotFound", {"method": printable(f"{SERVICE}.{name}"[:256])})
        parameters = _checked(self._service, name, parameters)
        interfaces = {i.name: i for i in (self._service, self.interface)}
        if name == "GetInfo":
            return {
                "vendor": "NanoClaw for systemd and Podman",
                "product": "nanoclaw",
                "version": VERSION,
                "url": "man:nanoclawd(8)",
                "interfaces": list(interfaces),
            }
        wanted = parameters["interface"]
        if wanted not in interfaces:
            raise VarlinkError(f"{SERVICE}.InterfaceNotFound", {"interface": printable(wanted[:256])})
        return {"description": interfaces[wanted].text}


def _checked(interface: Interface, method: str, parameters: Json) -> Json:
    try:
        return interface.check_parameters(method, parameters)
    except wire.WireError as exc:
        journal.debug("invalid-parameter", str(exc), method=f"{interface.name}.{method}")
        raise VarlinkError(f"{SERVICE}.InvalidParameter", {"parameter": exc.path}) from exc


class Server:
    """Serves one listening socket until its task is cancelled. Does not own the listener.

    identity: whom all connections stand for; may have a `unit`, for the journal. connections: open at once.
    calls: how fast all of them together may call; whoever is faster waits, and what it sends stays with the
    kernel. on_offence: told in a few words of each call that breaks the contract. on_close: told when a
    connection has ended. max_fds: see Connection. trusted: nobody sends descriptors that hang.
    """

    def __init__(
        self,
        service: Service,
        listener: socket.socket,
        *,
        identity: Any = None,
        connections: int = limits.CONNECTIONS_PER_LISTENER,
        calls: Rate | None = None,
        on_offence: Callable[[str], None] = lambda what: None,
        on_close: Callable[[], None] = lambda: None,
        max_fds: int = 0,
        trusted: bool = True,
    ) -> None:
        self.service = service
        self.listener = listener
        self.identity = identity
        self.slots = asyncio.Semaphore(connections)
        self.active = 0  #: open connections
        self._calls = calls
        self._on_offence = on_offence
        self._on_close = on_close
        self._max_fds = max_fds
        self._trusted = trusted
        self._apart = Apart()
        self._unit = getattr(identity, "unit", None)
        self._slowed = False
        self._running: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Accept and answer. Closes the connections, but not the listener, when cancelled."""
        self._running = asyncio.current_task()
        async with asyncio.TaskGroup() as tasks:
            while True:
                await self.slots.acquire()
                sock = await accept(self.listener)
                self.active += 1
                serving = tasks.create_task(self._serve(sock), name="connection")
                # Cancelled before its first step, it has not even begun to clean up.
                serving.add_done_callback(partial(self._forget, sock))

    def stop(self) -> None:
        """Accept nothing from now on, and end run() soon."""
        if self._running is not None:
            self._running.cancel()

    async def _serve(self, sock: socket.socket) -> None:
        connection = Connection(sock, max_fds=self._max_fds, apart=None if self._trusted else self._apart)
        caller = Caller(identity=self.identity)
        try:
            await self._answer_all(connection, caller)
        except _Gone as exc:  # what it was told is in the database
            if isinstance(exc.__cause__, TimeoutError):
                journal.warning("reader-too-slow", "hanging up", unit=self._unit)
                self._on_offence("reads no replies")
        finally:
            self._charge(connection)
            for forget in caller.on_close:
                forget()
            connection.close(self._release)

    def _forget(self, sock: socket.socket, serving: asyncio.Task[None]) -> None:
        if sock.fileno() >= 0:  # it was cancelled before its first step
            if self._trusted:
                sock.close()
                self._release()
            else:
                self._apart.close(sock.detach(), then=self._release)
        self.active -= 1
        self._on_close()

    def _release(self) -> None:
        # Not before it is closed: else whoever has us hang there could open ever more.
        self.slots.release()

    async def _answer_all(self, connection: Connection, caller: Caller) -> None:
        while True:
            # Neither reading what is there nor answering it need wait: whoever sends without a pause would
            # else be the only one who is served.
            await asyncio.sleep(self._charge(connection))
            try:
                message = await connection.read()
                if message is None:
                    return
                call, oneway = _parse_call(message, connection, caller, self._apart)
            except wire.WireError as exc:
                # Nothing after it can be trusted to be what it seems: say why, then hang up.
                journal.warning("malformed-call", f"{exc}, hanging up", unit=self._unit)
                self._on_offence(str(exc))
                await _write(
                    connection,
                    {"error": f"{SERVICE}.InvalidParameter", "parameters": {"parameter": exc.path}},
                )
                return
            reply: Json
            try:
                reply = {"parameters": await self._unless_gone(call, oneway)}
            except VarlinkError as exc:
                reply = {"error": exc.name, "parameters": exc.parameters}
                if not isinstance(exc.__cause__, NanoclawError):  # else we only declined
                    self._on_offence(str(exc))
            try:
                if not oneway:
                    await _write(connection, reply, call.fd)
            finally:
                if call.fd is not None:
                    os.close(call.fd)

    def _charge(self, connection: Connection) -> float:
        """Count a call and what it moved; return how long its sender waits for the next, in seconds."""
        if self._calls is None:
            return 0.0
        times = 1 + connection.traffic / limits.CALL_BYTES
        connection.traffic = 0
        wait_s = self._calls.take(times)
        if wait_s and not self._slowed:
            self._slowed = True
            journal.warning("calls-too-fast", "letting it wait from now on", unit=self._unit)
        return wait_s

    async def _unless_gone(self, call: Call, oneway: bool) -> Json:
        """Answer; a stream ends as soon as the other side hangs up, though it has nothing to send."""
        if not call.more:
            return await self.service.answer(call)
        answering = asyncio.ensure_future(self.service.answer(call))
        gone = asyncio.ensure_future(call.connection.wait_gone())
        try:
            await asyncio.wait((answering, gone), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                raise _Gone
            return answering.result()
        finally:
            for task in (answering, gone):
                task.cancel()
            await asyncio.gather(answering, gone, return_exceptions=True)


async def _write(connection: Connection, message: Json, fd: int | None = None) -> None:
    """Send, and let nothing but _Gone tell that it failed: an OSError of a handler is another matter."""
    try:
        await connection.write(message, fd)
    except OSError as exc:  # TimeoutError is one
        raise _Gone from exc


def _parse_call(message: Json, connection: Connection, caller: Caller, apart: Apart) -> tuple[Call, bool]:
    method = message.get("method")
    parameters = message.get("parameters")
    if not isinstance(method, str):
        raise wire.WireError("method", "must be a string")
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, dict):
        raise wire.WireError("parameters", "must be an object")
    flags: Sequence[Any] = [message.get(flag, False) for flag in ("more", "oneway")]
    if not all(isinstance(flag, bool) for flag in flags):
        raise wire.WireError("more", "must be true or false")
    more, oneway = flags
    return Call(method, parameters, more and not oneway, connection, caller, apart), oneway
