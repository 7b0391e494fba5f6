"""The life of one runner: hello, work, good-bye."""

from __future__ import annotations

import contextlib
import os
import select
import time
from typing import cast

from . import journal
from .forwarder import Forwarder
from .host import Connection, Host, HostAway, HostError, backoff
from .processes import Reaper
from .provider import LoadedProvider, NoProvider, Paths, Settings, Turn
from .turn import TurnRun


class Session:
    """Runs in the main thread. Only wake() and mute() may be called from elsewhere, by signal handlers."""

    _settings: Settings
    _provider: LoadedProvider

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._host = Host(paths.host_socket)
        self._is_ready = False
        self._run: TurnRun | None = None
        self._idle_since = time.monotonic()
        self._reaper = Reaper()
        self._forwarder = _forwarder(paths)
        self._woken, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def wake(self) -> None:
        """Make the main thread look again."""
        with contextlib.suppress(BlockingIOError):  # full: it will look anyway
            os.write(self._waker, b"\0")

    def mute(self) -> None:
        """Tell the router nothing more."""
        self._host.is_muted = True

    def serve(self) -> int:
        """Work until there is nothing to do any more; return the exit status."""
        waits = backoff()
        while True:
            try:
                with contextlib.closing(Connection(self._paths.host_socket)) as work:
                    work.send("Work", {}, more=True)
                    waits = backoff()
                    if not self._is_ready:  # a router that was restarted does not change a running agent
                        self._get_ready(cast("Settings", work.greeting))
                    self._host.open()  # before a turn has something to tell
                    self._serve_work(work)
                    return 0
            except HostAway as exc:
                journal.info("host-away", reason=exc)
            except HostError as exc:
                if exc.name == "ProtocolMismatch":
                    journal.error("protocol-mismatch", reason="rebuild the agent image")
                    return 1
                journal.warning("work-refused", reason=exc)
            except NoProvider as exc:
                journal.error("no-provider", reason=exc)
                return 1
            next(waits)

    def _get_ready(self, settings: Settings) -> None:
        self._settings, self._is_ready = settings, True
        if self._forwarder is not None:
            self._forwarder.start()
        # No STATUS= for each turn: the user's manager would tell it to everybody on the bus.
        journal.notify("READY=1", f"STATUS=provider {settings['provider']}")
        self._provider = LoadedProvider(settings, self._paths)
        journal.info("session-ready", agent=settings["agent"], session=settings["session"])

    def _serve_work(self, work: Connection) -> None:
        """Handle what arrives, until good-bye was said."""
        poll = select.poll()
        poll.register(work, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        while True:
            while (reply := work.take()) is not None:
                if reply.get("turn") is not None:
                    self._start(reply["turn"])
                elif self._run is not None and self._run.turn["id"] == reply.get("stop"):
                    self._run.stop()
            waits = [self._reaper.reap(time.monotonic()), self._idle_in()]
            if waits[1] is not None and waits[1] <= 0:
                if not self._host.call("Goodbye", {})["stay"]:
                    journal.info("session-idle")
                    journal.notify("STOPPING=1")
                    return
                self._idle_since, waits[1] = time.monotonic(), self._settings["idleSeconds"]
            timeout_s = min((wait for wait in waits if wait is not None), default=None)
            for fd, _ in poll.poll(None if timeout_s is None else timeout_s * 1000 + 1):
                if fd == self._woken:
                    os.read(self._woken, 4096)
                else:
                    work.read()

    def _idle_in(self) -> float | None:
        """Return the seconds until good-bye is due, None while there is work."""
        if self._run is not None:
            if not self._run.over.is_set():
                return None
            self._run, self._idle_since = None, time.monotonic()
        return self._settings["idleSeconds"] - (time.monotonic() - self._idle_since)

    def _start(self, turn: Turn) -> None:
        if self._run is not None and not self._run.over.is_set():
            running = self._run.turn
            if (running["id"], running["attempt"]) == (turn["id"], turn["attempt"]):
                return  # the router was restarted, or we were cut off: it goes on
            self._run.abandon()
            self._run.join()
        self._run = TurnRun(turn, self._host, self._provider, on_end=self.wake)
        self._run.start(heartbeat_s=self._settings["heartbeatSeconds"])


def _forwarder(paths: Paths) -> Forwarder | None:
    """Return the gateway on loopback, or None if there cannot be one: an agent can work without."""
    host, _, port = paths.proxy.partition(":")
    try:
        return Forwarder(paths.gateway_socket, (host, int(port))) if port else None
    except OSError as exc:
        journal.warning("no-proxy", address=paths.proxy, reason=exc)
        return None
