"""Attached sessions: a listener each, its connections, and how fast it may ask."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from systemd import daemon

from nanoclawd import journal
from nanoclawd.errors import ConfigError, Refused
from nanoclawd.gateway import limits
from nanoclawd.gateway.addresses import refusal_of, resolve
from nanoclawd.gateway.exchange import Exchange
from nanoclawd.gateway.holds import Holds
from nanoclawd.gateway.keys import Keys
from nanoclawd.gateway.ledger import Ledger
from nanoclawd.gateway.proxy import AgentConnection
from nanoclawd.gateway.trail import Trail
from nanoclawd.gateway.upstream import Pool, dial
from nanoclawd.ids import AgentName, SessionName, unit_name
from nanoclawd.policy import Ask, Decision, Denied, Policy, Rule, authority, decide
from nanoclawd.rates import Rate
from nanoclawd.routes import Route
from nanoclawd.settings import Settings
from nanoclawd.sockets import accept


class Allowance:
    """What an agent may reach, and what all its sessions share of that."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.rates: dict[Rule, Rate] = {}
        self.lookups = asyncio.Semaphore(limits.LOOKUPS)


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
        """Count one request. Raises Denied if there were too many."""
        if self._rate.take():
            await asyncio.sleep(limits.TOO_FAST_S)
            message = f"This session asks more than {limits.REQUESTS_PER_S:.0f} times a second."
            raise Denied(429, "too-fast", message, ("retry-after", "1"))

    def decide(self, ask: Ask) -> Decision:
        """Return what the agent's policy says. Every request comes by here."""
        return self.gateway.decide(self.agent, ask)

    @property
    def _allowance(self) -> Allowance:
        """Of whom the router told no policy, that is nothing."""
        return self.gateway.allowances.get(self.agent) or Allowance(Policy())

    def check_rule_rate(self, rule: Rule) -> None:
        """Count one request that `rule` allows. Raises Denied if there were too many."""
        rate = self._allowance.rates.setdefault(rule, Rate(rule.per_minute / 60, rule.per_minute))
        if wait_s := rate.take():
            message = f"The policy allows {rule.per_minute} requests a minute here."
            raise Denied(429, "rule-rate", message, ("retry-after", f"{wait_s:.0f}"))

    async def dial(self, ask: Ask, rule: Rule) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to the host that `ask` names, which `rule` allows. Raises Denied."""
        slots = self._allowance.lookups
        addresses = await resolve(ask.host, ask.port, rule, self.gateway.threads, slots)
        return await dial(ask.host, ask.port, [*map(str, addresses)])

    def log(self, exchange: Exchange) -> None:
        """Write one line about a finished request, and one for the audit trail."""
        if not exchange.is_news:
            return
        self.gateway.trail.add(self.agent, self.name, exchange)
        if exchange.reason == "too-fast":
            if time.monotonic() < self._quiet_until:
                return
            self._quiet_until = time.monotonic() + limits.LOG_TOO_FAST_S
        unit = unit_name(self.agent, self.name)
        journal.info("request", agent=self.agent, session=self.name, **exchange.describe(), unit=unit)


class Gateway:
    """Everything that the sessions share. Its tasks live in `tasks`."""

    def __init__(self, tasks: asyncio.TaskGroup, tls: ssl.SSLContext) -> None:
        #: What nanoclaw.toml said last, or why it could not be read: then nothing is forwarded.
        self.settings: Settings | ConfigError = ConfigError("nanoclaw.toml was not read yet")
        self.allowances: dict[AgentName, Allowance] = {}  #: as the router told them
        self.keys = Keys()
        self.trail = Trail()
        self.ledger = Ledger(self.trail.life)
        self.holds = Holds(lambda request: self.decide(AgentName(request.agent), request.ask))
        self.threads = ThreadPoolExecutor(limits.LOOKUP_THREADS, thread_name_prefix="lookup")
        self.pool = Pool(tasks, tls)
        self.sessions: dict[tuple[AgentName, SessionName], Session] = {}
        self._tasks = tasks
        self._stopping = False

    def route(self, name: str) -> Route:
        """Return the route `name`. Raises Denied."""
        settings = self.require_settings()
        if name not in settings.routes:
            raise Denied(404, "unknown-route", f"There is no route '{name}' in nanoclaw.toml.")
        return settings.routes[name]

    def require_settings(self) -> Settings:
        """Return the settings. Raises Denied."""
        if isinstance(self.settings, ConfigError):
            raise Denied(503, "bad-config", f"The gateway has no configuration: {self.settings}.")
        return self.settings

    @property
    def ask_seconds(self) -> int:
        """How long a request waits for a person's answer. Raises Denied."""
        if isinstance(self.settings, ConfigError):
            raise Denied(503, "bad-config", f"The gateway has no configuration: {self.settings}.")
        return self.settings.ask_seconds

    def decide(self, agent: AgentName, ask: Ask) -> Decision:
        """Return what the policy of `agent` says; of whom the router told none, that is nothing."""
        policy = self.allowances[agent].policy if agent in self.allowances else Policy()
        decision = decide(policy.rules, ask, policy.unknown)
        if decision.reason == "ask" and (why := refusal_of(ask.host)):
            message = f"{authority(ask.host, ask.port)} is {why}: only a rule that names it can allow that."
            return decision._replace(reason="no-rule", message=message)
        return decision

    def set_policy(self, agent: AgentName, policy: Policy) -> None:
        """Take over an agent's policy; what runs and is allowed no more ends at once."""
        allowance = self.allowances.setdefault(agent, Allowance(policy))
        allowance.policy = policy
        allowance.rates = {rule: rate for rule, rate in allowance.rates.items() if rule in policy.rules}
        self.holds.decide_again()
        for session in self.sessions.values():
            for connection, task in session.open.items() if session.agent == agent else ():
                exchange = connection.exchange
                if exchange and exchange.ask and not exchange.is_allowed_by(session.decide(exchange.ask)):
                    exchange.reason = "policy-changed"
                    task.cancel()

    def attach(self, agent: AgentName, name: SessionName, listener: socket.socket) -> None:
        """Serve `listener` in place of the session's older one; closed at the end. Raises Refused."""
        if self._stopping:
            raise Refused("the gateway is stopping", hint="the next one takes it")
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
            if not any(other == agent for other, _ in self.sessions):
                self.allowances.pop(agent, None)
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
        self._stopping = True
        self.holds.close()
        for session in self.sessions.values():
            session.stop_accepting()
        connections = {c: task for session in self.sessions.values() for c, task in session.open.items()}
        for connection, task in connections.items():
            connection.is_last = True
            # Of a tunnel nobody knows whether it is still used: for most, waiting would be in vain.
            exchange = connection.exchange
            if exchange is None or (exchange.is_tunnel and not exchange.is_held):
                task.cancel()
        if connections:
            await asyncio.wait(connections.values(), timeout=limits.DRAIN_S)
        for key in list(self.sessions):
            self.detach(*key)
        self.pool.close()
        self.threads.shutdown(wait=False)

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
