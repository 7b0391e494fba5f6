"""nanoclaw-gateway: the agents' way out, by policy, with credentials that they never see.

Talks to:   agents, in HTTP on the listeners that the router attaches (untrusted); endpoints of routes, over
            TLS; hosts that an agent's policy names; the router, on io.nanoclaw.Gateway; systemd's credential
            service.
May touch:  nanoclaw.toml and its credentials, read-only. No database, no agent files, no D-Bus, no Podman.
Trusts:     the router with who is behind a listener, and with policies. Nothing that an agent sends: target,
            headers, length and pace are checked here; nothing that a name leads to.
On trouble: refuses that request with an error that says why, and logs it. A broken nanoclaw.toml at start
            refuses all requests; at a reload the former one stays. Exits on a bug, and systemd restarts it;
            the router then attaches again.

It keeps nothing: all it knows are its configuration, its credentials and what the router told it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from systemd import daemon

from nanoclawd import credentials, journal, sandbox
from nanoclawd.errors import ConfigError
from nanoclawd.gateway import limits
from nanoclawd.gateway.service import GatewayService
from nanoclawd.gateway.sessions import Gateway
from nanoclawd.gateway.upstream import make_tls
from nanoclawd.server import Server
from nanoclawd.settings import read_settings

LISTENER = "gateway"  #: FileDescriptorName= in nanoclaw-gateway.socket
EXIT_USAGE = 2


def main() -> None:
    """Run until SIGTERM."""
    descriptors = daemon.listen_fds_with_names(unset_environment=True)
    named = [fd for fd, name in descriptors.items() if name == LISTENER]
    if len(named) != 1 or not daemon.is_socket_unix(named[0], socket.SOCK_STREAM, 1):
        print(
            f"error: no listening socket '{LISTENER}' was passed\n"
            "hint: 'systemctl --user start nanoclaw-gateway.socket'; systemd starts this program",
            file=sys.stderr,
        )
        sys.exit(EXIT_USAGE)
    credentials.never_dump_core()
    with socket.socket(fileno=named[0]) as listener:
        asyncio.run(run(listener))


async def run(listener: socket.socket) -> None:
    """Serve io.nanoclaw.Gateway on `listener`, and agents on what it attaches, until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(limits.THREADS, thread_name_prefix="blocking"))
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    checks = sandbox.run_checks(sandbox.GATEWAY)
    async with asyncio.TaskGroup() as tasks:
        gateway = Gateway(tasks, make_tls())
        read_configuration(gateway, checks)
        loop.add_signal_handler(signal.SIGHUP, reload, gateway, checks)
        service = GatewayService(gateway, checks).service
        serving = tasks.create_task(Server(service, listener, max_fds=1).run(), name="varlink")
        watching = tasks.create_task(feed_watchdog(), name="watchdog")
        gateway.report_status()
        daemon.notify("READY=1")
        await stop.wait()
        # The listener stays open in systemd: who calls now reaches our successor.
        daemon.notify("STOPPING=1")
        await gateway.drain()
        await asyncio.gather(gateway.trail.hand_over(), gateway.ledger.hand_over())
        serving.cancel()
        watching.cancel()


def read_configuration(gateway: Gateway, checks: Sequence[sandbox.Check]) -> None:
    """Take over what nanoclaw.toml says now; if it is wrong, keep what is there."""
    try:
        settings = read_settings()
    except ConfigError as exc:
        kept = not isinstance(gateway.settings, ConfigError)
        going_on = "keeping the former settings" if kept else "refusing all requests until it is corrected"
        journal.error("bad-config", f"{exc}, {going_on}")
        if not kept:
            gateway.settings = exc
        return
    gateway.settings = settings
    if settings.require_sandbox:
        try:
            sandbox.require(checks)
        except ConfigError as exc:
            journal.error("sandbox-required", f"{exc}, refusing all requests")
            gateway.settings = exc


def reload(gateway: Gateway, checks: Sequence[sandbox.Check]) -> None:
    """What 'systemctl --user reload' does. See "notify-reload" in systemd.service(5)."""
    daemon.notify(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
    read_configuration(gateway, checks)
    gateway.report_status()
    daemon.notify("READY=1")


async def feed_watchdog() -> None:
    """Tell systemd twice per WatchdogSec= that the loop turns. See sd_watchdog_enabled(3)."""
    timeout_us = int(os.environ.get("WATCHDOG_USEC", "0"))
    if timeout_us == 0 or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    while True:
        daemon.notify("WATCHDOG=1")
        await asyncio.sleep(timeout_us / 2e6)


if __name__ == "__main__":
    main()
