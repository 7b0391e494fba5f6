"""Answers to approvals of all kinds, and what they do: from a control socket, or from a chat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nanoclawd import guard, limits, policy
from nanoclawd.approvals import Approvals, Scope
from nanoclawd.asking import Request
from nanoclawd.audit import Audit
from nanoclawd.db import Database, Row, Transaction, now_ms
from nanoclawd.errors import NanoclawError, Refused, Unavailable
from nanoclawd.gateway_link import GatewayLink
from nanoclawd.guard import Guard
from nanoclawd.hold_link import HoldLink
from nanoclawd.people import Answerer
from nanoclawd.people_control import PeopleControl
from nanoclawd.policy import Rule
from nanoclawd.questions import About
from nanoclawd.registry import Registry
from nanoclawd.states import ApprovalState
from nanoclawd.wire import Json


@dataclass(eq=False, kw_only=True)
class Answers:
    db: Database
    registry: Registry
    approvals: Approvals
    guard: Guard
    holds: HoldLink
    gateway: GatewayLink
    audit: Audit
    people: PeopleControl

    async def answer(
        self,
        row: Row,
        sha256: str,
        *,
        allow: bool,
        scope: Scope,
        seconds: int | None = None,
        by: Callable[[Transaction], Answerer],
    ) -> tuple[Row, bool, Rule | None]:
        """Answer what was shown under the hash, if who does it may, by the write in which it counts.

        Returns the approval as it is then, whether what waited goes on, and the rule that was written.
        Raises Refused, Unavailable.
        """
        id, rule = row["id"], None
        if row["kind"] in set(About):
            if scope is not Scope.ALWAYS:
                raise Refused("an answer about a sender or a chat is for always", hint="say --always")
            await self.people.answer(row, sha256, allow=allow, by=by)
            sent = allow
        elif row["kind"] == guard.KIND:
            if scope is not Scope.ONCE:
                raise Refused("an answer about an action is for this once", hint="say --once, or nothing")
            row = await self.guard.answer(id, sha256, allow=allow, by=by)
            sent = row["state"] == ApprovalState.USED
        else:
            request = self.approvals.check(row, sha256, allow=allow)
            if scope is Scope.ALWAYS:
                rule = await self._add_rule(request, deny=not allow)
            until = _until(allow, scope, seconds)
            await self.approvals.answer(id, sha256, allow=allow, scope=scope, until=until, by=by)
            sent = await self._carry_out(request, allow=allow, scope=scope)
        (row,) = await self.db.read("find_approval", id=id)
        return row, sent, rule

    async def _add_rule(self, request: Request, *, deny: bool) -> Rule:
        """Write the answer into the agent's file, after all rules that are there: it overrides none."""
        rule = request.rule(deny=deny)
        detail: Json = {"rule": policy.to_json(rule)}
        await self.audit.note("AddRule", detail, agent=request.agent)
        try:
            await self.registry.add_rule(request.agent, rule, last=True)
        except NanoclawError as exc:  # e.g. the path is one that no file can have
            await self.audit.note("AddRule", {**detail, "failed": exc.code}, agent=request.agent)
            raise
        return rule

    async def _carry_out(self, request: Request, *, allow: bool, scope: Scope) -> bool:
        """Have the gateway do what was answered; return whether it has let the request go."""
        if scope is Scope.ONCE:
            if allow:
                return await self.holds.ask(request.sha256)
            await self.holds.deny(request.sha256, "A person denied this.")
            return False
        waits = self.holds.waits(request.sha256)
        try:
            await self.gateway.refresh()
        except Unavailable as exc:
            hint = "the answer is stored, and the gateway gets it as soon as it can"
            raise Unavailable(exc.message, hint=hint) from None
        return allow and waits


def _until(allow: bool, scope: Scope, seconds: int | None) -> int:
    """Return until when an answer counts (ms). Raises Refused."""
    if (scope is Scope.FOR) != (seconds is not None):
        raise Refused("seconds: must be there for the scope 'for', and for no other", hint="e.g. 3600")
    if seconds is not None and not 1 <= seconds <= limits.APPROVAL_MAX_S:
        raise Refused(
            f"seconds: must be from 1 to {limits.APPROVAL_MAX_S}", hint="or make it a rule: --always"
        )
    if scope is Scope.ONCE:
        seconds = int(limits.APPROVAL_ONCE_S) if allow else 0
    return now_ms() + (seconds or 0) * 1000
