"""The turn of a live session: leased in the commit that found it, renewed, ended, failed or taken away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from nanoclawd import journal, limits, queue
from nanoclawd.db import Database, Row, Transaction, now_ms
from nanoclawd.errors import NotFound, Unavailable
from nanoclawd.outlets import Outlets
from nanoclawd.queue import MessageState, SessionRow, Turn
from nanoclawd.session import Session, SessionState, describe_turn

T = TypeVar("T")


class Turns:
    """The turns of all live sessions. Which these are, and their containers, is the business of Sessions."""

    def __init__(
        self,
        *,
        db: Database,
        outlets: Outlets,
        tasks: asyncio.TaskGroup,
        find: Callable[[SessionRow], Session | None],
        stop: Callable[[Session], None],
        make_room: Callable[[], None],
    ) -> None:
        self._db = db
        self._outlets = outlets
        self._tasks = tasks
        self._find = find  #: the live session of a row
        self._stop = stop  #: stops a session's container, soon
        self._make_room = make_room  #: called when a runner has nothing to do

    # --- leased ------------------------------------------------------------------------------------

    async def write(self, row: SessionRow | None, operation: Callable[[Transaction], T]) -> T:
        """Run a write that may give the session `row` something to do, and lease that to its runner at once.

        One commit for both: a message that finds its runner waiting is on disk and on its way together.
        """
        taker: Session | None = None

        def write(tx: Transaction) -> tuple[T, Turn | None]:
            nonlocal taker
            result = operation(tx)
            session = self._find(row) if row is not None else None
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

    async def resume(self, session: Session) -> None:
        """The runner asks for work: it gets the turn that it has, or the next."""
        if session.turn is not None:
            session.push(describe_turn(session.turn))
        else:
            await self.offer(session)

    async def offer(self, session: Session) -> None:
        """Lease the runner the next message that is due, if it can take one."""
        if session.can_take():
            await self.write(session.row, _nothing)

    async def offer_due(self, session: Session) -> None:
        """The same for a session that nobody waits for: if the database cannot write now, later."""
        try:
            await self.offer(session)
        except Unavailable:  # the database has logged it; the container is in good health
            self._retry_later(session, now_ms() + int(limits.STORE_AGAIN_S * 1000))

    def _take(self, session: Session, turn: Turn | None) -> None:
        """After the commit: the turn is leased, the runner gets it."""
        session.taking = False
        if turn is None:
            self._note_idle(session)
            return
        session.turn, session.idle_since = turn, None
        session.worked = True
        session.state = SessionState.WORKING
        self.start_lease(session)
        session.push(describe_turn(turn))
        self._outlets.report_activity(session.row, "thinking", event=turn.event)

    def _note_idle(self, session: Session) -> None:
        if session.idle_since is None:
            session.idle_since = asyncio.get_running_loop().time()
        self._make_room()

    # --- renewed -----------------------------------------------------------------------------------

    def start_lease(self, session: Session) -> None:
        """From now on the runner has a whole lease to say that it still works on its turn."""
        if session.lease is not None:
            session.lease.cancel()
        session.lease = asyncio.get_running_loop().call_later(limits.LEASE_S, self._expire, session)

    async def renew(self, session: Session, turn: Turn) -> bool:
        """The runner still works on `turn`. Returns whether it has its lease, now a full one."""
        if not await self._db.write(lambda tx: queue.renew_lease(tx, session.row, turn.id)):
            return False
        if session.turn is turn:
            self.start_lease(session)
        return True

    def _expire(self, session: Session) -> None:
        """A runner that is silent for a whole lease hangs: take the turn from it, and stop its container."""
        turn = session.turn
        if turn is None:
            return
        journal.warning(
            "lease-expired", "stopping the container", unit=session.unit, message=turn.message, turn=turn.id
        )
        self._stop(session)

    # --- ended -------------------------------------------------------------------------------------

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
            self._retry_later(session, not_before)

    def _retry_later(self, session: Session, not_before: int) -> None:
        """Offer the session's runner its message again when that is due."""
        if session.retry is not None:
            session.retry.cancel()
        wait_s = max(0.0, (not_before - now_ms()) / 1000)
        session.retry = asyncio.get_running_loop().call_later(wait_s, session.wanted.set)

    async def put_back(self, session: Session, reason: str, *, stopped: bool, final: bool) -> None:
        """The session's container is gone: put back or bury what it had, so that nothing ends in silence.

        If a person `stopped` it, that is no attempt at the message. Otherwise a container that took nothing
        and was not sent away counts as one at the oldest: its last if `final`, as the next would end alike.
        """

        def account(tx: Transaction) -> tuple[Row, int | None] | None:
            # Asked here and not of session.turn: a write that leased one for it may be under way.
            message = tx.one("leased_message", session=session.row.id)
            if message is not None:
                if stopped:
                    tx.all("requeue_message", id=message["id"], not_before=0, reason=None)
                    tx.all("uncount_attempt", id=message["id"])
                    return None
                return message, queue.fail_message(tx, session.row, message, reason=reason, retryable=True)
            if stopped or session.left or session.worked:
                return None
            if final:
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

    async def _store(self, operation: Callable[[Transaction], T]) -> T:
        """Write what nobody else would write if we gave up: again and again while the disk is full."""
        while True:
            try:
                return await self._db.write(operation)
            except Unavailable:  # logged by the database
                await asyncio.sleep(limits.STORE_AGAIN_S)

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

    # --- stopped -----------------------------------------------------------------------------------

    async def stop_turn(self, row: SessionRow) -> bool:
        """The person says stop: end what the session does and what waits for it. Returns whether there was
        any.
        """
        session = self._find(row)
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

    def _stop_hard(self, session: Session, turn: Turn) -> None:
        if session.turn is not turn:
            return
        journal.warning(
            "turn-not-stopped", "stopping the container", unit=session.unit, message=turn.message
        )
        self._tasks.create_task(self._end_stopped(session, turn), name=f"stop of {session.unit}")

    async def _end_stopped(self, session: Session, turn: Turn) -> None:
        # NotFound: the runner has ended it meanwhile. Unavailable: logged by the database; at the end of
        # the container the turn is put back.
        with suppress(NotFound, Unavailable):
            await self.end_turn(session, turn, lambda tx: _finish_stopped(tx, session.row, turn))
        self._stop(session)


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
