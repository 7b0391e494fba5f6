"""What becomes of a message of a chat: which agents get it, or who must be asked first. Each function is
one step of a write.

The order is fixed: the chat, then the sender, then whom it is for. Nothing of a message is stored before its
sender may talk to an agent of the chat, unless somebody is to be asked about that; then it is in the table
`held`, which no agent sees.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import StrEnum

from nanoclawd import journal, limits, people, questions, queue
from nanoclawd.access import Access, Verdict, decide_access
from nanoclawd.db import Row, Transaction, now_ms
from nanoclawd.engagement import Engagement, Heard, SessionMode, Wiring, decide_engagement
from nanoclawd.errors import Refused
from nanoclawd.ids import AgentName, MessageId
from nanoclawd.messages import Event, Place, SessionRow
from nanoclawd.questions import About, Question
from nanoclawd.states import ChatState


class Outcome(StrEnum):
    """What a channel is told."""

    QUEUED = "queued"  #: an agent gets it
    HELD = "held"  #: it waits until somebody has answered
    KEPT = "kept"  #: it is for no agent, but one hears of it with the next message that is
    DROPPED = "dropped"  #: nothing of it is stored
    ANSWERED = "answered"  #: it was for the router, which has seen to it


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """An event with all that its platform says of it."""

    event: Event
    agent: str = ""  #: the agent that is meant
    mentioned: bool = False  #: the adapter's account is meant
    program: bool = False  #: no person wrote it
    sender_name: str = ""
    direct: bool = False  #: of a chat that is not known yet
    title: str = ""


@dataclass(kw_only=True, slots=True)
class Taken:
    """What has become of it."""

    outcome: Outcome = Outcome.DROPPED
    message: MessageId | None = None  #: the first agent's
    duplicate: bool = False  #: all of this was so already
    sessions: list[SessionRow] = field(default_factory=list)  #: that have something to do now

    def add(self, message: MessageId, session: SessionRow | None) -> None:
        self.outcome = Outcome.QUEUED
        if self.message is None:
            self.message, self.duplicate = message, session is None
        if session is not None:
            self.sessions.append(session)


def take(tx: Transaction, arrival: Arrival) -> Taken:
    """Have an event go where it must. Raises Refused if too many wait already."""
    event = arrival.event
    if (known := tx.one("find_event", **event.key)) is not None:
        return Taken(outcome=Outcome.QUEUED, message=MessageId(known["id"]), duplicate=True)
    chat = find_chat(tx, event.channel, event.chat, direct=arrival.direct, title=arrival.title)
    wanted = arrival.direct or arrival.mentioned or bool(arrival.agent)
    if chat is None and wanted and not arrival.program:
        chat = add_chat(tx, event.channel, event.chat, direct=arrival.direct, title=arrival.title)
    if chat is None:
        return Taken()
    if not arrival.program:
        tx.all("set_peer", id=chat["id"], user=event.sender)
    key = {"chat": chat["id"], "thread": event.thread, "event": event.event, "revision": event.revision}
    if tx.one("find_held", **key) is not None:
        return Taken(outcome=Outcome.HELD, duplicate=True)
    match ChatState(chat["state"]):
        case ChatState.OPEN:
            return _route(tx, chat, arrival)
        case ChatState.NEW if wanted and not arrival.program:
            return _hold(tx, chat, arrival, About.CHAT)
    return _drop(tx, chat, 1)


def find_chat(tx: Transaction, channel: str, chat: str, *, direct: bool, title: str) -> Row | None:
    """Return a chat that is known, as it is called now."""
    row = tx.one("find_chat", channel=channel, chat=chat)
    kind = _kind(direct)
    if row is None or (row["kind"], row["title"]) == (kind, title):
        return row
    tx.all("describe_chat", id=row["id"], kind=kind, title=title)
    return tx.one("get_chat", id=row["id"])


def add_chat(tx: Transaction, channel: str, chat: str, *, direct: bool, title: str) -> Row | None:
    """Return a chat that is new, or None if too many are: strangers may make as many as they like."""
    place = {"channel": channel, "chat": chat, "kind": _kind(direct), "title": title}
    row = tx.one("add_chat", now=now_ms(), limit=limits.CHATS_NEW, **place)
    if row is None:
        tx.tell(journal.warning, "chat-not-taken", "too many new ones wait for an answer", channel=channel)
    else:
        tx.tell(journal.info, "chat-new", channel=channel, number=row["id"])
    return row


def _kind(direct: bool) -> str:
    return "direct" if direct else "group"


def _route(tx: Transaction, chat: Row, arrival: Arrival, again: Taken | None = None) -> Taken:
    """Decide by sender, then by what is said. `again`, to be filled: it was held; what must be so still
    stays.
    """
    event, taken = arrival.event, again or Taken()
    rows = {row["id"]: row for row in tx.all("list_wirings", chat=chat["id"])}
    standings = people.standings_of(tx, event.channel, event.sender)
    verdicts = {
        id: decide_access(standings, row["agent"], chat["id"], Access(row["access"]))
        for id, row in rows.items()
    }
    if all(verdict is Verdict.DROPPED for verdict in verdicts.values()):
        return _drop(tx, chat, 1)
    heard = Heard(
        text=event.text,
        at=now_ms(),
        direct=chat["kind"] == "direct",
        mentioned=arrival.mentioned,
        agent=arrival.agent,
        program=arrival.program,
    )
    chosen = decide_engagement(map(_wiring, rows.values()), heard, verdicts)
    given = [(wiring, mentioned) for wiring, mentioned in chosen if verdicts[wiring.id] is not Verdict.HELD]
    if given and not _may_pay(tx, chat, arrival.program, {verdicts[wiring.id] for wiring, _ in given}):
        return _drop(tx, chat, 1)
    for wiring, mentioned in given:
        row = rows[wiring.id]
        context, heard_of = _context(tx, row, event)
        conversation = conversation_of(SessionMode(row["session_mode"]), event)
        agent = AgentName(wiring.agent)
        message, session = queue.enqueue(tx, agent, event, conversation=conversation, context=context)
        taken.add(message, session)
        for seq in heard_of if session is not None else ():
            tx.all("tell_context", seq=seq)
        if mentioned and wiring.engagement is Engagement.STICKY:
            tx.all("set_sticky", id=wiring.id, until=heard.at + wiring.sticky_seconds * 1000)
    if len(given) < len(chosen) and again is not None:
        taken.outcome = Outcome.HELD
    elif len(given) < len(chosen):
        meant = next(wiring.agent for wiring, _ in chosen if verdicts[wiring.id] is Verdict.HELD)
        held = _hold(tx, chat, arrival, About.SENDER, meant)
        taken.outcome = held.outcome if taken.message is None else taken.outcome
    chosen_ids = {wiring.id for wiring, _ in chosen}
    for id, row in rows.items():
        known = verdicts[id] in (Verdict.KNOWN, Verdict.STRANGER)
        if id not in chosen_ids and known and row["keep_context"] and keep(tx, row, event):
            taken.outcome = Outcome.KEPT if taken.outcome is Outcome.DROPPED else taken.outcome
    return taken


def may_talk(tx: Transaction, channel: str, chat: str, user: str, agent: str) -> bool:
    """Say whether an account may talk to an agent in a chat at this moment."""
    place = tx.one("find_chat", channel=channel, chat=chat)
    if place is None or place["state"] != ChatState.OPEN:
        return False
    standings = people.standings_of(tx, channel, user)
    return any(
        row["agent"] == agent
        and decide_access(standings, agent, place["id"], Access(row["access"]))
        in (Verdict.KNOWN, Verdict.STRANGER)
        for row in tx.all("list_wirings", chat=place["id"])
    )


def _wiring(row: Row) -> Wiring:
    return Wiring(
        **{name: row[name] for name in ("id", "chat", "agent", "pattern", "sticky_seconds", "sticky_until")},
        engagement=Engagement(row["engagement"]),
        priority=row["priority"],
        exclusive=bool(row["exclusive"]),
    )


def conversation_of(mode: SessionMode, event: Event) -> Place:
    """Return what the session is about that gets an event."""
    match mode:
        case SessionMode.CHAT:
            return event.channel, event.chat, ""
        case SessionMode.AGENT:
            return "", "", ""
    return event.place


def _drop(tx: Transaction, chat: Row, number: int) -> Taken:
    tx.all("count_dropped", id=chat["id"], number=number)
    return Taken()


# --- how often --------------------------------------------------------------------------------------


def _may_pay(tx: Transaction, chat: Row, program: bool, verdicts: set[Verdict]) -> bool:
    """Say whether one more message may get to agents: agents must not answer each other for ever, and
    strangers not ask as often as they like.
    """
    now = now_ms()
    if program:
        until = _paid_until(chat["programs_paid_until"], now, limits.PROGRAM_PER_S, limits.PROGRAM_BURST)
        if chat["hops"] >= limits.PROGRAM_HOPS or until > now:
            tx.tell(
                journal.warning,
                "loop-stopped",
                "dropping it until a person says something",
                number=chat["id"],
            )
            return False
        tx.all("pay_program", id=chat["id"], until=until)
    elif chat["hops"]:
        tx.all("set_hops", id=chat["id"], hops=0)
    if verdicts == {Verdict.STRANGER}:
        until = _paid_until(chat["strangers_paid_until"], now, limits.STRANGER_PER_S, limits.STRANGER_BURST)
        if until > now:
            return False
        tx.all("pay_stranger", id=chat["id"], until=until)
    return True


def _paid_until(paid_until: int, now: int, per_s: float, burst: int) -> int:
    """Return until when one more is paid for (ms), as rates.py counts; behind `now`: it comes too early."""
    # Later than now only if somebody has set the clock back.
    return int(max(min(paid_until, now), now - burst * 1000 / per_s) + 1000 / per_s)


# --- held -------------------------------------------------------------------------------------------


def _hold(tx: Transaction, chat: Row, arrival: Arrival, about: About, agent: str = "") -> Taken:
    """Keep a message until somebody has answered; if many wait already it is dropped, and counted."""
    event = arrival.event
    (waiting,) = tx.all("count_held", chat=chat["id"])
    size = len(event.text.encode())
    room = limits.HELD_PER_NEW_CHAT if about is About.CHAT else limits.HELD_PER_CHAT
    if (
        waiting["in_chat"] >= room
        or waiting["bytes"] + size > limits.HELD_BYTES
        or waiting["total"] >= limits.HELD_TOTAL
    ):
        return _drop(tx, chat, 1)
    tx.all(
        "hold_message",
        chat=chat["id"],
        thread=event.thread,
        event=event.event,
        revision=event.revision,
        sender=event.sender,
        sender_name=arrival.sender_name,
        body=event.text,
        agent=arrival.agent,
        mentioned=int(arrival.mentioned),
        program=int(arrival.program),
        now=now_ms(),
    )
    tx.tell(journal.info, "message-held", number=chat["id"], channel=event.channel, size_bytes=size)
    question = Question(
        about=about,
        number=chat["id"],
        channel=event.channel,
        chat=event.chat,
        title=chat["title"],
        user=event.sender,
        name=arrival.sender_name,
        agent=agent,
        text=event.text[: limits.EXCERPT_CHARACTERS],
    )
    questions.ask(tx, question)
    return Taken(outcome=Outcome.HELD)


def reconsider(tx: Transaction) -> list[SessionRow]:
    """After an answer, be it about a chat or a person: let go what waits and need not any more, in its
    order.

    Returns the sessions that have something to do now.
    """
    sessions: dict[int, SessionRow] = {}
    full: set[int] = set()  # chats of which nothing more can be taken now
    for held in tx.all("list_held", chat=None):
        (place,) = tx.all("get_chat", id=held["chat"])
        if place["state"] == ChatState.NEW or place["id"] in full:
            continue
        taken = Taken()
        if place["state"] == ChatState.OPEN:
            try:
                arrival = _arrival(place, held)
                _route(tx, place, arrival, taken)
                if taken.sessions:
                    channel, chat, thread = arrival.event.place
                    said = {"channel": channel, "chat": chat, "thread": thread, "event": held["event"]}
                    tx.all("give_files", agent=taken.sessions[0].agent, **said)
            except Refused:  # an agent has too much to do: this waits on
                full.add(place["id"])
                taken.outcome = Outcome.HELD
        sessions |= {session.id: session for session in taken.sessions}
        if taken.outcome is not Outcome.HELD:
            tx.all("release_held", seq=held["seq"])
            tx.tell(journal.info, "message-released", number=place["id"], outcome=taken.outcome)
    questions.end_answered(tx)
    return list(sessions.values())


def _arrival(chat: Row, held: Row) -> Arrival:
    names = ("thread", "event", "revision", "sender")
    event = Event(
        channel=chat["channel"], chat=chat["chat"], text=held["body"], **{name: held[name] for name in names}
    )
    return Arrival(
        event=event, agent=held["agent"], mentioned=bool(held["mentioned"]), program=bool(held["program"])
    )


# --- context ----------------------------------------------------------------------------------------


def keep(tx: Transaction, wiring: Row, event: Event) -> bool:
    """Keep what is not for an agent until something is; the oldest goes when there is no more room."""
    size = len(event.text.encode())
    if size > limits.CONTEXT_BYTES:
        return False
    key = {name: getattr(event, name) for name in ("thread", "event", "revision", "sender")}
    tx.all("keep_context", wiring=wiring["id"], body=event.text, now=now_ms(), **key)
    room = min(wiring["keep_context"] or limits.REACTIONS_KEPT, limits.CONTEXT_MESSAGES)
    space = limits.CONTEXT_BYTES
    for row in reversed(tx.all("list_context", wiring=wiring["id"], thread=None, told=1)):
        room, space = room - 1, space - len(row["body"].encode())
        if room < 0 or space < 0:
            tx.all("remove_context", seq=row["seq"])
    return True


def _context(tx: Transaction, wiring: Row, event: Event) -> tuple[str, list[int]]:
    """Return what an agent is told of before a message, as JSON, and the numbers of these rows."""
    thread = event.thread if wiring["session_mode"] == SessionMode.THREAD else None
    rows = tx.all("list_context", wiring=wiring["id"], thread=thread, told=0)
    if not rows:
        return "", []
    told = [
        {"sender": row["sender"], "receivedAt": row["said_at"] / 1000, "text": row["body"]} for row in rows
    ]
    return json.dumps(told, separators=(",", ":")), [row["seq"] for row in rows]


# --- taken back -------------------------------------------------------------------------------------


def take_back(tx: Transaction, channel: str, chat: str, thread: str, event: str) -> bool:
    """Its sender has taken an event back: who has not seen it never will. Returns whether an agent would
    have.
    """
    row = tx.one("find_chat", channel=channel, chat=chat)
    if row is not None:
        for query in ("take_back", "take_back_context"):
            tx.all(query, chat=row["id"], thread=thread, event=event)
        questions.end_answered(tx)
    place = {"channel": channel, "chat": chat, "thread": thread}
    unseen = bool(tx.all("take_back_message", event=event, now=now_ms(), **place))
    if unseen:
        tx.all("take_back_files", event=event, **place)
    return unseen


# --- agents that listen no more ---------------------------------------------------------------------


def remove_wirings(tx: Transaction, *, chat: int | None = None, agent: str | None = None) -> bool:
    """Have agents listen no more in a chat, or anywhere; False if none did. A chat without any is new
    again.
    """
    tx.all("remove_context_of", chat=chat, agent=agent)
    removed = tx.all("remove_wirings", chat=chat, agent=agent)
    for number in {row["chat"] for row in removed}:
        if not tx.all("list_wirings", chat=number):
            tx.all("set_chat_state", id=number, state=ChatState.NEW)
    return bool(removed)


def block_chat(tx: Transaction, number: int) -> None:
    """Take nothing more from a chat; what is held there is dropped, and counted."""
    remove_wirings(tx, chat=number)
    tx.all("set_chat_state", id=number, state=ChatState.BLOCKED)
    tx.all("count_dropped", id=number, number=len(tx.all("drop_held", chat=number)))


def forget_agent(tx: Transaction, agent: str) -> None:
    """Take an agent that is removed out of all chats and roles: another one of its name inherits nothing."""
    remove_wirings(tx, agent=agent)
    tx.all("remove_roles_at", agent=agent)
    tx.all("remove_destinations", agent=agent, name=None)
