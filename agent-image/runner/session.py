"""The life of one runner: hello, work, good-bye."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time

from . import journal
from .host import Backoff, Host, open_greeted
from .notify import notify
from .processes import Reaper
from .protocol import ProtocolError, Settings, parse_turn
from .provider import Paths, Provider, make_provider
from .turn import TurnRun
from .wire import Connection, HostAway, HostError, render_call


class Session:
    """Runs in the main thread. Only wake() may be called from elsewhere."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._host = Host(paths.host_socket)
        self._settings: Settings | None = None
        self._provider: Provider | None = None
        self._work: Connection | None = None
        self._run: TurnRun | None = None
        self._idle_since = time.monotonic()
        self._reaper = Reaper()
        self._woken, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def wake(self) -> None:
        """Make the main thread look again; may be called by any thread and by signal handlers."""
        with contextlib.suppress(BlockingIOError):  # full: it will look anyway
            os.write(self._waker, b"\0")

    def mute(self) -> None:
        """Tell the router nothing more; may be called by signal handlers."""
        self._host.mute()

    def serve(self) -> int:
        """Work until there is nothing to do any more; return the exit status."""
        backoff = Backoff()
        while True:
            try:
                self._connect()
                backoff.reset()
                if self._serve_connection():
                    return 0
            except HostAway as exc:
                journal.info("host-away", reason=exc)
                backoff.wait()
            except HostError as exc:
                if exc.name == "ProtocolMismatch":
                    journal.error("protocol-mismatch", reason="rebuild the agent image")
                    return 1
                journal.warning("work-refused", reason=exc)
                backoff.wait()
            except ProtocolError as exc:
                journal.error("protocol-error", reason=exc)
                return 1
            finally:
                if self._work is not None:
                    self._work.close()
                    self._work = None

    def _connect(self) -> None:
        self._work, settings = open_greeted(self._paths.host_socket)
        self._work.send(render_call("Work", {}, more=True))
        if self._settings is None:  # a router that was restarted does not change a running agent
            self._settings = settings
            # No STATUS= for each turn: the user's manager would tell it to everybody on the bus.
            notify("READY=1", f"STATUS=provider {settings.provider}")
            try:
                self._provider = make_provider(settings, self._paths)
            except LookupError as exc:
                raise ProtocolError(str(exc)) from exc
            # While the message travels: importing an SDK takes much longer than all the rest together.
            threading.Thread(target=self._provider.load, name="load", daemon=True).start()
            journal.info("session-ready", agent=settings.agent, session=settings.session)
        self._host.open()  # before a turn has something to tell

    def _serve_connection(self) -> bool:
        """Handle what arrives. True: good-bye was said."""
        assert self._work is not None and self._settings is not None
        poll = select.poll()
        poll.register(self._work, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        while True:
            while (reply := self._work.take()) is not None:
                self._handle(reply)
            reap_in = self._reaper.reap(time.monotonic())
            idle_in = self._idle_in()
            if idle_in is not None and idle_in <= 0:
                if not self._host.call("Goodbye", {}).get("stay"):
                    journal.info("session-idle")
                    notify("STOPPING=1")
                    return True
                self._idle_since, idle_in = time.monotonic(), self._settings.idle_s
            waits = [wait for wait in (reap_in, idle_in) if wait is not None]
            ready = poll.poll(min(waits) * 1000 + 1 if waits else None)
            for fd, _ in ready:
                if fd == self._woken:
                    os.read(self._woken, 4096)
                else:
                    self._work.read()

    def _idle_in(self) -> float | None:
        """Return the seconds until good-bye is due, None while there is work."""
        assert self._settings is not None
        if self._run is not None:
            if not self._run.is_over:
                return None
            self._run, self._idle_since = None, time.monotonic()
        return self._settings.idle_s - (time.monotonic() - self._idle_since)

    def _handle(self, reply: dict[str, object]) -> None:
        if reply.get("turn") is not None:
            self._start(reply["turn"])
        elif self._run is not None and self._run.id == reply.get("stop"):
            self._run.stop(on_stuck=lambda: os._exit(1))

    def _start(self, raw: object) -> None:
        assert self._settings is not None and self._provider is not None
        turn = parse_turn(raw)
        if self._run is not None and not self._run.is_over:
            if (self._run.id, self._run.attempt) == (turn.id, turn.attempt):
                return  # the router was restarted, or we were cut off: it goes on
            self._run.abandon()
            self._run.join()
        self._run = TurnRun(
            turn,
            host=self._host,
            provider=self._provider,
            heartbeat_s=self._settings.heartbeat_s,
            on_end=self.wake,
        )
        self._run.start()
