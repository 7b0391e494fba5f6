"""The one place where an agent's privileged actions pass: allowed, denied, or held until people allow them.

What is held is an approval with all of the action, and is carried out by the router once enough of those who
may have allowed it: whoever carries it out looks at everything again. An action has its effect in the
transaction in which its approval is used up, so that it has it once, whatever dies in between.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from nanoclawd import journal, limits, people
from nanoclawd.access import may_answer
from nanoclawd.asking import hash_of
from nanoclawd.audit import Kind, append
from nanoclawd.db import Database, Row, Transaction, now_ms
from nanoclawd.errors import NanoclawError, Refused, Unavailable
from nanoclawd.ids import AgentName, SessionName
from nanoclawd.messages import Place, SessionRow, place_of, session_row
from nanoclawd.outbox import Delivery
from nanoclawd.outlets import Outlets
from nanoclawd.people import Answerer
from nanoclawd.privileges import TABLE, Action, Say
from nanoclawd.queue import tell_agent
from nanoclawd.rates import Rate
from nanoclawd.registry import Registry
from nanoclawd.states import ApprovalState
from nanoclawd.wire import Json

KIND = "action"  #: of approvals
PAYLOAD_CHARACTERS = 64 << 10  #: of an action as JSON: more than that nobody reads


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """An action of an agent; its hash is what an answer is about."""

    action: Action
    agent: AgentName
    session: SessionName
    place: Place  #: the chat for which the agent worked when it asked
    payload: Json  #: all that there is to it

    @property
    def canonical(self) -> str:
        """The one spelling as JSON."""
        what = {"agent": self.agent, "session": self.session, "place": self.place, "payload": self.payload}
        return _encode({"kind": KIND, "action": self.action, **what})

    @property
    def answered_by_admins_of(self) -> str:
        """The agent whose admins may answer; "": only who is so everywhere."""
        return "" if TABLE[self.action].everywhere else self.agent


@dataclass(frozen=True, kw_only=True, slots=True)
class Ruling:
    """What becomes of an action, and how the agent is told."""

    say: Say
    approval: str = ""  #: if it is held
    message: str = ""  #: unless it is allowed


@dataclass(frozen=True, kw_only=True, slots=True)
class Handler:
    """How actions of one kind are carried out. Both raise NanoclawError if they cannot be any more;
    Unavailable: they are tried again.
    """

    #: Its rows, in the transaction that uses the approval up; returns what came of it, in one line.
    carry_out: Callable[[Transaction, Held], str]
    #: What has to be there before, and is no row; it may come twice.
    prepare: Callable[[Held], Awaitable[None]] | None = None


class Guard:
    """run() must run as a task. Who can carry out actions puts Handlers into `handlers`."""

    def __init__(
        self, *, db: Database, registry: Registry, outlets: Outlets, wake: Callable[[SessionRow], None]
    ) -> None:
        self._db = db
        self._registry = registry
        self._outlets = outlets
        self._wake = wake
        self._denials: dict[str, Rate] = {}  #: that are noted, by agent
        self._carrying = asyncio.Lock()  #: nothing is begun twice
        self._changed = asyncio.Event()
        self.handlers: dict[Action, Handler] = {}

    # --- asking ------------------------------------------------------------------------------------

    def check(
        self,
        tx: Transaction,
        action: Action,
        *,
        session: SessionRow,
        place: Place,
        call: str,
        payload: Json,
    ) -> Ruling:
        """Return what becomes of an action of a session's agent, asked for by what is said at `place`.

        `call` names the agent's call: the same again, by a later attempt too, is the same action. Two calls
        with the same payload, while nobody has answered, are one action, too.
        """
        say = self._registry.privileges(session.agent).say(action)
        # What was held before is so, whatever the table says by now: it may have been done already.
        key = {"agent": session.agent, "session": session.name, "call": call}
        if (row := tx.one("find_action", **key)) is not None:
            return _ruling(row)
        held = Held(action=action, agent=session.agent, session=session.name, place=place, payload=payload)
        if say is Say.HOLD:
            return self._hold(tx, held, call)
        if say is Say.DENY:
            self._note_denial(tx, held)
            message = f"This agent may not {TABLE[action].what}: [guard] denies '{action}'."
            return Ruling(say=say, message=message)
        if TABLE[action].default is not Say.ALLOW:
            _audit(tx, Kind.REQUEST, "guard_allow", held)
        return Ruling(say=say)

    def _hold(self, tx: Transaction, held: Held, call: str) -> Ruling:
        canonical, now = held.canonical, now_ms()
        if len(canonical) > PAYLOAD_CHARACTERS:
            raise Refused(f"this is too large for anybody to be asked about: {len(canonical)} characters")
        what = {"agent": held.agent, "sha256": hash_of(canonical)}
        if (row := tx.one("pending_approval", **what)) is not None:
            return _ruling(row)
        if (row := tx.one("denied_action", now=now, **what)) is not None:
            return _ruling(row)
        counts = tx.all("count_approvals", agent=held.agent)[0]
        if counts["of_agent"] >= limits.APPROVALS_PER_AGENT or counts["total"] >= limits.APPROVALS:
            message = f"{counts['of_agent']} actions and requests of this agent, {counts['total']} of all, "
            return Ruling(say=Say.DENY, message=message + "wait for an answer: no person is asked more.")
        channel, chat, thread = held.place
        (row,) = tx.all(
            "add_action",
            id="a" + secrets.token_hex(6),
            session=held.session,
            channel=channel,
            chat=chat,
            thread=thread,
            payload=canonical,
            call=call,
            needed=self._registry.privileges(held.agent).needed,
            now=now,
            expires=now + int(limits.APPROVAL_OPEN_S * 1000),
            **what,
        )
        _note(tx, Kind.REQUEST, "asked", row)
        tx.then(self._changed.set)
        return _ruling(row)

    def _note_denial(self, tx: Transaction, held: Held) -> None:
        """The agent decides how often it is denied something: as much is noted as a person will read."""
        rate = self._denials.setdefault(held.agent, Rate(limits.ASK_NOTICES_PER_S, limits.ASK_NOTICES_BURST))
        if rate.take():
            rate.take(-1)
            return
        _audit(tx, Kind.REQUEST, "guard_deny", held)

    # --- answering ---------------------------------------------------------------------------------

    async def answer(
        self, id: str, sha256: str, *, allow: bool, by: Callable[[Transaction], Answerer]
    ) -> Row:
        """Store an answer; with the last that is needed, carry the action out, if that can be done at once.

        Returns the row as it is then. Raises Refused, Unavailable.
        """
        row, deliveries = await self._db.write(
            lambda tx: (self.vote(tx, id, sha256, allow=allow, by=by(tx)), self._outlets.claim(tx))
        )
        self._outlets.publish(deliveries)
        await self.settle(row)
        (row,) = await self._db.read("find_approval", id=id)
        return row

    def vote(self, tx: Transaction, id: str, sha256: str, *, allow: bool, by: Answerer) -> Row:
        """The write of answer(), after which settle() has to be called. Raises Refused."""
        row, now = tx.all("find_approval", id=id)[0], now_ms()
        hint = f"'nanoclawctl approval show {id}' says more"
        if row["state"] != ApprovalState.PENDING or row["expires_at"] <= now:
            state = f"{row['state']} by {row['decided_by']}" if row["decided_by"] else "over"
            raise Refused(f"approval {id} waits for no answer any more: it is {state}", hint=hint)
        held = held_of(row)
        if held is None or row["sha256"] != sha256:
            raise Refused(f"approval {id} is not about what you were shown: its hash differs", hint=hint)
        by.require(id, held.answered_by_admins_of)
        if not allow:
            return self._decide(tx, row, ApprovalState.DENIED, by.by, now + int(limits.DENIAL_S * 1000))
        if not tx.all("vote", approval=id, person=by.person, place="here" if by.here else "chat", now=now):
            raise Refused(f"you have allowed approval {id} already", hint="somebody else has to, as well")
        voters = self._voters(tx, row, held)
        if len(voters) < row["needed"]:
            _note(tx, Kind.CONTROL, "voted", row, by=by.by)
            tx.then(self._changed.set)
            return row
        until = now + int(limits.APPROVAL_ONCE_S * 1000)
        return self._decide(tx, row, ApprovalState.ALLOWED, by.by, until)

    async def settle(self, row: Row) -> None:
        """After a vote: have it take effect."""
        if row["state"] == ApprovalState.ALLOWED:
            await self._carry_out(row["id"])

    def _decide(self, tx: Transaction, row: Row, state: ApprovalState, by: str, until: int) -> Row:
        (row,) = tx.all(
            "decide_approval", id=row["id"], state=state, scope="once", now=now_ms(), by=by, expires=until
        )
        _note(tx, Kind.CONTROL, state, row, by=by)
        if state is ApprovalState.DENIED:
            self._tell_agent(tx, row, f"was denied by {by}: do not try again")
        tx.then(self._changed.set)
        return row

    def _voters(self, tx: Transaction, row: Row, held: Held) -> list[str]:
        """Return the names of those who have allowed it, and may do so at this moment."""
        return [
            vote["name"]
            for vote in tx.all("votes", approval=row["id"])
            if vote["place"] == "here"
            or may_answer(people.standings_of_person(tx, vote["person"]), held.answered_by_admins_of)
        ]

    # --- carrying out ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Carry out what was allowed before a restart, or could not be done at once, and note what expires,
        until cancelled.
        """
        while True:
            self._changed.clear()
            again_s: float | None = None
            try:
                for row in await self._db.read("open_actions"):
                    again_s = await self._see_to(row, again_s)
            except Unavailable:  # logged by the database
                again_s = limits.STORE_AGAIN_S
            with suppress(TimeoutError):
                async with asyncio.timeout(again_s):
                    await self._changed.wait()

    async def _see_to(self, row: Row, again_s: float | None) -> float:
        """Do what is to be done about one that is open; returns in how many seconds to look again."""
        left_s: float = row["expires_at"] / 1000 - time.time()
        allowed = row["state"] == ApprovalState.ALLOWED
        if left_s <= 0:
            await self._end(row["id"], "this took too long" if allowed else "nobody has answered in time")
        elif allowed:
            await self._carry_out(row["id"])
            left_s = limits.STORE_AGAIN_S
        # The clock may be set meanwhile.
        return max(0.05, min(left_s, 60.0 if again_s is None else again_s))

    async def _carry_out(self, id: str) -> None:
        """Do what was allowed, unless that is done. What cannot be done now stays as it is: run() tries it
        again until its time is over.
        """
        async with self._carrying:
            try:
                held = await self._db.write(lambda tx: self._recheck(tx, id)[1])
                handler = self.handlers[held.action]
                if handler.prepare is not None:
                    await handler.prepare(held)
                deliveries = await self._db.write(partial(self._use, id=id, handler=handler))
            except Unavailable as exc:
                journal.warning("action-not-done", f"{exc}, trying again", approval=id)
                return
            except _NothingToDo:
                return
            except NanoclawError as exc:
                await self._end(id, str(exc))
                return
        self._outlets.publish(deliveries)

    def _recheck(self, tx: Transaction, id: str) -> tuple[Row, Held]:
        """Return what is allowed at this moment, too. Raises Refused, NotFound."""
        row = tx.all("find_approval", id=id)[0]
        if row["state"] != ApprovalState.ALLOWED or row["expires_at"] <= now_ms():
            raise _NothingToDo
        held = held_of(row)
        if held is None:
            raise Refused("somebody has changed what was asked for")
        if self._registry.get(held.agent).problem is not None:
            raise Refused(f"agent '{held.agent}' cannot run any more")
        if self._registry.privileges(held.agent).say(held.action) is Say.DENY:
            raise Refused(f"[guard] denies '{held.action}' by now")
        if len(self._voters(tx, row, held)) < row["needed"]:
            raise Refused("who allowed it may not do so any more")
        return row, held

    def _use(self, tx: Transaction, id: str, handler: Handler) -> list[Delivery]:
        """Use the approval up: this and what it was for are one transaction."""
        row, held = self._recheck(tx, id)
        done = handler.carry_out(tx, held)
        (row,) = tx.all("end_action", id=id, state=ApprovalState.USED, outcome=done)
        _note(tx, Kind.REQUEST, "used", row)
        self._tell_agent(tx, row, f"was allowed and done: {done}")
        return self._outlets.claim(tx)

    async def _end(self, id: str, reason: str) -> None:
        """Have it be over, undone. Raises Unavailable."""

        def end(tx: Transaction) -> list[Delivery]:
            row = tx.all("find_approval", id=id)[0]
            if row["state"] not in (ApprovalState.PENDING, ApprovalState.ALLOWED):
                return []
            said = "was allowed, but cannot be done" if row["state"] == ApprovalState.ALLOWED else "is over"
            (row,) = tx.all("end_action", id=id, state=ApprovalState.EXPIRED, outcome=reason)
            _note(tx, Kind.REQUEST, "expired", row, reason=reason)
            self._tell_agent(tx, row, f"{said}: {reason}")
            return self._outlets.claim(tx)

        self._outlets.publish(await self._db.write(end))

    # --- telling -----------------------------------------------------------------------------------

    def _tell_agent(self, tx: Transaction, row: Row, text: str) -> None:
        """Tell the agent what became of what it asked for."""
        found = tx.one("session_of", agent=row["agent"], name=row["session"])
        if found is None:
            return
        held, session, id = held_of(row), session_row(found), row["id"]
        what = f" ({held.action})" if held is not None else ""
        tell_agent(tx, session, place_of(row), f"{id}.{row['state']}", f"Approval {id}{what} {text}.")
        tx.then(partial(self._wake, session))


