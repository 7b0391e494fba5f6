"""What happened in a conversation, as people, adapters and runners saw it: what the check goes by."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from tests.crash.script import Message, Plan


class Fault(StrEnum):
    """What must never be; the columns of the table."""

    LOST = "lost"
    REPEATED = "repeated"
    ORDER = "out of order"
    ORPHAN = "orphans"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Shown:
    """One delivery that the person saw: its key had not come before."""

    key: str
    chat: str
    kind: str
    text: str
    events: frozenset[str]  #: what it answers

    @property
    def is_end(self) -> bool:
        """Whether it tells the person that no reply will come."""
        return self.kind == "notice" and not self.text.startswith("Still waiting")


@dataclass(slots=True)
class Record:
    plan: Plan
    #: Message ids by marker, in order; None if it was held.
    acknowledged: dict[str, str | None] = field(default_factory=dict)
    shown: dict[str, Shown] = field(default_factory=dict)  #: by key, in order
    refused: dict[str, Shown] = field(default_factory=dict)  #: what the platform will never take
    reported: set[str] = field(default_factory=set)  #: keys whose report the router has acknowledged
    begun: set[str] = field(default_factory=set)  #: markers of messages that a runner has had
    sent: set[str] = field(default_factory=set)  #: texts that runners sent in mid-turn and the router took
    finished: set[str] = field(
        default_factory=set
    )  #: markers of what was answered, and the router took that
    unsure: set[str] = field(
        default_factory=set
    )  #: the same, but the container was ended before it heard whether the router took it
    told_to_stop: set[str] = field(
        default_factory=set
    )  #: markers; the person said stop, and the router took it
    faults: list[tuple[Fault, str]] = field(default_factory=list)  #: what was seen to be wrong at once
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def messages(self) -> dict[str, Message]:
        return {message.marker: message for chat in self.plan.chats for message in chat.messages}

    def fault(self, kind: Fault, text: str) -> None:
        self.faults.append((kind, text))

    def note(self) -> None:
        """Let who waits in until() look again."""
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def has_ended(self, marker: str) -> bool:
        """Return whether the person has seen all there is to see of a message, and the router knows that."""
        told = [shown for shown in self.seen_or_refused() if shown.key in self.reported]
        if any(shown.is_end and marker in shown.events for shown in told):
            return True
        replies = self.messages[marker].replies()
        return {*replies} <= {shown.text for shown in told} if replies else marker in self.finished

    def seen_or_refused(self) -> list[Shown]:
        return [*self.shown.values(), *self.refused.values()]

    def all_ended(self) -> bool:
        return all(map(self.has_ended, self.messages))
