"""Questions of agents to people in a chat, and what counts as an answer.

A question is a delivery, and a row of `ask` beside it. The message that answers it goes to the turn that
waits and to nobody else; it is told by its event, so that a channel may hand it over again. Everything else
that is said meanwhile is a message as ever. The row outlives router and runner: a later attempt at the turn
asks by the same key.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from nanoclawd import limits
from nanoclawd.db import Database, Row, Transaction, now_ms
from nanoclawd.errors import Refused
from nanoclawd.ids import AgentName, MessageId
from nanoclawd.leases import send
from nanoclawd.messages import Place, Saying, SessionRow, Turn

#: Reactions that mean the first and the second of two options.
_YES, _NO = ("👍", "✅", "✔"), ("👎", "❌", "✖")
_VARIATION = "\ufe0f"  #: asks for a picture of the character before it
_KEYCAP = "\u20e3"
#: Whether whoever says something may talk to an agent there.
Entitled = Callable[[AgentName], bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """What may be an answer."""

    place: Place
    event: str
    sender: str
    text: str = ""
    reaction: str = ""
    target: str | None = None  #: what it replies or reacts to: a receipt, or an event


class Asks:
    def __init__(self, db: Database) -> None:
        self._db = db
        self._waiting: dict[str, asyncio.Event] = {}  #: by the question's key: its turn's call

    def ask(
        self,
        tx: Transaction,
        session: SessionRow,
        turn: Turn,
        key: str,
        text: str,
        options: Sequence[str],
        *,
        wait_s: int,
    ) -> None:
        """Ask, unless that is done. Raises Refused."""
        if tx.one("find_ask", key=key) is not None:
            return
        channel, chat, thread = turn.place
        place = {"channel": channel, "chat": chat, "thread": thread}
        if any(row["agent"] == session.agent for row in tx.all("open_asks", now=now_ms(), **place)):
            raise Refused("another question of yours waits for its answer in this chat")
        lines = [text, *(f"{number}. {option}" for number, option in enumerate(options, start=1))]
        send(tx, session, turn, key, Saying(text="\n".join(lines), choices=options))
        tx.all("add_ask", key=key, message=turn.message, expires=now_ms() + wait_s * 1000)

    async def wait(self, key: str) -> Row:
        """Return the question's row, as soon as it is answered or has expired, or after a while as it is."""
        answered = self._waiting.setdefault(key, asyncio.Event())
        try:
            loop = asyncio.get_running_loop()
            until = loop.time() + limits.ASK_POLL_S
            while True:
                (row,) = await self._db.read("find_ask", key=key)
                left_s = min(until - loop.time(), (row["expires_at"] - now_ms()) / 1000)
                if row["answer"] is not None or left_s <= 0:
                    return row
                try:
                    async with asyncio.timeout(left_s):
                        await answered.wait()
                        answered.clear()
                except TimeoutError:
                    pass
        finally:
            self._waiting.pop(key, None)

    def take(self, tx: Transaction, said: Said, entitled: Entitled) -> tuple[MessageId, bool] | None:
        """Take what is said as an answer, if it is one.

        Returns the message whose turn has asked, and whether that was so already.
        """
        channel, chat, thread = said.place
        place = {"channel": channel, "chat": chat, "thread": thread}
        if (row := tx.one("find_answer", event=said.event, **place)) is not None:
            return MessageId(row["message"]), True
        for row in tx.all("open_asks", now=now_ms(), **place):
            card = tx.one("find_receipt", channel=channel, chat=chat, receipt=said.target)
            to_it = card is not None and card["key"] == row["key"]
            answer = _answer(said, json.loads(row["choices"] or "[]"), to_it=to_it)
            if answer is None or not entitled(row["agent"]):
                continue
            tx.all("answer_ask", key=row["key"], answer=answer, by=said.sender, event=said.event)
            tx.then(partial(self._wake, row["key"]))
            return MessageId(row["message"]), False
        return None

    def _wake(self, key: str) -> None:
        if key in self._waiting:
            self._waiting[key].set()


def _answer(said: Said, options: Sequence[str], *, to_it: bool) -> str | None:
    """Return what is answered; None if nothing is. `to_it`: it replies or reacts to the question."""
    if said.reaction:
        return _meant(said.reaction, options) if to_it else None
    if said.target is not None and not to_it:
        return None
    text = said.text.strip()
    number = text.rstrip(".)")
    if number.isdecimal() and number.isascii() and 0 < int(number[:4]) <= len(options):
        return options[int(number[:4]) - 1]
    same = [option for option in options if option.strip().casefold() == text.casefold()]
    return same[0] if same else text if to_it and text else None


def _meant(reaction: str, options: Sequence[str]) -> str | None:
    """Return the option that a reaction means: a number in a box, or yes and no if there are two."""
    plain = reaction.replace(_VARIATION, "")
    if plain.endswith(_KEYCAP) and plain[:1].isdecimal() and 0 < int(plain[0]) <= len(options):
        return options[int(plain[0]) - 1]
    if plain == "🔟" and len(options) == 10:
        return options[9]
    if len(options) == 2 and plain.startswith((*_YES, *_NO)):
        return options[0] if plain.startswith(_YES) else options[1]
    return None