class _NothingToDo(Exception):
    """It was done already, or its time is over."""


def held_of(row: Row) -> Held | None:
    """Return what an approval of this kind is about; None if somebody wrote it anew."""
    if row["kind"] != KIND or hash_of(row["payload"]) != row["sha256"]:
        return None
    try:
        values: Json = json.loads(row["payload"])
        del values["kind"]
        channel, chat, thread = values["place"]
        return Held(**{**values, "action": Action(values["action"]), "place": (channel, chat, thread)})
    except (ValueError, TypeError, KeyError):
        return None


def _ruling(row: Row) -> Ruling:
    id, state = row["id"], ApprovalState(row["state"])
    match state:
        case ApprovalState.PENDING | ApprovalState.ALLOWED:
            message = f"This waits for a person's answer, as approval {id}. You are told what becomes of it."
        case ApprovalState.DENIED:
            return Ruling(say=Say.DENY, approval=id, message=f"A person has denied this (approval {id}).")
        case ApprovalState.USED:
            message = f"A person has allowed this, and it is done (approval {id}): {row['outcome']}"
        case _:
            message = f"This was not done (approval {id}): {row['outcome']}"
            return Ruling(say=Say.DENY, approval=id, message=message)
    return Ruling(say=Say.HOLD, approval=id, message=message)


def _note(tx: Transaction, kind: Kind, event: str, row: Row, **more: Any) -> None:
    """Tell the journal, and the audit trail."""
    tx.tell(journal.info, f"approval-{event}", approval=row["id"], agent=row["agent"], **more)
    held = held_of(row)
    detail: Json = {"approval": row["id"], "sha256": row["sha256"], "session": row["session"], **more}
    if held is not None:
        detail["action"] = held.action
    append(tx, kind, f"approval_{event}", detail, agent=row["agent"])


def _audit(tx: Transaction, kind: Kind, event: str, held: Held) -> None:
    detail = {"action": held.action, "session": held.session, "sha256": hash_of(held.canonical)}
    append(tx, kind, event, detail, agent=held.agent)


def _encode(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
