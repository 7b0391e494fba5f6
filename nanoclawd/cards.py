"""Cards: approvals shown in chats, to people who may answer them, and what became of each.

They follow what is in the database, after each commit that changes an approval and after each start: so none
is missing, and none comes twice, whatever dies in between.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass

from nanoclawd import limits, outbox, people, questions
from nanoclawd.approvals import request_of
from nanoclawd.db import Database, Row, Transaction
from nanoclawd.errors import Unavailable
from nanoclawd.guard import held_of
from nanoclawd.ids import TERMINAL, AgentName
from nanoclawd.leases import say
from nanoclawd.messages import DeliveryKind, Place, Saying, place_of
from nanoclawd.outbox import Delivery
from nanoclawd.outlets import Outlets
from nanoclawd.people import Answerer
from nanoclawd.privileges import TABLE
from nanoclawd.questions import About, question_of
from nanoclawd.rates import Rate
from nanoclawd.states import ApprovalState

#: Reactions that answer a card; one may carry a variation selector or a skin tone.
ALLOWS, DENIES = ("✅", "👍", "✔"), ("❌", "👎", "✖")
CHOICES = ("✅", "❌")
NOBODY = AgentName("")  #: the router
_CHARACTERS = 4000  #: of what is shown of an approval; what is longer cannot be allowed in a chat
_SHOWN_HASH = 16  #: digits


@dataclass(frozen=True, slots=True)
class Shown:
    """An approval in words."""

    head: str  #: one line without any of the payload
    line: str  #: one line that says what is wanted
    payload: str  #: all that there is to it


class Cards:
    """run() must run as a task."""

    def __init__(self, db: Database, outlets: Outlets) -> None:
        self._db = db
        self._outlets = outlets
        self._rates: dict[str, Rate] = {}  #: of what is shown, by agent or channel
        self._changed = asyncio.Event()
        db.on_approval = self._changed.set

    async def run(self) -> None:
        """Have chats follow what approvals there are, until cancelled."""
        while True:
            self._changed.clear()
            try:
                self._outlets.publish(await self._db.write(self._follow))
            except Unavailable:  # logged by the database
                await asyncio.sleep(limits.STORE_AGAIN_S)
                continue
            await self._changed.wait()

    def _follow(self, tx: Transaction) -> list[Delivery]:
        for row in tx.all("unshown_approvals"):
            tx.all("set_shown", id=row["id"])
            if (shown := describe(tx, row)) is not None and self._may_show(row):
                self._announce(tx, row, shown)
        for card in tx.all("stale_cards"):
            tx.all("set_told", key=card["key"], state=card["state"])
            (row,) = tx.all("find_approval", id=card["approval"])
            _update(tx, card, row)
        return self._outlets.claim(tx)

    def _may_show(self, row: Row) -> bool:
        """Agents and strangers decide how often they ask: no chat gets more of it than a person reads."""
        who = row["agent"] if row["kind"] not in set(About) else f"#{row['channel']}"
        rate = self._rates.setdefault(who, Rate(limits.ASK_NOTICES_PER_S, limits.ASK_NOTICES_BURST))
        if rate.take():
            rate.take(-1)
            return False
        return True

    def _announce(self, tx: Transaction, row: Row, shown: Shown) -> None:
        """Show it in the chats of those who may answer; where it comes from only that it waits."""
        places = {place_of(row)} if row["channel"] == TERMINAL else set()
        for chat in tx.all("direct_chats"):
            standings = people.standings_of_person(tx, chat["person"])
            if may_answer(tx, row, Answerer(person=chat["person"], by="", here=False, standings=standings)):
                places.add((chat["channel"], chat["chat"], ""))
        for place in sorted(places):
            show(tx, row, shown, place)
        origin = place_of(row)
        if row["kind"] in set(About) or any(place[:2] == origin[:2] for place in places):
            return
        text = f"{shown.head} It waits for somebody who may answer it, as approval {row['id']}."
        outbox.notify(tx, f"{row['id']}.ask", origin, text)


def show(tx: Transaction, row: Row, shown: Shown, place: Place) -> None:
    """Publish a card in a chat; the same one again changes nothing."""
    channel, chat, thread = place
    whole = len(shown.payload) <= _CHARACTERS
    id, until = row["id"], time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(row["expires_at"] / 1000))
    text = f"{shown.line}\n\n{_marked(shown.payload[:_CHARACTERS])}\n\n"
    text += f"Approval {id}, SHA-256 {row['sha256'][:_SHOWN_HASH]}…, open until {until}. "
    if row["needed"] > 1:
        text += f"{row['needed']} people have to allow it. "
    if whole:
        text += f"Allow: ✅ or '/approve {id}'. Deny: ❌ or '/deny {id}'."
    else:
        text += (
            f"This is not all of it: 'nanoclawctl approval show {id}' shows it. Deny: ❌ or '/deny {id}'."
        )
    number = len(tx.all("find_cards", approval=id))
    key = f"{id}.card{number}"
    tx.all(
        "add_card",
        key=key,
        approval=id,
        channel=channel,
        chat=chat,
        thread=thread,
        sha256=row["sha256"],
        whole=int(whole),
    )
    say(tx, NOBODY, None, key, Saying(kind=DeliveryKind.NOTICE, text=text, choices=CHOICES), place=place)


def _update(tx: Transaction, card: Row, row: Row) -> None:
    """Have a card say what has become of it, in place of asking."""
    shown = describe(tx, row)
    text = f"{shown.head} {outcome_of(row)}" if shown is not None else outcome_of(row)
    edit = Saying(kind=DeliveryKind.EDIT, text=text, target_key=card["key"])
    say(tx, NOBODY, None, f"{card['key']}.{row['state']}", edit, place=place_of(card))


def may_answer(tx: Transaction, row: Row, answerer: Answerer) -> bool:
    """Return whether somebody may answer an approval."""
    if (question := question_of(row)) is not None:
        return all(map(answerer.may_answer, questions.concerned(tx, question)))
    held = held_of(row)
    return answerer.may_answer(row["agent"] if held is None else held.answered_by_admins_of)


def describe(tx: Transaction, row: Row) -> Shown | None:
    """Return an approval in words; None if somebody wrote it anew."""
    agent = row["agent"]
    if (question := question_of(row)) is not None:
        name, title = f" (calls itself '{question.name}')", f"chat {question.number} ('{question.title}')"
        who = f"{question.user}{name if question.name else ''} on {question.channel}"
        if question.about is About.SENDER:
            asked = f"may they talk to the agents of {title}? Always, if you allow it"
        else:
            asked = f"shall an agent listen in {title}, if there is only one, or is it blocked?"
        return Shown(
            "Somebody who is not known has written.", _line(f"{who} has written: {asked}"), question.text
        )
    if (held := held_of(row)) is not None:
        what = TABLE[held.action].what
        payload = json.dumps(held.payload, ensure_ascii=False, indent=1, sort_keys=True)
        head = f"'{agent}' wants to {what}."
        return Shown(head, f"'{agent}' wants to {what} ({held.action}), for {_where(row)}:", payload)
    if (request := request_of(row)) is not None:
        lines = [f"{request.method} {request.url}", *(f"{name}: {value}" for name, value in request.headers)]
        if request.body:
            lines += ["", request.body_bytes.decode(errors="backslashreplace")]
        line = f"'{agent}' asks for this once, for {_where(row)}:"
        return Shown(f"'{agent}' wants to reach something.", line, "\n".join(lines))
    return None


def outcome_of(row: Row) -> str:
    """Say in one line what has become of an approval."""
    id, by, outcome = row["id"], row["decided_by"], row["outcome"]
    match ApprovalState(row["state"]):
        case ApprovalState.PENDING:
            return f"Approval {id} waits for an answer."
        case ApprovalState.ALLOWED:
            return f"Approval {id}: allowed by {by}."
        case ApprovalState.DENIED:
            return f"Approval {id}: denied by {by}."
        case ApprovalState.USED:
            return f"Approval {id}: allowed by {by}, and done{f': {_line(outcome)}' if outcome else '.'}"
        case ApprovalState.EXPIRED:
            return f"Approval {id} is over: {_line(outcome) or 'there is nothing to answer any more'}."


def _where(row: Row) -> str:
    return f"'{_line(row['chat'])}' on {row['channel']}" if row["channel"] else "all its chats"


def _line(text: str) -> str:
    return " ".join(_visible(text).split())


def _visible(text: str) -> str:
    """Return the text with all that shows nothing, or moves what is around it, as numbers."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"<U+{ord(c):04X}>" for c in text)


def _marked(text: str) -> str:
    """Return somebody's text so that no line of it looks like ours: as Markdown has code."""
    return "\n".join(f"    {line}" for line in _visible(text).split("\n"))
