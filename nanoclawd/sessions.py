"""The life of sessions: which container runs when."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

from systemd import daemon

from nanoclawd import journal, limits, paths
from nanoclawd.containers import Containers, remove_runtime
from nanoclawd.db import Database, Row, Transaction, now_ms
from nanoclawd.diagnosis import explain_start
from nanoclawd.errors import ConfigError, Failed, NanoclawError, NotFound, Refused
from nanoclawd.gateway_link import GatewayLink
from nanoclawd.ids import AgentName
from nanoclawd.killswitch import KillSwitch
from nanoclawd.messages import SessionRow, place_of, session_row
from nanoclawd.outlets import Outlets
from nanoclawd.registry import Registry
from nanoclawd.session import Session, SessionState, explain_wait
from nanoclawd.slots import Slots
from nanoclawd.systemd import Systemd, UnitChange
from nanoclawd.trash import move_to_trash
from nanoclawd.turns import Turns


class Sessions:
    """All sessions that are more than rows: waiting for a container, or having one."""

    def __init__(
        self,
        *,
        db: Database,
        systemd: Systemd,
        registry: Registry,
        outlets: Outlets,
        gateway: GatewayLink,
        tasks: asyncio.TaskGroup,
        slots: int,
    ) -> None:
        self._db = db
        self._registry = registry
        self._outlets = outlets
        self._tasks = tasks
        self._slots = Slots(slots)
        self._live: dict[int, Session] = {}
        self._by_unit: dict[str, Session] = {}
        self.turns = Turns(
            db=db,
            outlets=outlets,
            tasks=tasks,
            find=self.find,
            stop=lambda session, why: self.containers.stop_soon(session, why),
            make_room=self._make_room,
            must_leave=self._must_leave,
            attempts=lambda: registry.settings.attempts,
        )
        self.switch = KillSwitch(
            db=db, systemd=systemd, on_throw=self._end_all, on_release=self._wake_all_soon
        )
        self.containers = Containers(
            systemd=systemd,
            registry=registry,
            gateway=gateway,
            switch=self.switch,
            tasks=tasks,
            offer_due=self.turns.offer_due,
        )
        self.on_end: Callable[[], None] = lambda: None  #: a session has nothing to do any more
        systemd.on_unit_change = self._unit_changed

    def live(self) -> Iterable[Session]:
        return self._live.values()

    def find(self, row: SessionRow) -> Session | None:
        return self._live.get(row.id)

    # --- from the outside --------------------------------------------------------------------------

    def wake(self, row: SessionRow) -> None:
        """There may be something to do for a session: give it a life if it has none."""
        session = self._live.get(row.id)
        if session is not None:
            session.wanted.set()
            return
        session = Session(row)
        self._add(session)
        self._tasks.create_task(self._run_life(session), name=f"session {session.unit}")

    def adopt(self, session: Session) -> None:
        """Take over a session whose container outlived the previous router; its listeners are set."""
        session.begin_life()
        session.hello = session.alive = session.worked = True
        session.state = SessionState.WORKING if session.turn else SessionState.READY
        if session.turn:
            self.turns.start_lease(session)
        self._add(session)
        self._tasks.create_task(self._run_life(session, adopted=True), name=f"session {session.unit}")

    def replace(self, session: Session) -> None:
        """The same for one whose container nobody can reach: it is stopped before another begins."""
        session.state = SessionState.STOPPING
        session.ending = "its container was cut off from the router"
        self._add(session)
        self._tasks.create_task(self._run_life(session, orphan=True), name=f"session {session.unit}")

    def begin(self, strangers: Iterable[str]) -> None:
        """All that outlived the previous router is taken over: what is left of others goes, the units of
        `strangers` too, and from now on the kill switch can be released.
        """
        for unit in strangers:
            self._tasks.create_task(self.containers.stop_stranger(unit), name=f"stop of {unit}")
        live = {paths.session_runtime(s.row.agent, s.row.name) for s in self._live.values()}
        for runtime in paths.runtime().glob("agents/*/*"):
            if runtime not in live:
                remove_runtime(runtime)
        self._tasks.create_task(self.switch.run(), name="kill switch")

    def resize(self, slots: int) -> None:
        """From now on so many sessions may have a container; one too many stays until its slot is wanted."""
        self._slots.resize(slots)

    @property
    def held(self) -> bool:
        """Whether the person has stopped all agents, here or by systemctl."""
        return self.switch.thrown

    async def hold_all(self) -> None:
        """Stop all agents until release_all(); their messages wait. Returns when all are gone.

        Raises Unavailable, Failed: no agent is started any more, but some may still run.
        """
        await self.switch.hold()

    async def release_all(self) -> None:
        """Let agents run again, but for those that were stopped one by one. Raises Unavailable, Failed."""
        await self.switch.release()

    def may_run(self, agent: AgentName) -> bool:
        return not self.held and self._registry.may_run(agent)

    def explain_hold(self, name: AgentName) -> str:
        """Say why an agent may not run and what to do about it, in one line; "" if it may."""
        agent = self._registry.find(name)
        if agent is None or agent.problem is not None:
            return str(agent.problem) if agent else f"there is no agent '{name}' any more"
        if self.held:
            return "all agents are stopped; 'nanoclawctl start --all' lets them go on"
        return f"'{name}' is stopped; 'nanoclawctl agent start {name}' lets it go on" if agent.held else ""

    def explain(self, head: Row) -> str:
        """Say in one line why the oldest message of a session, a row of find_work, is not answered yet."""
        session = self.find(session_row(head))
        if hold := self.explain_hold(head["agent"]):
            return hold
        if session is not None and session.slot is not None and not session.slot.granted.is_set():
            return f"waits for a slot, {self._slots.before(session.slot)} before it"
        if session is not None and session.ending:
            return session.ending
        if session is not None and session.state is SessionState.READY and session.stream is None:
            return "its runner has not asked for work yet"
        return explain_wait(head)

    async def stop_containers(self, agent: AgentName) -> None:
        """Stop all containers of an agent because the person says so; their turns go back to the queue."""
        sessions = [s for s in self._live.values() if s.row.agent == agent]
        for session in sessions:
            session.stopped_by_person = True
            session.wanted.set()
        running = [s for s in sessions if s.state not in (SessionState.QUEUED, SessionState.IDLE)]
        results = await asyncio.gather(
            *(self.containers.end(session) for session in running), return_exceptions=True
        )
        for failure in results:
            if isinstance(failure, BaseException):
                raise failure

    async def begin_anew(self, row: SessionRow) -> Path | None:
        """Let an agent forget a conversation, its container being ended first; returns where that went.

        What its turn has goes back to the queue, and is no attempt. Raises Failed, Unavailable.
        """
        session = self._live.get(row.id)
        if session is None or session.state in (SessionState.QUEUED, SessionState.IDLE):
            return _forget(row)  # no container begins while we do this
        if session.anew is None:
            session.anew = asyncio.get_running_loop().create_future()
        anew = session.anew
        session.stopped_by_person = True
        session.wanted.set()
        await self.containers.end(session)
        async with asyncio.timeout(limits.UNIT_STOP_S):
            return await asyncio.shield(anew)

    async def close(self, row: SessionRow) -> Path | None:
        """The same, and what waits for the session ends as stopped; it is listed no more until there is
        more.
        """
        await self._db.write(lambda tx: tx.all("close_session", id=row.id, now=now_ms()))
        for place in {place_of(message) for message in await self._db.read("open_messages", session=row.id)}:
            await self.turns.stop_turn(row, place)
        return await self.begin_anew(row)

    async def close_unused(self, before: int) -> None:
        """Close those whose last message came before some time (ms): what their agents kept of them goes to
        the trash. Raises Failed, Unavailable.
        """
        while rows := await self._db.read("unused_sessions", before=before, limit=limits.PRUNED_AT_ONCE):
            for row in map(session_row, rows):
                close = partial(
                    Transaction.all, query="close_unused", id=row.id, before=before, now=now_ms()
                )
                if await self._db.write(close):
                    journal.info("session-closed", agent=row.agent, session=row.name)
                    await self.begin_anew(row)  # a message that comes meanwhile is answered anew

    # --- the life of one session -------------------------------------------------------------------

    def _add(self, session: Session) -> None:
        self._live[session.row.id] = session
        self._by_unit[session.unit] = session

    async def _run_life(self, session: Session, *, adopted: bool = False, orphan: bool = False) -> None:
        """Run containers for a session until there is nothing to do for it."""
        try:
            if orphan:
                await self.containers.stop(session)
                self._discard(session)
            while adopted or await self._has_work(session):
                try:
                    if adopted:
                        session.slot = self._slots.hold(session.row.agent)
                        await self._run_container(session, adopted=True)
                    elif await self._take_slot(session):
                        await self._run_container(session)
                finally:
                    if session.slot is not None:
                        self._slots.give_back(session.slot)
                        session.slot = None
                adopted = False
        finally:
            session.cancel_timers()
            del self._live[session.row.id], self._by_unit[session.unit]
            self.on_end()

    async def _take_slot(self, session: Session) -> bool:
        """Wait for a slot; who only waits for more work makes room. Returns whether it is still needed."""
        self._report(session, "queued")
        session.slot = self._slots.ask(session.row.agent, session.seq)
        if session.slot.granted.is_set():
            return True
        self._make_room()
        await session.slot.granted.wait()
        return await self._due_in(session) == 0

    def _make_room(self) -> None:
        """If sessions wait for slots, end the containers that have been idle for longest."""
        missing = self._slots.wanted - self._leaving()
        if missing <= 0:
            return
        # One that has just come up is not idle: its message is about to be leased to it.
        idle = [
            (s.idle_since, s.row.id, s)
            for s in self._live.values()
            if s.idle_since is not None and s.state is SessionState.READY and s.can_take()
        ]
        for _, _, session in sorted(idle)[:missing]:
            session.left = True  # from now on it takes nothing
            self.containers.stop_soon(session, "it makes room for another session")

    def _leaving(self) -> int:
        # One that has left already, and waits again itself, leaves no slot.
        return sum(s.left and s.state is not SessionState.QUEUED for s in self._live.values())

    def _must_leave(self, tx: Transaction, session: Session) -> bool:
        """Return whether a session that has done its turn must leave its slot to one that waits."""
        if not self._slots.wanted or session.slot is None or not session.worked:
            return False
        oldest = tx.one("next_message", session=session.row.id)
        return oldest is not None and self._slots.is_due_to_another(
            session.slot, oldest["seq"], leaving=self._leaving()
        )

    async def _has_work(self, session: Session) -> bool:
        """Wait until the oldest message is due; return False if there is none, or the agent must not run."""
        while True:
            session.wanted.clear()
            wait_s = await self._due_in(session)
            if session.wanted.is_set():
                continue  # something changed while we looked
            if not wait_s:
                return wait_s is not None
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await session.wanted.wait()

    async def _due_in(self, session: Session) -> float | None:
        """Return how long the oldest message must wait; None if there is none or the agent must not run."""
        rows = await self._db.read("next_message", session=session.row.id)
        if not rows or not self.may_run(session.row.agent):
            return None
        session.seq, session.waiting_events = rows[0]["seq"], [rows[0]["event"]]
        session.waiting_at = place_of(rows[0])
        wait_ms: int = rows[0]["not_before"] - now_ms()
        return max(0, wait_ms) / 1000

    async def _run_container(self, session: Session, *, adopted: bool = False) -> None:
        if not adopted:
            session.begin_life()
            self._report(session, "starting")
        self._report_status()
        problem = await self.containers.run(session, adopted=adopted)
        await self._account(session, problem)
        self._discard(session)
        self._report_status()

    def _discard(self, session: Session) -> None:
        """Remove what there is of a container that is gone, and what the agent kept if it is to begin
        anew.
        """
        self.containers.discard(session)
        session.state, session.ending = SessionState.QUEUED, ""
        anew, session.anew = session.anew, None
        if anew is not None and not anew.done():
            try:
                anew.set_result(_forget(session.row))
            except Failed as exc:
                anew.set_exception(exc)

    async def _account(self, session: Session, problem: NanoclawError | None) -> None:
        """The container is gone: say why, and have its turn or its message put back or buried."""
        by_person = session.stopped_by_person
        if session.turn is not None or by_person or session.left or session.worked:
            known = session.refused or (None if session.result else problem)
            reason = session.describe_end() if known is None else known.message
        else:
            problem = await explain_start(session, self._registry.find(session.row.agent), problem)
            reason = f"{problem.message}; {problem.hint}" if problem.hint else problem.message
        journal.info(
            "session-ended",
            "" if session.left or by_person else reason,
            agent=session.row.agent,
            session=session.row.name,
            unit=session.unit,
            result=session.result or None,
        )

        # A broken file or a masked unit does not get better by itself.
        final = isinstance(problem, ConfigError | NotFound | Refused)
        await self.turns.put_back(session, reason, stopped=by_person, final=final)
        if problem is not None or session.result not in ("", "success"):
            await self.containers.forget_failure(session)

    def _report(self, session: Session, kind: str) -> None:
        """Tell the chat of the oldest message what becomes of it."""
        self._outlets.report_activity(
            session.row.agent, session.waiting_at, kind, events=session.waiting_events
        )

    def _report_status(self) -> None:
        """Say in `systemctl status` what goes on."""
        running = sum(s.state not in (SessionState.IDLE, SessionState.QUEUED) for s in self._live.values())
        daemon.notify(f"STATUS={self._registry.summary()}, {running} sessions running")

    # --- events ------------------------------------------------------------------------------------

    def _end_all(self) -> None:
        """The person has stopped all agents: what breaks off now is no failure."""
        for session in self._live.values():
            session.stopped_by_person = True
            session.wanted.set()

    def _wake_all_soon(self) -> None:
        self._tasks.create_task(self._wake_all(), name="release")

    async def _wake_all(self) -> None:
        for row in await self._db.read("find_work"):
            self.wake(session_row(row))

    def _unit_changed(self, change: UnitChange) -> None:
        self.switch.unit_changed(change)
        session = self._by_unit.get(change.unit)
        if session is not None:
            self.containers.unit_changed(session, change)


def _forget(row: SessionRow) -> Path | None:
    """Move what an agent has kept of a conversation to the trash. Raises Failed."""
    return move_to_trash(paths.session_state(row.agent, row.name), f"{row.agent}-{row.name}")
