"""Attached sessions: a listener each, its connections, and how fast it may ask."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from dataclasses import asdict
from functools import partial

from systemd import daemon

from nanoclawd import journal
from nanoclawd.errors import ConfigError, Refused
from nanoclawd.gateway import limits
from nanoclawd.gateway.keys import Keys
from nanoclawd.gateway.proxy import AgentConnection, Exchange
from nanoclawd.gateway.replies import ErrorReply
from nanoclawd.gateway.upstream import Pool
from nanoclawd.ids import AgentName, SessionName, unit_name
from nanoclawd.rates import Rate
from nanoclawd.settings import Provider, Settings
from nanoclawd.sockets import accept


class Session:
    """One session of an agent: who is behind a listener."""

    def __init__(self, gateway: Gateway, agent: AgentName, name: SessionName) -> None:
        self.gateway = gateway
        self.agent = agent
        self.name = name
        self.accepting: asyncio.Task[None] | None = None  #: serves the listener, and closes it at its end
        self.open: dict[AgentConnection, asyncio.Task[None]] = {}
        self.slots = asyncio.Semaphore(limits.CONNECTIONS)
        self._rate = Rate(limits.REQUESTS_PER_S, limits.REQUESTS_BURST)
        self._quiet_until = 0.0

    def forget(self, connection: AgentConnection, sock: socket.socket, _: object) -> None:
        """Count a connection out that has ended."""
        sock.close()
        del self.open[connection]
        self.slots.release()

    def stop_accepting(self) -> None:
        if self.accepting is not None:
            self.accepting.cancel()

    async def check_rate(self) -> None:
        """Count one request. Raises ErrorReply if there were too many."""
        if self._rate.take():
            await asyncio.sleep(limits.TOO_FAST_S)
            message = f"This session asks more than {limits.REQUESTS_PER_S:.0f} times a second."
            raise ErrorReply(429, "too-fast", message, ("retry-after", "1"))

    def log(self, exchange: Exchange) -> None:
        """Write one line about a finished request."""
        if exchange.reason == "too-fast":
            if time.monotonic() < self._quiet_until:
                return
            self._quiet_until = time.monotonic() + limits.LOG_TOO_FAST_S
        fields = asdict(exchange)
        fields["took_ms"] = round((time.monotonic() - fields.pop("started")) * 1000)
        del fields["is_head_sent"]
        unit = unit_name(self.agent, self.name)
        journal.info("request", agent=self.agent, session=self.name, **fields, unit=unit)


class Gateway:
    """Everything that the sessions share. Its tasks live in `tasks`."""

    def __init__(self, tasks: asyncio.TaskGroup, tls: ssl.SSLContext) -> None:
        #: What nanoclaw.toml said last, or why it could not be read: then nothing is forwarded.
        self.settings: Settings | ConfigError = ConfigError("nanoclaw.toml was not read yet")
        self.keys = Keys()
        self.pool = Pool(tasks, tls)
        self.sessions: dict[tuple[AgentName, SessionName], Session] = {}
        self._tasks = tasks

    def provider(self, name: str) -> Provider:
        """Return the provider `name`. Raises ErrorReply."""
        if isinstance(self.settings, ConfigError):
            raise ErrorReply(503, "bad-config", f"The gateway has no configuration: {self.settings}.")
        return self.settings.providers[name]

    def attach(self, agent: AgentName, name: SessionName, listener: socket.socket) -> None:
        """Serve `listener` in place of the session's older one; closed at the end. Raises Refused."""
        session = self.sessions.get((agent, name))
        if session is None:
            if len(self.sessions) >= limits.ATTACHED:
                raise Refused(f"{limits.ATTACHED} sessions are attached", hint="stop some agents")
            session = self.sessions[agent, name] = Session(self, agent, name)
        session.stop_accepting()
        session.accepting = self._tasks.create_task(self._accept(session, listener), name=f"{agent}/{name}")
        self.report_status()

    def detach(self, agent: AgentName, name: SessionName) -> None:
        """Close the session's listener and its connections. Harmless if there is none."""
        if session := self.sessions.pop((agent, name), None):
            session.stop_accepting()
            for task in session.open.values():
                task.cancel()
            self.report_status()

    def report_status(self) -> None:
        """Say in `systemctl status` what goes on."""
        problem = self.settings if isinstance(self.settings, ConfigError) else ""
        daemon.notify(
            f"STATUS=refusing all requests: {problem}"
            if problem
            else f"STATUS={len(self.sessions)} sessions"
        )

    async def drain(self) -> None:
        """Take no more requests; return when those that run are answered, or DRAIN_S have passed."""
        for session in self.sessions.values():
            session.stop_accepting()
        connections = {c: task for session in self.sessions.values() for c, task in session.open.items()}
        for connection, task in connections.items():
            connection.is_last = True
            if not connection.is_busy:
                task.cancel()
        if connections:
            await asyncio.wait(connections.values(), timeout=limits.DRAIN_S)
        for key in list(self.sessions):
            self.detach(*key)
        self.pool.close()

    async def _accept(self, session: Session, listener: socket.socket) -> None:
        with listener:
            while True:
                await session.slots.acquire()
                sock = await accept(listener)
                connection = AgentConnection(session)
                task = self._tasks.create_task(connection.serve(sock), name=f"{session.name} connection")
                session.open[connection] = task
                # Cancelled before its first step, it has not even begun to clean up.
                task.add_done_callback(partial(session.forget, connection, sock))


def check_listener(descriptor: int) -> socket.socket:
    """Return `descriptor` as a listening Unix stream socket; else close it and raise Refused."""
    try:
        sock = socket.socket(fileno=descriptor)  # asks the kernel for family and type
    except OSError as exc:
        os.close(descriptor)
        raise Refused("the descriptor is no socket", hint="send a listening Unix stream socket") from exc
    is_listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM or not is_listening:
        sock.close()
        raise Refused("the descriptor is no listening Unix stream socket", hint="call listen() before")
    return sock
