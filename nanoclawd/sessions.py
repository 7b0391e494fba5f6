"""The life of sessions: which container runs when."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

from systemd import daemon

from nanoclawd import journal, limits, paths
from nanoclawd.db import Database, now_ms
from nanoclawd.diagnosis import explain_start
from nanoclawd.errors import ConfigError, Failed, NanoclawError, NotFound, Refused, Unavailable
from nanoclawd.gateway_link import GatewayLink
from nanoclawd.ids import AgentName
from nanoclawd.killswitch import KillSwitch
from nanoclawd.outlets import Outlets
from nanoclawd.queue import SessionRow, session_row
from nanoclawd.rates import Rate
from nanoclawd.registry import Registry
from nanoclawd.server import Server, Service
from nanoclawd.session import Session, SessionState
from nanoclawd.sockets import bind_listener, forget_listener, store_listener
from nanoclawd.systemd import Systemd, UnitChange
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
        self._systemd = systemd
        self._registry = registry
        self._outlets = outlets
        self._gateway = gateway
        self._tasks = tasks
        self._slots = asyncio.Semaphore(slots)  # first come, first served
        self._waiting = 0  #: sessions that have work and no slot
        self._live: dict[int, Session] = {}
        self._by_unit: dict[str, Session] = {}
        self.turns = Turns(
            db=db,
            outlets=outlets,
            tasks=tasks,
            find=self.find,
            stop=self._stop_soon,
            make_room=self._make_room,
            attempts=lambda: registry.settings.attempts,
        )
        self.service: Service | None = None  #: what runners are served; set once before anything starts
        self.switch = KillSwitch(
            db=db, systemd=systemd, on_throw=self._end_all, on_release=self._wake_all_soon
        )
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

    def begin(self) -> None:
        """All that outlived the previous router is adopted: what is left of others goes, and from now on the
        kill switch can be released.
        """
        live = {paths.session_runtime(s.row.agent, s.row.name) for s in self._live.values()}
        for runtime in paths.runtime().glob("agents/*/*"):
            if runtime not in live:
                _remove(runtime)
        self._tasks.create_task(self.switch.run(), name="kill switch")

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

    async def stop_containers(self, agent: AgentName) -> None:
        """Stop all containers of an agent because the person says so; their turns go back to the queue."""
        sessions = [s for s in self._live.values() if s.row.agent == agent]
        for session in sessions:
            session.stopped_by_person = True
            session.wanted.set()
        running = [s for s in sessions if s.state not in (SessionState.QUEUED, SessionState.IDLE)]
        results = await asyncio.gather(
            *(self._end_unit(session) for session in running), return_exceptions=True
        )
        for failure in results:
            if isinstance(failure, BaseException):
                raise failure

    # --- what runners call (agent_service.py) ------------------------------------------------------

    def refuse(self, session: Session, reason: NanoclawError) -> None:
        """Nothing can come of this runner: stop it, and let its message have the reason."""
        if session.refused is None:
            session.refused = reason
            self._stop_soon(session)

    def expect_work(self, session: Session) -> None:
        """From now on the runner has a while to ask for work: one that never does would block its chat."""
        if session.silence is not None:
            session.silence.cancel()
        loop = asyncio.get_running_loop()
        session.silence = loop.call_later(limits.HELLO_S, self._stop_silent, session)

    def leave(self, session: Session) -> None:
        """The runner has said good-bye: it takes nothing more, and must be gone soon."""
        if session.left:  # saying it again gives no more time
            return
        session.left = True
        session.state = SessionState.STOPPING
        if session.stopping is not None:
            session.stopping.cancel()
        session.stopping = asyncio.get_running_loop().call_later(
            limits.STOP_TURN_S, self._stop_straggler, session
        )

    # --- the life of one session -------------------------------------------------------------------

    def _add(self, session: Session) -> None:
        self._live[session.row.id] = session
        self._by_unit[session.unit] = session

    async def _run_life(self, session: Session, *, adopted: bool = False) -> None:
        """Run containers for a session until there is nothing to do for it."""
        try:
            while adopted or await self._has_work(session):
                if adopted:
                    # It runs also if there is no slot for it any more, since the limit was lowered.
                    has_slot = not self._slots.locked()
                    if has_slot:
                        await self._slots.acquire()
                    try:
                        await self._run_container(session, adopted=True)
                    finally:
                        if has_slot:
                            self._slots.release()
                else:
                    self._outlets.report_activity(session.row, "queued", events=session.waiting_events)
                    await self._take_slot()
                    try:
                        if self.may_run(session.row.agent):
                            await self._run_container(session)
                    finally:
                        self._slots.release()
                adopted = False
        finally:
            session.cancel_timers()
            del self._live[session.row.id], self._by_unit[session.unit]

    async def _take_slot(self) -> None:
        """Wait for a slot; whoever only waits for more work makes room."""
        self._waiting += 1
        try:
            self._make_room()
            await self._slots.acquire()
        finally:
            self._waiting -= 1

    def _make_room(self) -> None:
        """If a session waits for a slot, end the container that has been idle for longest."""
        # One that has left already, and waits again itself, leaves no slot.
        leaving = sum(s.left and s.state is not SessionState.QUEUED for s in self._live.values())
        if not self._slots.locked() or leaving >= self._waiting:
            return
        # One that has just come up is not idle: its message is about to be leased to it.
        idle = [
            (s.idle_since, s.row.id, s)
            for s in self._live.values()
            if s.idle_since is not None and s.state is SessionState.READY and s.can_take()
        ]
        if idle:
            session = min(idle)[2]
            session.left = True  # from now on it takes nothing
            self._stop_soon(session)

    async def _has_work(self, session: Session) -> bool:
        """Wait until the oldest message is due; return False if there is none, or the agent must not run."""
        while True:
            session.wanted.clear()
            rows = await self._db.read("next_message", session=session.row.id)
            if session.wanted.is_set():
                continue  # something changed while we looked
            if not rows or not self.may_run(session.row.agent):
                return False
            wait_ms = rows[0]["not_before"] - now_ms()
            if wait_ms <= 0:
                session.waiting_events = [rows[0]["event"]]
                return True
            try:
                async with asyncio.timeout(wait_ms / 1000):
                    await session.wanted.wait()
            except TimeoutError:
                pass

    async def _run_container(self, session: Session, *, adopted: bool = False) -> None:
        if not adopted:
            session.begin_life()
            self._outlets.report_activity(session.row, "starting", events=session.waiting_events)
        problem: NanoclawError | None = None
        serving: asyncio.Task[None] | None = None
        try:
            self._prepare(session)
            assert session.host is not None and session.gateway is not None and self.service is not None
            server = Server(
                self.service,
                session.host,
                identity=session,
                connections=limits.CONNECTIONS_PER_SESSION,
                calls=Rate(limits.CALLS_PER_S, limits.CALLS_BURST),
                on_offence=partial(self._note_offence, session),
            )
            serving = self._tasks.create_task(server.run(), name=f"host.sock of {session.unit}")
            session.serving = serving
            self._gateway.attach(session.row.agent, session.row.name, session.gateway)
            if not adopted:
                await self._start(session)
            await self._look(session)
            if session.stream is None:
                self.expect_work(session)
            self._report_status()
            await self._wait_gone(session)
        except (ConfigError, Failed, NotFound, Refused, Unavailable) as exc:
            problem = exc
            if isinstance(exc, Unavailable):  # systemd did not say that it does not run
                await self._stop_unit(session)
        finally:
            session.end_stream()
            if serving is not None:
                serving.cancel()
                await asyncio.wait([serving])
            session.cancel_timers()
        await self._account(session, problem)
        self._discard(session)
        session.state = SessionState.QUEUED
        self._report_status()

    def _prepare(self, session: Session) -> None:
        """Make directories and listeners; those that came from the fd store stay."""
        agent, name = session.row.agent, session.row.name
        try:
            runtime = paths.session_runtime(agent, name)
            runtime.mkdir(mode=0o711, parents=True, exist_ok=True)
            runtime.chmod(0o711)  # whatever the umask; the directory above all, nanoclaw/, keeps others out
            state = paths.session_state(agent, name)
            state.mkdir(parents=True, exist_ok=True)
            state.chmod(0o770)  # the agent's uid is foreign, its group is ours
        except OSError as exc:
            raise Unavailable(f"cannot make the session's directories: {exc}") from exc
        if session.host is None:
            session.host = bind_listener(runtime / "host.sock")
            store_listener(f"host.{agent}.{name}", session.host)
        if session.gateway is None:
            session.gateway = bind_listener(runtime / "gateway.sock")
            store_listener(f"gateway.{agent}.{name}", session.gateway)

    async def _start(self, session: Session) -> None:
        await self._registry.ensure_unit(session.row.agent)
        if not await self.switch.start_unit(session.unit):
            session.stopped_by_person = True
            return
        session.alive = True
        if session.state is SessionState.STARTING:
            session.state = SessionState.READY
        journal.info("session-started", agent=session.row.agent, session=session.row.name, unit=session.unit)

    async def _look(self, session: Session) -> None:
        """See whether the unit ended before we got here, without a signal that we took for its end."""
        active = await self._systemd.unit_property(session.unit, "Unit", "ActiveState")
        if active in ("inactive", "failed"):
            session.gone.set()

    async def _wait_gone(self, session: Session) -> None:
        """Return when the unit is gone; meanwhile offer the runner what comes due."""
        gone = asyncio.ensure_future(session.gone.wait())
        try:
            while not session.gone.is_set():
                wanted = asyncio.ensure_future(session.wanted.wait())
                try:
                    await asyncio.wait((gone, wanted), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    wanted.cancel()
                if session.wanted.is_set():
                    session.wanted.clear()
                    await self.turns.offer_due(session)
        finally:
            gone.cancel()

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
            await self._forget_failure(session)

    async def _forget_failure(self, session: Session) -> None:
        try:
            await self._systemd.reset_failed(session.unit)
        except NanoclawError as exc:
            journal.debug("reset-failed", str(exc), unit=session.unit)

    def _report_status(self) -> None:
        """Say in `systemctl status` what goes on."""
        running = sum(s.state not in (SessionState.IDLE, SessionState.QUEUED) for s in self._live.values())
        daemon.notify(f"STATUS={self._registry.summary()}, {running} sessions running")

    def _discard(self, session: Session) -> None:
        """Close the listeners and remove the runtime directory of a session without a container."""
        agent, name = session.row.agent, session.row.name
        self._gateway.detach(agent, name)
        for kind, listener in (("host", session.host), ("gateway", session.gateway)):
            if listener is not None:
                forget_listener(f"{kind}.{agent}.{name}")
                listener.close()
        session.host = session.gateway = None
        _remove(paths.session_runtime(agent, name))

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
        if session is None:
            return
        if change.result is not None:
            session.result = change.result
        if change.exit_status is not None:
            session.exit_status = change.exit_status
        if change.active_state in ("active", "activating"):
            session.alive = True
        elif change.active_state == "deactivating":
            session.state = SessionState.STOPPING
        elif change.active_state in ("inactive", "failed") and session.alive:
            # Not before it has run: what systemd says late of its previous life must not end this one.
            session.gone.set()

    def _stop_silent(self, session: Session) -> None:
        if session.stream is not None or session.turn is not None:
            return
        reason = f"its runner did not ask for work within {limits.HELLO_S:.0f} s"
        self._disown(session, "runner-silent", reason)

    def _note_offence(self, session: Session, what: str) -> None:
        """A call broke the contract. A runner that goes on like that is not heard any more, and stopped."""
        if not session.offences.take() or session.refused is not None:
            return
        self._disown(session, "protocol-broken", "its runner broke the protocol too often", what)
        if session.serving is not None:
            session.serving.cancel()

    def _disown(self, session: Session, event: str, reason: str, detail: str = "") -> None:
        text = f"{reason}, at last with: {detail}" if detail else reason
        journal.warning(event, f"{text}, stopping the container", unit=session.unit, agent=session.row.agent)
        hint = f"'nanoclawctl agent logs {session.row.agent}' shows more"
        self.refuse(session, Failed(reason, hint=hint))

    def _stop_straggler(self, session: Session) -> None:
        journal.warning("runner-stayed", "it said good-bye; stopping the container", unit=session.unit)
        self._stop_soon(session)

    def _stop_soon(self, session: Session) -> None:
        self._tasks.create_task(self._stop_unit(session), name=f"stop of {session.unit}")

    async def _stop_unit(self, session: Session) -> None:
        try:
            await self._end_unit(session)
        except NanoclawError as exc:
            journal.warning("stop-failed", f"{exc}, waiting for systemd", unit=session.unit)

    async def _end_unit(self, session: Session) -> None:
        gone = session.gone  # of this life
        await self._systemd.stop_unit(session.unit)
        gone.set()  # of a unit that was gone already, systemd says nothing more


def _remove(runtime: Path) -> None:
    # Ours alone: the container sees it read-only.
    shutil.rmtree(runtime, ignore_errors=True)
    with suppress(OSError):  # another session of the agent lives there
        runtime.parent.rmdir()
