"""One request of an agent: who decided about it, what has passed so far, and what the journal is told."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nanoclawd.gateway.headers import too_large
from nanoclawd.policy import Ask, Decision, Way, authority

HUNG_UP = 499  #: a status for our records only: the agent went before its answer was complete
if TYPE_CHECKING:
    from nanoclawd.gateway.ledger import Use

PATH_CHARACTERS = 256  #: of a path in the audit trail


@dataclass(slots=True)
class Exchange:
    """Grows while the request is served. Never holds content."""

    method: str = "-"
    target: str = "-"
    started: float = field(default_factory=time.monotonic)
    ask: Ask | None = None  #: None: it could not be understood
    decision: Decision | None = None
    status: int = 0
    reason: str | None = None  #: why it did not end well
    up_bytes: int = 0  #: from the agent
    down_bytes: int = 0  #: to the agent
    is_head_sent: bool = False
    credential: str = ""  #: name of the one that was lent to it
    use: Use | None = None  #: of a call of a model: what it has cost, once that is known
    is_news: bool = True  #: False: the same was refused before, and nothing has changed

    @property
    def is_tunnel(self) -> bool:
        return self.ask is not None and self.ask.way is Way.TUNNEL

    @property
    def is_held(self) -> bool:
        """Whether it waits for a person's answer, or waited in vain."""
        return self.decision is not None and self.decision.reason == "ask"

    def count(self, up: int, down: int) -> None:
        """Count bytes that are about to pass. Raises Denied if they are more than the rule allows."""
        assert self.decision is not None and self.decision.rule is not None
        rule = self.decision.rule
        self.up_bytes += up
        self.down_bytes += down
        if self.up_bytes > rule.max_up_bytes:
            raise too_large(rule.max_up_bytes)
        if self.down_bytes > rule.max_down_bytes:
            raise too_large(rule.max_down_bytes)

    def expect(self, down: int) -> None:
        """Raise Denied if an answer of that length would be more than the rule allows."""
        assert self.decision is not None and self.decision.rule is not None
        if down > self.decision.rule.max_down_bytes:
            raise too_large(self.decision.rule.max_down_bytes)

    def record(self) -> dict[str, Any]:
        """Return what the audit trail gets of it, as io.nanoclaw.Gateway has it: no query."""
        ask, decision = self.ask, self.decision
        refused = self.reason is not None and not self.is_head_sent and 400 <= self.status < HUNG_UP
        refused = refused or self.is_held
        return {
            "event": "denied" if refused else "allowed",
            "rule": decision.number if decision else 0,
            "reason": self.reason or "",
            "method": self.method,
            "route": ask.route if ask else "",
            "host": authority(ask.host, ask.port) if ask and ask.host else "",
            "path": ask.path[:PATH_CHARACTERS] if ask else "",
            "status": self.status,
            "credential": self.credential,
            "upBytes": self.up_bytes,
            "downBytes": self.down_bytes,
        }

    def is_allowed_by(self, now: Decision) -> bool:
        """Say whether what was begun might go on if it had been decided like this."""
        was = self.decision.rule if self.decision else None
        if self.is_held:  # it is decided anew, and told what came of that
            return True
        if now.reason == "ask":  # what a person allowed once needs no rule
            return self.decision is not None and self.decision.reason == "approved"
        if not now.allowed or now.rule is None or was is None:
            return False
        return now.rule.addresses == was.addresses  # else it may be connected to what was named only then

    def describe(self) -> dict[str, Any]:
        """Return the fields of its line in the journal: no query, and of other people's hosts no path."""
        ask, decision = self.ask, self.decision
        is_route = ask is not None and ask.way is Way.ROUTE
        return {
            "way": ask.way if ask else None,
            "route": (ask.route or None) if ask else None,
            "host": authority(ask.host, ask.port) if ask and ask.host else None,
            "method": self.method,
            "path": self.target.partition("?")[0][:128] if is_route else None,
            "rule": decision.number if decision else None,
            "status": self.status,
            "reason": self.reason,
            "up_bytes": self.up_bytes,
            "down_bytes": self.down_bytes,
            "took_ms": round((time.monotonic() - self.started) * 1000),
            **(self.use.describe() if self.use else {}),
        }
