"""The kill switch: whether agents may run at all.

A person throws it with nanoclawctl or at systemd ('systemctl --user stop nanoclaw-agents.slice'), whose
word counts even if it came while the router was away or hung. It stays thrown, over restarts and reboots,
until the person says so or starts the slice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from nanoclawd import journal, limits
from nanoclawd.audit import Kind, append
from nanoclawd.db import Database, Transaction
from nanoclawd.errors import NanoclawError
from nanoclawd.systemd import Systemd, UnitChange

SLICE = "nanoclaw-agents.slice"


class KillSwitch:
    """In the database are `held` and the service manager (its start) in which the slice was
    last seen active; empty if it was last seen inactive. A slice that is inactive in the manager that had it
    active was stopped by a person; in a new manager it is only not up yet.
    """

    def __init__(
        self,
        *,
        db: Database,
        systemd: Systemd,
        on_throw: Callable[[], None],
        on_release: Callable[[], None],
    ) -> None:
        self._db = db
        self._systemd = systemd
        self._on_throw = on_throw  #: what runs is ended by the person; called before any of it is gone
        self._on_release = on_release
        self.thrown = True  #: until settle() has looked
        self._up = False  #: whether the slice is active, as far as we have heard
        self._starts = 0  #: starts of containers that are under way
        self._crossed = False  #: the slice was stopped meanwhile: the start may bring it up again
        self._deciding = asyncio.Lock()
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Follow what happens to the slice until cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            was_thrown = self.thrown
            try:
                await self.settle()
            except NanoclawError as exc:
                journal.warning("kill-switch", f"{exc}, looking again in {limits.STORE_AGAIN_S:.0f} s")
                await asyncio.sleep(limits.STORE_AGAIN_S)
                self._changed.set()
            if was_thrown and not self.thrown:
                self._on_release()

    async def hold(self) -> None:
        """Stop all agents and start none. Raises Unavailable, Failed: none is started, but some may run."""
        self._throw()
        async with self._deciding:
            try:
                # A hold that was begun, until the slice is gone: the next router ends it, if we cannot.
                await self._note(held=True, seen="unfinished")
            finally:
                await self._systemd.stop_unit(SLICE)
            await self._note(held=True, seen="")
        journal.info("agents-held")

    async def release(self) -> None:
        """Let agents run. Raises Unavailable, Failed."""
        async with self._deciding:
            await self._systemd.start_unit(SLICE)
            await self._note(held=False, seen=str(await self._systemd.started_at()))
            self.thrown = False
        journal.info("agents-released")
        self._on_release()

    async def settle(self) -> None:
        """Make what systemd shows and what is recorded agree. Raises Unavailable, Failed."""
        async with self._deciding:
            while not await self._agree():
                pass

    async def _agree(self) -> bool:
        """Take one step; return whether it was the last."""
        ((held, seen),) = await self._db.read("router")
        manager = str(await self._systemd.started_at())
        crossed, self._crossed = self._crossed, False
        if await self._systemd.has_job(SLICE):
            return True  # the end of its job is announced
        self._up = await self._is_up()
        if self._up:
            # What was begun is ended; and a start of ours that crossed a person's stop is no word of theirs.
            if (held and seen) or crossed:
                await self._note(held=True, seen="unfinished")
                await self._systemd.stop_unit(SLICE)
                return False
            if held or seen != manager:
                await self._note(held=False, seen=manager, event="slice_started" if held else "")
            if held:
                journal.info("agents-released", f"{SLICE} was started")
            self.thrown = False
        elif await self._systemd.is_ending():
            pass  # everything is stopped: that is not about agents
        elif held or seen == manager:
            if seen:
                await self._note(held=True, seen="", event="slice_stopped")
                journal.info("agents-held", f"{SLICE} was stopped")
            self._throw()
        else:
            await self._systemd.start_unit(SLICE)
            await self._note(held=False, seen=manager)
            return False
        return True

    async def _is_up(self) -> bool:
        return bool(await self._systemd.unit_property(SLICE, "Unit", "ActiveState") == "active")

    async def start_unit(self, unit: str) -> bool:
        """Start a container's unit, unless the person has stopped all. Returns whether. Raises Failed, …"""
        self._starts += 1
        try:
            # Asked: a signal that says otherwise may still be on its way.
            if await self._systemd.has_job(SLICE) or not await self._is_up() or self.thrown:
                return False
            await self._systemd.start_unit(unit, mode="fail")
        finally:
            self._starts -= 1
        return True

    def unit_changed(self, change: UnitChange) -> None:
        """Systemd has something to say of a unit."""
        if change.unit != SLICE or (change.active_state == "inactive" and not self._up):
            return  # systemd forgets units that are not up, and looks for them again when asked
        if change.active_state is not None:
            self._up = change.active_state == "active"
            self._crossed |= not self._up and self._starts > 0
        if change.job or not self._up:  # an active slice gets no job but to be stopped
            self._throw()
        self._changed.set()

    def _throw(self) -> None:
        if not self.thrown:
            self.thrown = True
            self._on_throw()

    async def _note(self, *, held: bool, seen: str, event: str = "") -> None:
        """Record the state, and in the audit trail the `event` at systemd that has led to it."""

        def note(tx: Transaction) -> None:
            tx.all("set_router", held=int(held), seen=seen)
            if event:
                append(tx, Kind.CONTROL, event, {"unit": SLICE})

        await self._db.write(note)
