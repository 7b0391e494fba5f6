"""Idle exit: a router with nothing to do ends, and the next call has systemd start another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from nanoclawd.channels import Channels
from nanoclawd.db import Database
from nanoclawd.errors import Unavailable
from nanoclawd.server import Server
from nanoclawd.sessions import Sessions


class IdleExit:
    """Nothing is polled: whatever keeps the router busy says so when it ends, by touch()."""

    def __init__(
        self,
        *,
        db: Database,
        sessions: Sessions,
        channels: Channels,
        seconds: Callable[[], int],
    ) -> None:
        self._db = db
        self._channels = channels
        self._sessions = sessions
        self._seconds = seconds  #: without anything to do; 0: for ever
        self._touched = asyncio.Event()
        self.servers: Sequence[Server] = ()  #: of people and of the terminal

    def touch(self) -> None:
        """Something has ended, or the settings have changed: count anew."""
        self._touched.set()

    async def wait(self) -> None:
        """Return when the router may leave. It then accepts nothing more: who comes waits in the kernel's
        backlog, which is systemd's too, and has it start the next router.
        """
        while True:
            self._touched.clear()
            try:
                async with asyncio.timeout(self._seconds() or None):
                    await self._touched.wait()
            except TimeoutError:
                if await self._is_idle():
                    for server in self.servers:
                        server.stop()
                    return
                await self._touched.wait()

    async def _is_idle(self) -> bool:
        # What waits for the terminal is no reason to stay: its call starts the next router.
        try:
            return not (self._is_busy() or await self._db.read("find_work") or self._is_busy())
        except Unavailable:
            return False

    def _is_busy(self) -> bool:
        # Other channels' listeners are in the fd store: while no router runs, nobody would see a call there.
        return (
            self._channels.are_any()
            or any(server.active for server in self.servers)
            or any(True for _ in self._sessions.live())
        )
