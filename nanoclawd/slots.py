"""Slots: how many sessions may have a container at once, and who is next.

A free slot goes to the session whose oldest message is the oldest of all; only an agent that has its share
already stands back for those that have less.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from nanoclawd.ids import AgentName


@dataclass(eq=False, slots=True)
class Claim:
    """One session's slot, or its wish for one."""

    agent: AgentName
    seq: int  #: of the session's oldest message; counts up over all sessions
    granted: asyncio.Event = field(default_factory=asyncio.Event)


class Slots:
    """Nothing here waits, and nothing takes longer than looking once at all who wait."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._held: list[Claim] = []  #: more than `count` if more were adopted
        self._waiting: list[Claim] = []
        self._line: dict[Claim, int] | None = None  #: who waits, by how many come before; None: not known

    @property
    def wanted(self) -> int:
        """How many must leave so that all who wait get a slot."""
        return max(0, len(self._held) + len(self._waiting) - self._count) if self._waiting else 0

    def ask(self, agent: AgentName, seq: int) -> Claim:
        """Return a claim that is granted when its turn comes, perhaps at once."""
        claim = Claim(agent, seq)
        self._waiting.append(claim)
        self._grant()
        return claim

    def hold(self, agent: AgentName) -> Claim:
        """Return a slot for a session that has its container already."""
        claim = Claim(agent, 0)
        claim.granted.set()
        self._held.append(claim)
        self._line = None
        return claim

    def give_back(self, claim: Claim) -> None:
        """End a claim, granted or not."""
        (self._held if claim.granted.is_set() else self._waiting).remove(claim)
        self._grant()

    def resize(self, count: int) -> None:
        self._count = count
        self._grant()

    def before(self, claim: Claim) -> int:
        """Return how many come before one that waits, as things are."""
        if self._line is None:
            line = sorted(self._waiting, key=self._rank(self._holdings()))
            self._line = {other: place for place, other in enumerate(line)}
        return self._line[claim]

    def is_due_to_another(self, claim: Claim, seq: int, *, leaving: int) -> bool:
        """Return whether who has a slot, and `seq` as the next message, must leave it to one that waits.

        leaving: how many leave already.
        """
        held = self._holdings()
        held[claim.agent] -= 1
        rank = self._rank(held)
        mine = rank(Claim(claim.agent, seq))
        free = leaving - max(0, len(self._held) - self._count)
        return sum(rank(other) < mine for other in self._waiting) > free

    def _holdings(self) -> Counter[AgentName]:
        return Counter(claim.agent for claim in self._held)

    def _rank(self, held: Counter[AgentName]) -> Callable[[Claim], tuple[bool, int]]:
        """Return the order of those that wait: the smallest is next."""
        agents = {claim.agent for claim in (*self._held, *self._waiting)}
        # Rounded down: what is left over goes to the oldest, and cannot leave the last agent without any.
        share = max(1, self._count // max(1, len(agents)))
        return lambda claim: (held[claim.agent] >= share, claim.seq)

    def _grant(self) -> None:
        self._line = None
        while self._waiting and len(self._held) < self._count:
            claim = min(self._waiting, key=self._rank(self._holdings()))
            self._waiting.remove(claim)
            self._held.append(claim)
            claim.granted.set()
