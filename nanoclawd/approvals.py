"""What waits for a person's answer, and the answers: asked once, bound to what was shown, used as allowed.

An answer is about the SHA-256 of all that was asked for, which has agent and session in it. Whatever a rule
decides is never asked, and an answer never overrides a rule: it is looked at when all of them are through.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from functools import partial
from typing import Any

from nanoclawd import asking, journal, limits
from nanoclawd.asking import Request
from nanoclawd.audit import Kind, append
from nanoclawd.db import Database, Row, Transaction, now_ms
from nanoclawd.errors import NotFound, Refused, Unavailable
from nanoclawd.ids import AgentName
from nanoclawd.messages import place_of, session_row
from nanoclawd.people import Answerer
from nanoclawd.policy import RULES, Decision, Policy, Rule, authority, decide
from nanoclawd.registry import Registry
from nanoclawd.states import ApprovalState
from nanoclawd.wire import Json

REQUEST = "request"  #: the kind of approvals that is about these
_CANDIDATES = 4  #: ids shown of those that begin alike
_PATH_CHARACTERS = 256  #: in the audit trail


class Scope(StrEnum):
    ONCE = "once"  #: for this one only
    FOR = "for"  #: for a while
    ALWAYS = "always"  #: a rule in the agent's file


class Approvals:
    """All of them, in the router's database. load() first; run() must run as a task."""

    def __init__(self, *, db: Database, registry: Registry) -> None:
        self._db = db
        self._registry = registry
        self._rules: dict[str, list[Rule]] = {}  #: answers for a while, the newest first
        self._changed = asyncio.Event()
        self.on_expiry: Callable[[], None] = lambda: None  #: policies are others now

    # --- policies ----------------------------------------------------------------------------------

    def policy(self, agent: AgentName) -> Policy:
        """Return all that decides about the agent's requests; nothing is allowed if its file is broken."""
        policy, now = self._registry.policy(agent), time.time()
        answers = (rule for rule in self._rules.get(agent, ()) if rule.until > now)
        return replace(policy, rules=(*policy.rules, *answers)) if policy.rules else policy

    def decide(self, request: Request) -> Decision:
        """Return what the policy says of a request at this moment."""
        policy = self.policy(AgentName(request.agent))
        return decide(policy.rules, request.ask, policy.unknown)

    async def load(self) -> None:
        """Read the answers that are in force."""
        self._take_over(await self._db.read("live_approvals", now=now_ms()))

    def _take_over(self, rows: list[Row]) -> None:
        self._rules = {}
        for row in rows:
            request = request_of(row)
            if request is not None and len(rules := self._rules.setdefault(row["agent"], [])) < RULES:
                deny = row["state"] == ApprovalState.DENIED
                rules.append(request.rule(deny=deny, until=row["expires_at"] / 1000))
        self._changed.set()

    # --- asking ------------------------------------------------------------------------------------

    async def ask(self, request: Request) -> tuple[str, str]:
        """Return what becomes of a request that waits at the gateway, and a message for its agent.

        That is "allowed": it was allowed once, and this has used that up; "denied": there is no room to ask;
        "pending", or "" if a rule decides by now. Raises Unavailable.
        """
        if self.decide(request).reason != "ask":
            return "", ""
        answer = await self._db.write(partial(self._ask, request=request))
        self._changed.set()
        return answer

    def _ask(self, tx: Transaction, request: Request) -> tuple[str, str]:
        now, what = now_ms(), {"agent": request.agent, "sha256": request.sha256}
        _expire(tx, now)
        if row := tx.one("use_approval", now=now, **what):
            _note(tx, Kind.REQUEST, "used", row)
            return "allowed", f"A person allowed this once (approval {row['id']})."
        if (row := tx.one("pending_approval", **what)) is None:
            counts = tx.all("count_approvals", agent=request.agent)[0]
            if counts["of_agent"] >= limits.APPROVALS_PER_AGENT or counts["total"] >= limits.APPROVALS:
                message = (
                    f"{counts['of_agent']} requests of this agent, {counts['total']} of all, wait for an"
                    " answer already: no person is asked about more."
                )
                return "denied", message
            row = self._add(tx, request, now)
        until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(row["expires_at"] / 1000))
        message = (
            f"No person has answered yet. The request stays open as approval {row['id']} until {until}: "
            f"'nanoclawctl approval show {row['id']}' shows it. Once it is allowed, ask for the same again."
        )
        return "pending", message

    def _add(self, tx: Transaction, request: Request, now: int) -> Row:
        session = tx.one("session_of", agent=request.agent, name=request.session)
        if session is None:
            raise Refused(f"agent '{request.agent}' has no session '{request.session}'")
        # A session may be of several chats: it asks for the one that it works for.
        working = tx.all("leased_messages", session=session["id"])
        channel, chat, thread = place_of(working[0]) if working else session_row(session).place
        id = "a" + secrets.token_hex(6)
        tx.all(
            "add_approval",
            id=id,
            kind=REQUEST,
            agent=request.agent,
            session=request.session,
            channel=channel,
            chat=chat,
            thread=thread,
            payload=request.canonical,
            sha256=request.sha256,
            now=now,
            expires=now + int(limits.APPROVAL_OPEN_S * 1000),
        )
        (row,) = tx.all("find_approval", id=id)
        _note(tx, Kind.REQUEST, "asked", row)
        return row

    # --- answering ---------------------------------------------------------------------------------

    async def find(self, id: str) -> Row:
        """Return the approval whose id is `id`, or begins so. Raises NotFound, Refused."""
        rows = await self._db.read("find_approvals", id=id, limit=_CANDIDATES) if id else []
        if not rows:
            raise NotFound(f"no approval {id[:80]!r}", hint="'nanoclawctl approval list --all' shows all")
        if len(rows) > 1 and rows[0]["id"] != id:
            raise Refused(f"several begin with '{id}'", hint=f"e.g. {', '.join(row['id'] for row in rows)}")
        return rows[0]

    def check(self, row: Row, sha256: str, *, allow: bool) -> Request:
        """Return what an answer to `row` is about. Raises Refused if it cannot be answered, or not so."""
        id = row["id"]
        if row["scope"] is not None:
            hint = f"'nanoclawctl approval show {id}' says more"
            raise Refused(
                f"approval {id} was answered by {row['decided_by']} already: {row['state']}", hint=hint
            )
        if row["state"] != ApprovalState.PENDING or row["expires_at"] <= now_ms():
            raise Refused(f"approval {id} has expired", hint="when the agent asks again, there is a new one")
        request = request_of(row)
        if request is None or row["sha256"] != sha256:
            hint = f"look again: 'nanoclawctl approval show {id}'"
            raise Refused(f"approval {id} is not about what you were shown: its hash differs", hint=hint)
        decision = self.decide(request)
        if allow and decision.reason != "ask":
            hint = f"'nanoclawctl policy show {row['agent']}' lists the rules"
            raise Refused(
                f"approval {id}: there is nothing to allow any more: {decision.message}", hint=hint
            )
        return request

    async def answer(
        self,
        id: str,
        sha256: str,
        *,
        allow: bool,
        scope: Scope,
        until: int,
        by: Callable[[Transaction], Answerer],
    ) -> None:
        """Store an answer that counts until `until` (ms). Raises Refused as check() does, Unavailable."""

        def operation(tx: Transaction) -> list[Row]:
            now, who = now_ms(), by(tx)
            # The rule of "always" is there already.
            rules_matter = allow and scope is not Scope.ALWAYS
            request = self.check(tx.all("find_approval", id=id)[0], sha256, allow=rules_matter)
            who.require(id, request.agent)
            state = ApprovalState.ALLOWED if allow else ApprovalState.DENIED
            (row,) = tx.all(
                "decide_approval", id=id, state=state, scope=scope, now=now, by=who.by, expires=until
            )
            _note(tx, Kind.CONTROL, state, row, scope=scope, by=who.by, until=until / 1000)
            return tx.all("live_approvals", now=now)

        self._take_over(await self._db.write(operation))
        if scope is not Scope.ONCE:
            await self.end_decided()

    async def end_decided(self) -> None:
        """Policies have changed: end the questions that rules answer by now. Raises Unavailable."""

        def operation(tx: Transaction) -> None:
            for pending in tx.all("pending_approvals"):
                request = request_of(pending)
                if request is not None and self.decide(request).reason != "ask":
                    (row,) = tx.all("expire_approval", id=pending["id"])
                    _note(tx, Kind.REQUEST, "expired", row)

        await self._db.write(operation)

    async def forget(self, agent: str) -> None:
        """End all of an agent that is removed: the next one of that name inherits nothing."""

        def operation(tx: Transaction) -> list[Row]:
            now = now_ms()
            for row in tx.all("end_approvals", agent=agent):
                _note(tx, Kind.REQUEST, "expired", row)
            tx.all("forget_denials", agent=agent, now=now)
            return tx.all("live_approvals", now=now)

        self._take_over(await self._db.write(operation))

    # --- time --------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Note what expires, until cancelled. Nothing depends on it: whoever looks, looks at the time."""
        while True:
            self._changed.clear()
            try:
                (next_one,) = await self._db.read("next_expiry", now=now_ms())
                if next_one["at"] is None:
                    await self._changed.wait()
                    continue
                # The clock may be set meanwhile: not longer than a minute without a look at it.
                async with asyncio.timeout(min(60.0, max(0.05, next_one["at"] / 1000 - time.time()))):
                    await self._changed.wait()
                    continue
            except TimeoutError:
                pass
            try:
                await self._expire()
            except Unavailable as exc:
                journal.warning("approvals-not-expired", f"{exc}, retrying in {limits.STORE_AGAIN_S:.0f} s")
                await asyncio.sleep(limits.STORE_AGAIN_S)

    async def _expire(self) -> None:
        def operation(tx: Transaction) -> list[Row]:
            now = now_ms()
            _expire(tx, now)
            return tx.all("live_approvals", now=now)

        self._take_over(await self._db.write(operation))
        self.on_expiry()


def request_of(row: Row) -> Request | None:
    """Return what the row is about; None if somebody wrote it anew, so that this cannot be known."""
    if asking.hash_of(row["payload"]) != row["sha256"]:
        return None
    try:
        return asking.parse(row["payload"])
    except (ValueError, TypeError, KeyError):
        return None


def _expire(tx: Transaction, now: int) -> None:
    for row in tx.all("expire_approvals", now=now):
        _note(tx, Kind.REQUEST, "expired", row)


def _note(tx: Transaction, kind: Kind, event: str, row: Row, **more: Any) -> None:
    """Tell the journal, and the audit trail."""
    tx.tell(journal.info, f"approval-{event}", approval=row["id"], agent=row["agent"], **more)
    detail: Json = {"approval": row["id"], "sha256": row["sha256"], "session": row["session"], **more}
    if (request := request_of(row)) is not None:
        detail |= {"method": request.method, "host": authority(request.host, request.port)}
        detail |= {"path": request.path[:_PATH_CHARACTERS]}
    append(tx, kind, f"approval_{event}", detail, agent=row["agent"])
