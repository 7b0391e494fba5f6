"""nanoclawd: routes messages between chats and agents.

Talks to:   people's programs, over control/io.nanoclaw.Control (trusted: mode 0600); channel adapters, each
            over its io.nanoclaw.Channel; runners, over host.sock of each session (untrusted); the gateway;
            the user's systemd over D-Bus; Podman's REST socket, through a child.
May touch:  its database and state directory, agents/*.toml, the Quadlet units that it generates.
Trusts:     nothing that a runner or a chat sends. Opens no file that an agent named; has no network.
On trouble: a bad agent, unit or message harms only itself; a bug ends the program, systemd restarts it,
            and what was acknowledged is in the database.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from systemd import daemon

from nanoclawd import journal, limits, paths, recovery, retention, sandbox
from nanoclawd.agent_post import AgentPost
from nanoclawd.agent_service import AgentService
from nanoclawd.answers import Answers
from nanoclawd.approvals import Approvals
from nanoclawd.asks import Asks
from nanoclawd.audit import Audit
from nanoclawd.cards import Cards
from nanoclawd.channel_service import ChannelService
from nanoclawd.channels import PREFIX, Channels
from nanoclawd.chat_control import ChatControl
from nanoclawd.control import ControlService
from nanoclawd.db import Database, Row, Transaction, now_ms
from nanoclawd.errors import ConfigError, NanoclawError
from nanoclawd.filestore import FileStore
from nanoclawd.gateway_link import GatewayLink
from nanoclawd.guard import Guard
from nanoclawd.hold_link import HoldLink
from nanoclawd.idle import IdleExit
from nanoclawd.ids import RESERVED, unit_name
from nanoclawd.leases import Treatment, fail_turn, leased_turn, put_back
from nanoclawd.messages import session_row
from nanoclawd.outlets import Outlets
from nanoclawd.pairing import Pairings
from nanoclawd.people_control import PeopleControl
from nanoclawd.registry import Registry
from nanoclawd.server import Server
from nanoclawd.session import Session
from nanoclawd.sessions import Sessions
from nanoclawd.settings import read_settings
from nanoclawd.sockets import forget_listener, take_listeners, turn_away
from nanoclawd.systemd import Systemd, connect
from nanoclawd.usage import Usage
from nanoclawd.version import VERSION

DATABASE = "nanoclaw.db"
GATEWAY = "nanoclaw-gateway.service"
_EXIT_CONFIG = 78  # EX_CONFIG of sysexits.h: systemd shows it by name, and does not restart


class _Stop(Exception):
    """SIGTERM came, or there is nothing to do."""


def main() -> None:
    """Run until SIGTERM, or until there is nothing to do."""
    parser = argparse.ArgumentParser(prog="nanoclawd", description="Router of NanoClaw; started by systemd.")
    parser.add_argument("--version", action="version", version=f"nanoclawd {VERSION}")
    tasks = parser.add_mutually_exclusive_group()
    tasks.add_argument(
        "--create-database",
        action="store_true",
        help="create an empty database where one is missing beside existing agents, then exit",
    )
    tasks.add_argument(
        "--restore-database",
        metavar="FILE",
        type=Path,
        help="put a backup in place of a database that is missing, then exit",
    )
    tasks.add_argument(
        "--salvage-database",
        metavar="FILE",
        type=Path,
        nargs="?",
        const=paths.state() / DATABASE,
        help="put what can be read of a damaged database in its place, then exit",
    )
    options = parser.parse_args()
    if options.create_database or options.restore_database or options.salvage_database:
        sys.exit(_repair(options))
    try:
        asyncio.run(_run())
    except* _Stop:
        pass
    except* NanoclawError as group:
        for exc in _leaves(group):
            text = str(exc)
            journal.error("exit", text)
            daemon.notify(f"STATUS={text}")
        sys.exit(_EXIT_CONFIG if group.subgroup(ConfigError) else 1)


def _repair(options: argparse.Namespace) -> int:
    """Do what a person asks for the database, and return the exit status."""
    database = paths.state() / DATABASE
    try:
        if options.restore_database:
            done = f"restored: {recovery.restore(options.restore_database, database)}"
        elif options.salvage_database:
            done = recovery.salvage(options.salvage_database, database)
        else:
            done = recovery.create(database)
    except NanoclawError as exc:
        print(
            f"error: {exc.message}", *([f"hint: {exc.hint}"] if exc.hint else []), sep="\n", file=sys.stderr
        )
        return _EXIT_CONFIG if isinstance(exc, ConfigError) else 1
    print(done)
    return 0


def _leaves(group: BaseExceptionGroup[NanoclawError]) -> Iterator[NanoclawError]:
    for exc in group.exceptions:
        if isinstance(exc, BaseExceptionGroup):
            yield from _leaves(exc)
        else:
            yield exc


async def _run() -> None:
    listeners = take_listeners()
    control, channel = listeners.pop("control", None), listeners.pop("channel", None)
    if control is None or channel is None:
        raise ConfigError(
            "no sockets were passed in",
            hint="nanoclawd is started by systemd: 'systemctl --user start nanoclaw'",
        )
    started = asyncio.Event()
    try:
        await _route(control, channel, listeners, started)
    except* NanoclawError as group:
        # Who called meanwhile must not wait for a person to act, nor make systemd start us again for it. But
        # the restart of a router that was in order is none of their business.
        if not started.is_set() or group.subgroup(ConfigError):
            error = next(_leaves(group))
            turn_away(control, "io.nanoclaw.Control", error)
            turn_away(channel, "io.nanoclaw.Channel", error)
        raise


async def _route(
    control: socket.socket,
    channel: socket.socket,
    listeners: dict[str, socket.socket],
    started: asyncio.Event,
) -> None:
    settings = read_settings()
    checks = sandbox.run_checks(sandbox.ROUTER)
    if settings.require_sandbox:
        sandbox.require(checks)
    db = await Database.open(paths.state() / DATABASE)
    try:
        async with connect() as systemd, asyncio.TaskGroup() as tasks:
            tasks.create_task(db.run(), name="database")
            tasks.create_task(systemd.watch(), name="units")
            await systemd.watching.wait()
            registry = Registry(db=db, systemd=systemd, settings=settings)
            audit, outlets, files = Audit(db), Outlets(db), FileStore(db)
            await files.prepare()
            usage = Usage(db, registry.budget)
            approvals, cards = Approvals(db=db, registry=registry), Cards(db, outlets)
            holds = HoldLink(approvals)
            gateway = GatewayLink(approvals.policy, audit.take_over, usage, [holds.run])
            approvals.on_expiry = gateway.change
            sessions = Sessions(
                db=db,
                systemd=systemd,
                registry=registry,
                outlets=outlets,
                gateway=gateway,
                tasks=tasks,
                slots=settings.max_sessions,
            )
            guard = Guard(db=db, registry=registry, outlets=outlets, wake=sessions.wake)
            asks = Asks(db)
            agent_service = AgentService(
                db=db,
                registry=registry,
                sessions=sessions,
                outlets=outlets,
                guard=guard,
                files=files,
                asks=asks,
                approvals=approvals,
            )
            sessions.containers.service = agent_service.service
            pairings, channels = Pairings(), Channels(db, systemd, tasks)
            channel_service = ChannelService(
                db=db,
                registry=registry,
                sessions=sessions,
                outlets=outlets,
                pairings=pairings,
                files=files,
                asks=asks,
                channels=channels,
            )
            people = PeopleControl(
                db=db, registry=registry, outlets=outlets, pairings=pairings, channels=channel_service
            )
            answers = Answers(
                db=db,
                registry=registry,
                approvals=approvals,
                guard=guard,
                holds=holds,
                gateway=gateway,
                audit=audit,
                people=people,
            )
            channel_service.chat_control = ChatControl(
                db=db, registry=registry, sessions=sessions, outlets=outlets, usage=usage, answers=answers
            )
            channels.service = channel_service.service
            control_service = ControlService(
                db=db,
                systemd=systemd,
                registry=registry,
                sessions=sessions,
                outlets=outlets,
                gateway=gateway,
                audit=audit,
                people=people,
                channel_list=channels,
                usage=usage,
                approvals=approvals,
                answers=answers,
                sandbox=checks,
            )
            await registry.load()
            await approvals.load()
            kept = {name: listeners.pop(name) for name in [*listeners] if name.startswith(PREFIX)}
            await _recover(db, systemd, sessions, listeners, attempts=settings.attempts)
            tasks.create_task(outlets.run(), name="outlets")
            tasks.create_task(approvals.run(), name="approvals")
            tasks.create_task(guard.run(), name="guard")
            post = AgentPost(
                db=db, outlets=outlets, wake=sessions.wake, known=lambda name: name in registry.names()
            )
            tasks.create_task(post.run(), name="agent post")
            tasks.create_task(cards.run(), name="cards")
            gateway_state = await systemd.unit_property(GATEWAY, "Unit", "ActiveState")
            tasks.create_task(gateway.run(left=gateway_state == "active"), name="gateway")
            idle = IdleExit(
                db=db, sessions=sessions, channels=channels, seconds=lambda: registry.settings.idle_exit
            )
            sessions.on_end = control_service.on_reload = channels.on_close = idle.touch
            idle.servers = (
                Server(control_service.service, control, on_close=idle.touch),
                Server(
                    channel_service.service,
                    channel,
                    identity=channels.terminal,
                    on_close=idle.touch,
                    max_fds=limits.FILES_PER_MESSAGE,
                ),
            )
            for server in idle.servers:
                tasks.create_task(server.run(), name=server.service.interface.name)
            tasks.create_task(_keep_watchdog(db, systemd), name="watchdog")
            tasks.create_task(
                retention.run(db, audit, usage, files, lambda: registry.settings, sessions.close_unused),
                name="retention",
            )
            _handle_signals(tasks, lambda: _reload(registry, control_service))
            tasks.create_task(_leave_when_idle(idle), name="idle exit")
            await channels.load(kept)
            await control_service.start_waiting()
            # What was made while starting lives for ever: the collector need not look at it again.
            gc.collect()
            gc.freeze()
            started.set()
            daemon.notify(f"READY=1\nSTATUS={registry.summary()}")
            tasks.create_task(db.check(), name="database check")  # it may take long
            journal.info("started", version=VERSION, agents=len(registry.names()))
    finally:
        await db.close()


async def _recover(
    db: Database,
    systemd: Systemd,
    sessions: Sessions,
    listeners: dict[str, socket.socket],
    *,
    attempts: int,
) -> None:
    """Take up what the previous router left: containers that run keep their turns, others lose them."""
    await sessions.switch.settle()
    running = {
        unit.name: unit.active_state != "deactivating"
        for unit in await systemd.list_units(["nanoclaw-*@*.service"])
        if unit.active_state not in ("inactive", "failed")
        and not unit.name.startswith(tuple(f"nanoclaw-{name}@" for name in RESERVED))
    }
    adopted: list[Session] = []
    orphans: list[Session] = []

    def recover(tx: Transaction) -> list[Row]:
        tx.all("release_deliveries")
        tx.all("extend_leases", expires=now_ms() + int(limits.LEASE_S * 1000))
        rows = tx.all("list_sessions", agent=None)
        for row in rows:
            if row["message"] is None and unit_name(row["agent"], row["name"]) not in running:
                continue  # nearly all of them, and there may be thousands
            session = Session(session_row(row))
            host, gateway = map(listeners.get, _listener_names(session))
            if running.get(session.unit) and host is not None and gateway is not None:
                session.host, session.gateway = host, gateway
                session.turn = leased_turn(tx, session.row)
                adopted.append(session)
                continue
            if session.unit in running:
                orphans.append(session)
            # One of its messages may be what ended them.
            reason = "the router and the agent's container ended together"
            if sessions.held:  # the person has ended them
                put_back(tx, session.row)
            else:
                fail_turn(tx, session.row, reason=reason, how=Treatment.RETRY, attempts=attempts)
        return rows

    await db.write(recover)
    kept = {name for session in adopted for name in _listener_names(session)}
    for name, listener in listeners.items():
        if name not in kept:
            forget_listener(name)
            listener.close()
    for session in adopted:
        journal.info(
            "session-adopted", unit=session.unit, message=session.turn.message if session.turn else None
        )
        sessions.adopt(session)
    for session in orphans:
        sessions.replace(session)
    # Of sessions that the database does not know, e.g. since it is a backup.
    strangers = running.keys() - {session.unit for session in (*adopted, *orphans)}
    sessions.begin(strangers)


def _listener_names(session: Session) -> tuple[str, str]:
    agent, name = session.row.agent, session.row.name
    return f"host.{agent}.{name}", f"gateway.{agent}.{name}"


def _handle_signals(tasks: asyncio.TaskGroup, reload: Callable[[], object]) -> None:
    loop = asyncio.get_running_loop()

    async def stop() -> None:
        daemon.notify("STOPPING=1")
        journal.info("stopping")
        raise _Stop

    loop.add_signal_handler(signal.SIGTERM, lambda: tasks.create_task(stop(), name="stop"))
    loop.add_signal_handler(signal.SIGINT, lambda: tasks.create_task(stop(), name="stop"))
    loop.add_signal_handler(signal.SIGHUP, lambda: tasks.create_task(reload(), name="reload"))  # type: ignore[arg-type]


async def _leave_when_idle(idle: IdleExit) -> None:
    await idle.wait()
    daemon.notify("STOPPING=1\nSTATUS=nothing to do; the next call starts it again")
    journal.info("idle-exit")
    raise _Stop


async def _reload(registry: Registry, control: ControlService) -> None:
    # Type=notify-reload: systemd.service(5); systemctl waits for the READY=1 that follows.
    daemon.notify(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
    try:
        await control.reload()
        status = registry.summary()
    except NanoclawError as exc:
        status = f"reload failed, going on as before: {exc}"
        journal.error("reload-failed", f"{exc}, going on as before")
    daemon.notify(f"READY=1\nSTATUS={status}")


async def _keep_watchdog(db: Database, systemd: Systemd) -> None:
    """Tell systemd that we live, as long as the database and the bus answer."""
    interval_us = int(os.environ.get("WATCHDOG_USEC", "0"))
    if not interval_us:
        return
    while True:
        await db.read("count_queued", session=0)
        await systemd.ping()
        daemon.notify("WATCHDOG=1")
        await asyncio.sleep(interval_us / 3e6)


if __name__ == "__main__":
    main()
