"""The life of sessions: which container runs when, and what becomes of the turn that it had."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TypeVar

from systemd import daemon

from nanoclawd import journal, limits, paths, queue
from nanoclawd.db import Database, Row, Transaction, now_ms
from nanoclawd.diagnosis import explain_start
from nanoclawd.errors import ConfigError, Failed, NanoclawError, NotFound, Refused, Unavailable
from nanoclawd.gateway_link import GatewayLink
from nanoclawd.ids import AgentName
from nanoclawd.outlets import Outlets
from nanoclawd.queue import MessageState, SessionRow, Turn
from nanoclawd.registry import Registry
from nanoclawd.server import Server, Service
from nanoclawd.session import Session, SessionState, describe_turn
from nanoclawd.sockets import bind_listener, forget_listener, store_listener
from nanoclawd.systemd import Systemd, UnitChange

T = TypeVar("T")


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
        self.service: Service | None = None  #: what runners are served; set once before anything starts
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
            self._start_lease(session)
        self._add(session)
        self._tasks.create_task(self._run_life(session, adopted=True), name=f"session {session.unit}")

    async def write(self, row: SessionRow | None, operation: Callable[[Transaction], T]) -> T:
        """Run a write that may give the session `row` something to do, and lease that to its runner at once.

        One commit for both: a message that finds its runner waiting is on disk and on its way together.
        """
        taker: Session | None = None

        def write(tx: Transaction) -> tuple[T, Turn | None]:
            nonlocal taker
            result = operation(tx)
            session = self._live.get(row.id) if row is not None else None
            if session is None or not session.can_take():
                return result, None
            session.taking, taker = True, session
            return result, queue.claim_turn(tx, session.row)

        try:
            result, turn = await self._db.write(write)
        except BaseException:
            if taker is not None:
                taker.taking = False
            raise
        if taker is not None:
            self._take(taker, turn)
        return result

    async def stop_turn(self, row: SessionRow) -> bool:
        """The person says stop: end what the session does and what waits for it. Returns whether there was
        any.
        """
        session = self._live.get(row.id)
        events, deliveries = await self._db.write(lambda tx: _stop_queued(tx, self._outlets, row))
        self._outlets.publish(deliveries)
        for event in events:
            self._outlets.report_activity(row, "idle", event=event)
        if session is None or session.turn is None:
            return bool(events)
        turn = session.turn
        session.push({"turn": None, "stop": turn.id})
        if session.stopping is None:
            loop = asyncio.get_running_loop()
            session.stopping = loop.call_later(limits.STOP_TURN_S, self._stop_hard, session, turn)
        return True

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

    async def offer(self, session: Session) -> None:
        """The runner may have room: lease it the next message that is due."""
        if session.turn is not None:
            session.push(describe_turn(session.turn))
        elif session.can_take():
            await self.write(session.row, _nothing)

    def refuse(self, session: Session, reason: NanoclawError) -> None:
        """Nothing can come of this runner: stop it, and let its message have the reason."""
        if session.refused is None:
            session.refused = reason
            self._tasks.create_task(self._stop_unit(session), name=f"stop of {session.unit}")

    def expect_work(self, session: Session) -> None:
        """From now on the runner has a while to ask for work: one that never does would block its chat."""
        if session.silence is not None:
            session.silence.cancel()
        loop = asyncio.get_running_loop()
        session.silence = loop.call_later(limits.HELLO_S, self._stop_silent, session)

    def renewed(self, session: Session) -> None:
        self._start_lease(session)

    async def end_turn(self, session: Session, turn: Turn, operation: Callable[[Transaction], T]) -> T:
        """Run the write that ends `turn`, publish what it sent, and give the runner what is next."""

        ended = False

        def write(tx: Transaction) -> tuple[T, list[Row]]:
            nonlocal ended
            if session.turn is not turn:  # another call was faster
                raise NotFound(f"turn {turn.id} is over")
            result = operation(tx)
            # Ended as far as this transaction goes, so that the next turn can be leased in it.
            ended, session.turn = True, None
            session.state = SessionState.READY if session.state is SessionState.WORKING else session.state
            return result, self._outlets.claim(tx, session.row, turn.event)

        try:
            result, deliveries = await self.write(session.row, write)
        except BaseException:
            if ended:
                session.turn, session.state = turn, SessionState.WORKING
            raise
        if session.stopping is not None:
            session.stopping.cancel()
            session.stopping = None
        self._outlets.publish(deliveries)
        if session.turn is None and session.lease is not None:
            session.lease.cancel()
            session.lease = None
        self._outlets.report_activity(session.row, "idle", event=turn.event)
        if session.turn is None:
            self._note_idle(session)
        return result

    def retry_later(self, session: Session, not_before: int) -> None:
        """Offer the session's runner its message again when that is due."""
        if session.retry is not None:
            session.retry.cancel()
        wait_s = max(0.0, (not_before - now_ms()) / 1000)
        session.retry = asyncio.get_running_loop().call_later(wait_s, session.wanted.set)

    async def fail_turn(
        self,
        session: Session,
        turn: Turn,
        *,
        reason: str,
        retryable: bool,
        retry_after_ms: int | None = None,
    ) -> None:
        """End a turn that failed: a later attempt, or a dead letter with a notice."""

        def fail(tx: Transaction) -> int | None:
            message = tx.one("leased_message", session=session.row.id)
            if message is None or message["turn"] != turn.id:
                raise NotFound(f"turn {turn.id} has no lease any more")
            return queue.fail_message(
                tx, session.row, message, reason=reason, retryable=retryable, retry_after_ms=retry_after_ms
            )

        not_before = await self.end_turn(session, turn, fail)
        self._note_failure(session, turn.message, turn.attempt, reason, not_before)
        if not_before is not None:
            self._outlets.report_activity(session.row, "retrying", reason, turn.event)
            self.retry_later(session, not_before)

    def leave(self, session: Session) -> None:
        """The runner has said good-bye: it takes nothing more, and must be gone soon."""
        session.left = True
        session.state = SessionState.STOPPING
        if session.stopping is not None:  # it said so before
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
                    # It has its slot already, even if the limit was lowered meanwhile.
                    await self._run_container(session, adopted=True)
                else:
                    self._outlets.report_activity(session.row, "queued", event=session.waiting_event)
                    await self._take_slot()
                    try:
                        if self._registry.may_run(session.row.agent):
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

    def _note_idle(self, session: Session) -> None:
        if session.idle_since is None:
            session.idle_since = asyncio.get_running_loop().time()
        self._make_room()

    def _make_room(self) -> None:
        """If a session waits for a slot, end the container that has been idle for longest."""
        leaving = sum(session.left for session in self._live.values())
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
            self._tasks.create_task(self._stop_unit(session), name=f"stop of {session.unit}")

    async def _has_work(self, session: Session) -> bool:
        """Wait until the oldest message is due; return False if there is none, or the agent must not run."""
        while True:
            session.wanted.clear()
            rows = await self._db.read("next_message", session=session.row.id)
            if session.wanted.is_set():
                continue  # something changed while we looked
            if not rows or not self._registry.may_run(session.row.agent):
                return False
            wait_ms = rows[0]["not_before"] - now_ms()
            if wait_ms <= 0:
                session.waiting_event = rows[0]["event"]
                return True
            try:
                async with asyncio.timeout(wait_ms / 1000):
                    await session.wanted.wait()
            except TimeoutError:
                pass

    async def _run_container(self, session: Session, *, adopted: bool = False) -> None:
        if not adopted:
            session.begin_life()
            self._outlets.report_activity(session.row, "starting", event=session.waiting_event)
        problem: NanoclawError | None = None
        serving: asyncio.Task[None] | None = None
        try:
            self._prepare(session)
            assert session.host is not None and session.gateway is not None and self.service is not None
            server = Server(
                self.service, session.host, identity=session, connections=limits.CONNECTIONS_PER_SESSION
            )
            serving = self._tasks.create_task(server.run(), name=f"host.sock of {session.unit}")
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
        await self._systemd.start_unit(session.unit)
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
                    if session.can_take():
                        await self._offer_later(session)
        finally:
            gone.cancel()

    async def _offer_later(self, session: Session) -> None:
        try:
            await self.write(session.row, _nothing)
        except Unavailable:  # the database has logged it; the container is in good health
            self.retry_later(session, now_ms() + int(limits.STORE_AGAIN_S * 1000))

    async def _account(self, session: Session, problem: NanoclawError | None) -> None:
        """The container is gone: put back or bury what it had, so that nothing ends in silence."""
        by_person = session.stopped_by_person
        if session.turn is not None or by_person or session.left or session.worked:
            reason = (
                problem.message if problem is not None and not session.result else session.describe_end()
            )
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

        def account(tx: Transaction) -> tuple[Row, int | None] | None:
            # Asked here and not of session.turn: a write that leased one for it may be under way.
            message = tx.one("leased_message", session=session.row.id)
            if message is not None:
                if by_person:
                    tx.all("requeue_message", id=message["id"], not_before=0, reason=None)
                    tx.all("uncount_attempt", id=message["id"])
                    return None
                return message, queue.fail_message(tx, session.row, message, reason=reason, retryable=True)
            if by_person or session.left or session.worked:
                return None
            if isinstance(problem, ConfigError | NotFound | Refused):
                # A broken file or a masked unit does not get better by itself.
                return _bury_next(tx, session.row, reason)
            return queue.fail_start(tx, session.row, reason=reason)

        def write(tx: Transaction) -> tuple[tuple[Row, int | None] | None, list[Row]]:
            failed = account(tx)
            event = failed[0]["event"] if failed else None
            return failed, self._outlets.claim(tx, session.row, event)

        failed, deliveries = await self._store(write)
        session.turn = None
        self._outlets.publish(deliveries)
        if failed is not None:
            message, not_before = failed
            self._note_failure(session, message["id"], message["attempts"], reason, not_before)
            kind = "idle" if not_before is None else "retrying"
            self._outlets.report_activity(session.row, kind, reason, message["event"])
        if problem is not None or session.result not in ("", "success"):
            await self._forget_failure(session)

    async def _store(self, operation: Callable[[Transaction], T]) -> T:
        """Write what nobody else would write if we gave up: again and again while the disk is full."""
        while True:
            try:
                return await self._db.write(operation)
            except Unavailable:  # logged by the database
                await asyncio.sleep(limits.STORE_AGAIN_S)

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
        # Ours alone: the container sees it read-only.
        runtime = paths.session_runtime(agent, name)
        shutil.rmtree(runtime, ignore_errors=True)
        with suppress(OSError):  # another session of the agent lives there
            runtime.parent.rmdir()

    # --- events ------------------------------------------------------------------------------------

    def _unit_changed(self, change: UnitChange) -> None:
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

    def _take(self, session: Session, turn: Turn | None) -> None:
        """After the commit: the turn is leased, the runner gets it."""
        session.taking = False
        if turn is None:
            self._note_idle(session)
            return
        session.turn, session.idle_since = turn, None
        session.worked = True
        session.state = SessionState.WORKING
        self._start_lease(session)
        session.push(describe_turn(turn))
        self._outlets.report_activity(session.row, "thinking", event=turn.event)

    def _start_lease(self, session: Session) -> None:
        if session.lease is not None:
            session.lease.cancel()
        session.lease = asyncio.get_running_loop().call_later(
            limits.LEASE_S,
            lambda: self._tasks.create_task(self._expire(session), name=f"lease of {session.unit}"),
        )

    async def _expire(self, session: Session) -> None:
        """A runner that is silent for a whole lease hangs: take the turn from it, and stop its container."""
        turn = session.turn
        if turn is None:
            return
        journal.warning(
            "lease-expired", "stopping the container", unit=session.unit, message=turn.message, turn=turn.id
        )
        await self._stop_unit(session)

    def _stop_hard(self, session: Session, turn: Turn) -> None:
        if session.turn is not turn:
            return
        journal.warning(
            "turn-not-stopped", "stopping the container", unit=session.unit, message=turn.message
        )
        self._tasks.create_task(self._end_stopped(session, turn), name=f"stop of {session.unit}")

    def _stop_silent(self, session: Session) -> None:
        if session.stream is not None or session.turn is not None:
            return
        reason = f"its runner did not ask for work within {limits.HELLO_S:.0f} s"
        journal.warning("runner-silent", f"{reason}, stopping the container", unit=session.unit)
        hint = f"'nanoclawctl agent logs {session.row.agent}' shows more"
        self.refuse(session, Failed(reason, hint=hint))

    def _stop_straggler(self, session: Session) -> None:
        journal.warning("runner-stayed", "it said good-bye; stopping the container", unit=session.unit)
        self._tasks.create_task(self._stop_unit(session), name=f"stop of {session.unit}")

    async def _end_stopped(self, session: Session, turn: Turn) -> None:
        # NotFound: the runner has ended it meanwhile. Unavailable: logged by the database; at the end of
        # the container the turn is put back.
        with suppress(NotFound, Unavailable):
            await self.end_turn(session, turn, lambda tx: _finish_stopped(tx, session.row, turn))
        await self._stop_unit(session)

    async def _stop_unit(self, session: Session) -> None:
        try:
            await self._end_unit(session)
        except NanoclawError as exc:
            journal.warning("stop-failed", f"{exc}, waiting for systemd", unit=session.unit)

    async def _end_unit(self, session: Session) -> None:
        gone = session.gone  # of this life
        await self._systemd.stop_unit(session.unit)
        gone.set()  # of a unit that was gone already, systemd says nothing more

    def _note_failure(
        self, session: Session, message: str, attempts: int, reason: str, not_before: int | None
    ) -> None:
        if not_before is None:
            journal.error(
                "message-dead",
                reason,
                message=message,
                attempts=attempts,
                unit=session.unit,
                agent=session.row.agent,
            )
        else:
            wait_s = max(0, not_before - now_ms()) / 1000
            journal.warning(
                "message-failed",
                f"{reason}, retrying in {wait_s:.0f} s",
                message=message,
                attempts=attempts,
                unit=session.unit,
                agent=session.row.agent,
            )


def _nothing(tx: Transaction) -> None:
    """The operation of a write that only leases what is due."""


def _stop_queued(tx: Transaction, outlets: Outlets, row: SessionRow) -> tuple[list[str], list[Row]]:
    events = queue.stop_session(tx, row)
    return events, [delivery for event in events for delivery in outlets.claim(tx, row, event)]


def _finish_stopped(tx: Transaction, row: SessionRow, turn: Turn) -> None:
    queue.finish_turn(tx, row, turn, MessageState.STOPPED, [])
    queue.publish_stopped(tx, row, turn.message, turn.event)


def _bury_next(tx: Transaction, row: SessionRow, reason: str) -> tuple[Row, int | None] | None:
    message = tx.one("next_message", session=row.id)
    if message is None:
        return None
    queue.bury_message(tx, row, message, reason)
    return message, None
