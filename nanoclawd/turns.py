"""The turn of a live session: leased in the commit that found it, renewed, ended, failed or taken away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from nanoclawd import journal, leases, limits, messages, queue
from nanoclawd.db import Database, Transaction, now_ms
from nanoclawd.errors import NotFound, Unavailable
from nanoclawd.leases import Treatment
from nanoclawd.messages import Failure, Message, Place, SessionRow, Turn
from nanoclawd.outbox import Delivery
from nanoclawd.outlets import Outlets
from nanoclawd.session import Session, SessionState, describe_turn
from nanoclawd.states import MessageState

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
        stop: Callable[[Session, str], None],
        make_room: Callable[[], None],
        must_leave: Callable[[Transaction, Session], bool],
        attempts: Callable[[], int],
    ) -> None:
        self._db = db
        self._outlets = outlets
        self._tasks = tasks
        self._find = find  #: the live session of a row
        self._stop = stop  #: stops a session's container, soon; and says why
        self._make_room = make_room  #: called when a runner has nothing to do
        self._must_leave = must_leave  #: whether a runner may not have the next turn; make_room() sees to it
        self._attempts = attempts  #: how many a message gets

    # --- leased ------------------------------------------------------------------------------------

    async def write(self, operation: Callable[[Transaction], T], of: Callable[[T], SessionRow | None]) -> T:
        """Run a write that may give a session something to do, and lease that to its runner at once.

        `of` says which, by the write's result. One commit for both: a message that finds its runner waiting
        is on disk and on its way together.
        """
        taker: Session | None = None
        passed = False  #: the runner did not get what is due, since others wait for its slot
        due_at: int | None = None  #: when it may get what is not due yet (ms)

        def write(tx: Transaction) -> tuple[T, Turn | None]:
            nonlocal taker, passed, due_at
            result = operation(tx)
            row = of(result)
            session = self._find(row) if row is not None else None
            if session is None or not session.can_take():
                return result, None
            session.taking, taker = True, session
            if passed := self._must_leave(tx, session):
                return result, None
            turn = leases.claim_turn(tx, session.row, attempts=self._attempts())
            due_at = None if turn else leases.next_due(tx, session.row)
            return result, turn

        try:
            result, turn = await self._db.write(write)
        except BaseException:
            if taker is not None:
                taker.taking = False
            raise
        if taker is not None:
            self._take(taker, turn)
            if passed:  # and looks again, should another have left in its place
                taker.wanted.set()
            elif due_at is not None:  # also if a timer was set for it: that knows nothing of the wall clock
                self._retry_later(taker, due_at)
        return result

    async def resume(self, session: Session) -> None:
        """The runner asks for work: it gets the turn that it has, or the next."""
        if session.turn is not None:
            session.push(describe_turn(session.turn))
            if session.turn.stopping:
                self._tell_to_stop(session, session.turn)
        else:
            await self.offer(session)

    async def offer(self, session: Session) -> None:
        """Lease the runner the next message that is due, if it can take one."""
        if session.can_take():
            await self.write(_nothing, lambda _: session.row)

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
        self._outlets.report_activity(session.row.agent, turn.place, "thinking", events=turn.events)

    def _note_idle(self, session: Session) -> None:
        if session.idle_since is None:
            session.idle_since = asyncio.get_running_loop().time()
        self._make_room()

    async def join(self, session: Session, turn: Turn, last: str) -> list[Message]:
        """Lease to `turn` what has arrived since it began, and return what is behind its message `last`.

        Raises Refused.
        """

        def join(tx: Transaction) -> list[Message]:
            return leases.join_turn(tx, session.row, turn) if session.turn is turn else []

        if not await self._db.read("behind_turn", session=session.row.id, limit=1):
            return turn.behind(last)
        turn.messages += await self._db.write(join)
        return turn.behind(last)

    # --- renewed -----------------------------------------------------------------------------------

    def start_lease(self, session: Session) -> None:
        """From now on the runner has a whole lease to say that it still works on its turn."""
        if session.lease is not None:
            session.lease.cancel()
        session.lease = asyncio.get_running_loop().call_later(limits.LEASE_S, self._expire, session)

    async def renew(self, session: Session, turn: Turn) -> bool:
        """The runner still works on `turn`. Returns whether it has its lease, now a full one."""
        if not await self._db.write(lambda tx: leases.renew_lease(tx, session.row, turn.id)):
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
        self._stop(session, f"its runner was silent for {limits.LEASE_S:.0f} s")

    # --- ended -------------------------------------------------------------------------------------

    async def end_turn(self, session: Session, turn: Turn, operation: Callable[[Transaction], T]) -> T:
        """Run the write that ends `turn`, publish what it sent, and give the runner what is next."""
        ended = False

        def write(tx: Transaction) -> tuple[T, list[Delivery]]:
            nonlocal ended
            if session.turn is not turn:  # another call was faster
                raise NotFound(f"turn {turn.id} is over")
            result = operation(tx)
            # Ended as far as this transaction goes, so that the next turn can be leased in it.
            ended, session.turn = True, None
            session.state = SessionState.READY if session.state is SessionState.WORKING else session.state
            return result, self._outlets.claim(tx)

        try:
            result, deliveries = await self.write(write, lambda _: session.row)
        except BaseException:
            if ended:
                session.turn, session.state = turn, SessionState.WORKING
            raise
        if session.stopping is not None:
            session.stopping.cancel()
            session.stopping = None
        self._outlets.publish(deliveries)
        if session.turn is None:
            if session.lease is not None:
                session.lease.cancel()
                session.lease = None
            self._note_idle(session)
        return result

    async def finish_turn(
        self,
        session: Session,
        turn: Turn,
        *,
        stopped: bool,
        replies: Sequence[str] = (),
        answers: Sequence[str] = (),
        last: str | None = None,
    ) -> None:
        """End a turn as answered, or as stopped: see leases.finish_turn(). Raises NotFound, Refused."""
        state = MessageState.STOPPED if stopped else MessageState.ANSWERED
        await self.end_turn(
            session,
            turn,
            lambda tx: leases.finish_turn(tx, session.row, turn, state, replies, answers, last),
        )
        self._outlets.report_activity(session.row.agent, turn.place, "idle", events=turn.events)

    async def fail_turn(
        self, session: Session, turn: Turn, *, reason: str, how: Treatment, retry_after_ms: int = 0
    ) -> None:
        """End a turn that failed: a later attempt, or dead letters with a notice. Raises NotFound."""
        if turn.stopping:
            return await self.finish_turn(session, turn, stopped=True)

        def fail(tx: Transaction) -> Failure:
            failure = leases.fail_turn(
                tx,
                session.row,
                reason=reason,
                how=how,
                attempts=self._attempts(),
                retry_after_ms=retry_after_ms,
            )
            if failure is None or failure.messages[0]["turn"] != turn.id:
                raise NotFound(f"turn {turn.id} has no lease any more")
            return failure

        failure = await self.end_turn(session, turn, fail)
        self._note_failure(session, failure, reason)
        if failure.not_before is not None:
            self._retry_later(session, failure.not_before)

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

        def account(tx: Transaction) -> Failure | None:
            if stopped:
                leases.put_back(tx, session.row)
                return None
            # Asked here and not of session.turn: a write that leased one for it may be under way.
            failure = leases.fail_turn(
                tx, session.row, reason=reason, how=Treatment.RETRY, attempts=self._attempts()
            )
            if failure is not None or session.left or session.worked:
                return failure
            return leases.fail_start(tx, session.row, reason=reason, final=final, attempts=self._attempts())

        def write(tx: Transaction) -> tuple[Failure | None, list[Delivery]]:
            return account(tx), self._outlets.claim(tx)

        failure, deliveries = await self._store(write)
        session.turn = None
        self._outlets.publish(deliveries)
        if failure is not None:
            self._note_failure(session, failure, reason)

    async def _store(self, operation: Callable[[Transaction], T]) -> T:
        """Write what nobody else would write if we gave up: again and again while the disk is full."""
        while True:
            try:
                return await self._db.write(operation)
            except Unavailable:  # logged by the database
                await asyncio.sleep(limits.STORE_AGAIN_S)

    def _note_failure(self, session: Session, failure: Failure, reason: str) -> None:
        dead = failure.not_before is None
        kind, text = ("idle", "") if dead else ("retrying", messages.one_line(reason))
        self._outlets.report_activity(session.row.agent, failure.place, kind, text, failure.events)

    # --- stopped -----------------------------------------------------------------------------------

    async def stop_turn(self, row: SessionRow, place: Place) -> bool:
        """The person says stop in a chat: end what the session does there, and what waits for it. Returns
        whether there was any.
        """
        session = self._find(row)
        (events, running), deliveries = await self._db.write(lambda tx: _stop(tx, self._outlets, row, place))
        self._outlets.publish(deliveries)
        self._outlets.report_activity(row.agent, place, "idle", events=events)
        if running and session is not None and session.turn is not None:
            session.turn.stopping = True
            self._tell_to_stop(session, session.turn)
        return running or bool(events)

    def _tell_to_stop(self, session: Session, turn: Turn) -> None:
        session.push({"turn": None, "stop": turn.id})
        if session.stopping is None:
            loop = asyncio.get_running_loop()
            session.stopping = loop.call_later(limits.STOP_TURN_S, self._stop_hard, session, turn)

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
            await self.finish_turn(session, turn, stopped=True)
        self._stop(session, "its runner did not stop its turn")


def _nothing(tx: Transaction) -> None:
    """The operation of a write that only leases what is due."""


def _stop(
    tx: Transaction, outlets: Outlets, row: SessionRow, place: Place
) -> tuple[tuple[list[str], bool], list[Delivery]]:
    return queue.stop_session(tx, row, place), outlets.claim(tx)
