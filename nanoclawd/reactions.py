"""What people react with: answers to questions and to approvals; else the agent hears of it later."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from nanoclawd import limits
from nanoclawd.asks import Asks, Said
from nanoclawd.db import Database, Transaction
from nanoclawd.messages import Event
from nanoclawd.routing import Outcome, keep, may_talk

if TYPE_CHECKING:  # it needs, by way of answers about people, who needs us
    from nanoclawd.chat_control import ChatControl


@dataclass(frozen=True, kw_only=True, slots=True)
class Reactions:
    db: Database
    asks: Asks

    async def take(
        self, event: Event, target: str, *, removed: bool, chat_control: ChatControl
    ) -> tuple[Outcome, bool]:
        """Take a person's reaction to `target`, its text being the reaction, or that it was taken back.

        Returns what becomes of it, and whether it was so already. Raises Unavailable.
        """
        about = {"channel": event.channel, "chat": event.chat}
        if not await self.db.read("find_receipt", receipt=target, **about):
            return Outcome.DROPPED, False  # it is about nothing that we have sent
        if not removed:
            if (
                answered := await self.db.write(partial(self._answer, event=event, target=target))
            ) is not None:
                return Outcome.ANSWERED, answered[1]
            if await chat_control.react(event, target) is Outcome.ANSWERED:
                return Outcome.ANSWERED, False
        return await self.db.write(partial(_keep, event=event, target=target, removed=removed))

    def _answer(self, tx: Transaction, event: Event, target: str) -> tuple[str, bool] | None:
        said = Said(
            place=event.place, event=event.event, sender=event.sender, reaction=event.text, target=target
        )
        return self.asks.take(tx, said, partial(may_talk, tx, event.channel, event.chat, event.sender))


def _keep(tx: Transaction, event: Event, target: str, removed: bool) -> tuple[Outcome, bool]:
    """Have an agent hear, with its next message, what somebody thinks of something that it said."""
    sent = tx.one("find_receipt", channel=event.channel, chat=event.chat, receipt=target)
    chat = tx.one("find_chat", channel=event.channel, chat=event.chat)
    if sent is None or chat is None:
        return Outcome.DROPPED, False
    if removed:
        tx.all("take_back_context", chat=chat["id"], thread=event.thread, event=event.event)
        return Outcome.DROPPED, False
    if not may_talk(tx, event.channel, event.chat, event.sender, sent["agent"]):
        return Outcome.DROPPED, False
    (wiring,) = (row for row in tx.all("list_wirings", chat=chat["id"]) if row["agent"] == sent["agent"])
    known = tx.all("list_context", wiring=wiring["id"], thread=event.thread, told=1)
    said = " ".join(sent["body"].split())[: limits.EXCERPT_CHARACTERS]
    keep(tx, wiring, replace(event, text=f"[reacts with {event.text} to what you said: {said}]"))
    return Outcome.KEPT, any(row["event"] == event.event for row in known)
