"""Questions to a person about who may talk to an agent, and which agent a new chat is for: approvals of
their own kinds. Each function is one step of a write.

A question is asked once, when the first message of a sender or a chat is held, and shows that message. What
is held goes on by what people and chats are then, be it by an answer or by a command that says the same.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass
from enum import StrEnum

from nanoclawd import journal, limits
from nanoclawd.asking import hash_of
from nanoclawd.audit import Kind, append
from nanoclawd.db import Row, Transaction, now_ms
from nanoclawd.errors import Refused
from nanoclawd.people import Answerer
from nanoclawd.states import ApprovalState
from nanoclawd.wire import Json


class About(StrEnum):
    """Kinds of approvals; there are others."""

    SENDER = "sender"  #: may this account talk to the agents of a chat?
    CHAT = "chat"  #: shall an agent listen in this chat?


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """All that is asked and shown; its hash is what an answer is about."""

    about: About
    number: int  #: of the chat
    channel: str
    chat: str
    title: str  #: as the platform shows it: whoever is in there chose it
    user: str  #: the account that wrote
    name: str  #: what that calls itself
    agent: str  #: that it wrote to; "" in a new chat
    text: str  #: beginning of its message

    @property
    def canonical(self) -> str:
        return json.dumps({"kind": self.about, **asdict(self)}, sort_keys=True, separators=(",", ":"))


def ask(tx: Transaction, question: Question) -> None:
    """Ask, unless that is done already, or as much is asked as a person will read."""
    place = {"channel": question.channel, "chat": question.chat}
    user = question.user if question.about is About.SENDER else None
    if tx.one("find_question", kind=question.about, user=user, **place) is not None:
        return
    if tx.all("count_questions")[0]["questions"] >= limits.QUESTIONS:
        return  # the chat is listed all the same
    id, now = "a" + secrets.token_hex(6), now_ms()
    tx.all(
        "add_approval",
        id=id,
        kind=question.about,
        agent=question.agent,
        session="",
        thread="",
        payload=question.canonical,
        sha256=hash_of(question.canonical),
        now=now,
        expires=now + int(limits.APPROVAL_OPEN_S * 1000),
        **place,
    )
    tx.tell(journal.info, "approval-asked", approval=id, kind=question.about, number=question.number)


def question_of(row: Row) -> Question | None:
    """Return what an approval of these kinds asks; None if somebody wrote it anew."""
    if hash_of(row["payload"]) != row["sha256"]:
        return None
    try:
        values: Json = json.loads(row["payload"])
        del values["kind"]
        return Question(**{**values, "about": About(values["about"])})
    except (ValueError, TypeError, KeyError):
        return None


def check(row: Row, sha256: str) -> Question:
    """Return what an answer to `row` is about. Raises Refused if it cannot be answered, or not so."""
    question, id = question_of(row), row["id"]
    if row["state"] != ApprovalState.PENDING or row["expires_at"] <= now_ms():
        hint = f"'nanoclawctl approval show {id}' says more"
        raise Refused(f"approval {id} waits for no answer any more: it is {row['state']}", hint=hint)
    if question is None or row["sha256"] != sha256:
        hint = f"look again: 'nanoclawctl approval show {id}'"
        raise Refused(f"approval {id} is not about what you were shown: its hash differs", hint=hint)
    return question


def answer(tx: Transaction, row: Row, sha256: str, *, allow: bool, by: Answerer) -> Question:
    """Note the answer to a question, in the write that does what it says. Raises Refused as check() does, or
    if it is not for them to say.
    """
    question = check(tx.all("find_approval", id=row["id"])[0], sha256)
    for agent in concerned(tx, question):
        by.require(row["id"], agent)
    state = ApprovalState.ALLOWED if allow else ApprovalState.DENIED
    now = now_ms()
    tx.all("decide_approval", id=row["id"], state=state, scope="always", now=now, by=by.by, expires=now)
    detail = {
        "approval": row["id"],
        "sha256": sha256,
        "by": by.by,
        "chat": question.number,
        "user": question.user,
    }
    append(tx, Kind.CONTROL, f"approval_{state}", detail, agent=question.agent)
    tx.tell(journal.info, f"approval-{state}", approval=row["id"], number=question.number)
    return question


def concerned(tx: Transaction, question: Question) -> list[str]:
    """Return the agents to whose admins an answer matters; "": only owners and admins of all may give it."""
    if question.about is About.CHAT:
        return [""]
    return [wiring["agent"] for wiring in tx.all("list_wirings", chat=question.number)] or [""]


def end_answered(tx: Transaction) -> None:
    """End questions of which nothing waits any more: what a person has said elsewhere is an answer, too."""
    tx.all("end_questions")
