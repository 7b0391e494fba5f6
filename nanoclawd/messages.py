"""Messages, events, turns and what an agent says: their types, and how rows become them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from nanoclawd import journal, limits
from nanoclawd.db import Row, Transaction, now_ms
from nanoclawd.errors import Refused
from nanoclawd.ids import AgentName, MessageId, SessionName, TurnId, unit_name


class DeliveryKind(StrEnum):
    REPLY = "reply"
    MESSAGE = "message"
    NOTICE = "notice"
    EDIT = "edit"  #: these three have a target
    REACTION = "reaction"
    REDACTION = "redaction"


_EVENT_KEY = ("channel", "chat", "thread", "event", "revision")


#: channel, chat, thread
Place = tuple[str, str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionRow:
    """One session, as the database has it. What it is about has "" for what is all the same to it."""

    id: int
    agent: AgentName
    name: SessionName
    channel: str
    chat: str
    thread: str

    @property
    def place(self) -> Place:
        return self.channel, self.chat, self.thread


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """What a channel delivers; the first five fields are its idempotency key."""

    channel: str
    chat: str
    thread: str
    event: str
    revision: int
    sender: str
    text: str

    @property
    def key(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _EVENT_KEY}

    @property
    def place(self) -> Place:
        return self.channel, self.chat, self.thread


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One message of a turn."""

    id: MessageId
    place: Place  #: where it was said
    event: str
    sender: str  #: "": the router
    text: str
    received_at: int  #: ms
    context: str  #: what was said before it, as JSON, or ""
    command: str  #: "compact": the agent is to do that; "": it is a message
    hops: int = 0  #: agents that it has come through since a person said something
    files: Sequence[Row] = ()  #: that came with it

    @property
    def is_event(self) -> bool:
        """Whether the platform knows it: not what the router or another agent says."""
        return bool(self.sender) and not self.hops


@dataclass(kw_only=True, slots=True)
class Turn:
    """Messages of one session that were leased together, with what earlier attempts at them sent already."""

    id: TurnId
    first: TurnId  #: of the first attempt: all attempts that are shared have the same
    attempt: int  #: tries of its first message that count, this one included
    messages: list[Message]  #: oldest first; grows by those that join
    already_sent: Sequence[tuple[str, str]] = ()  #: key of the delivery, text
    stopping: bool = False  #: the person has said stop

    @property
    def message(self) -> MessageId:
        """The oldest message, which names the turn in the journal and in keys."""
        return self.messages[0].id

    @property
    def place(self) -> Place:
        """Where all of it was said: what is said in one chat is never answered in another."""
        return self.messages[0].place

    @property
    def hops(self) -> int:
        """How many agents it has come through since a person said something."""
        return max(message.hops for message in self.messages)

    def full_key(self, key: str) -> str:
        """Return the key of a delivery that the runner calls `key`: the same in each attempt."""
        known = [sent for sent, _ in self.already_sent if sent.partition("/")[2] == key]
        return known[0] if known else f"{self.message}/{key}"

    @property
    def events(self) -> list[str]:
        return [message.event for message in self.messages if message.is_event]

    def behind(self, last: str) -> list[Message]:
        """Return the messages behind the one with that id. Raises Refused."""
        ids = [message.id for message in self.messages]
        if last not in ids:
            raise Refused("last: the turn has no such message")
        return self.messages[ids.index(MessageId(last)) + 1 :]


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """What became of messages whose turn, or whose container, failed."""

    messages: list[Row]
    not_before: int | None  #: when the first of them is tried again (ms); None: they are dead

    @property
    def events(self) -> list[str]:
        return [row["event"] for row in self.messages if is_event(row)]

    @property
    def place(self) -> Place:
        return place_of(self.messages[0])


def place_of(row: Row) -> Place:
    return row["channel"], row["chat"], row["thread"]


def is_event(row: Row) -> bool:
    """Whether the platform knows a message, as Message.is_event says."""
    return bool(row["sender"]) and not row["hops"]


def session_row(row: Row) -> SessionRow:
    return SessionRow(**{field.name: row[field.name] for field in fields(SessionRow)})


def message_of(tx: Transaction, row: Row) -> Message:
    return Message(
        id=MessageId(row["id"]),
        place=place_of(row),
        event=row["event"],
        sender=row["sender"],
        text=row["body"],
        received_at=row["received_at"],
        context=row["context"],
        command=row["command"],
        hops=row["hops"],
        files=tx.all("files_of_event", **{name: row[name] for name in _EVENT_KEY}),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Saying:
    """What an agent sends in mid-turn."""

    kind: DeliveryKind = DeliveryKind.MESSAGE
    text: str
    place: Place | None = None  #: None: where its turn is
    target_key: str | None = None  #: the delivery that it is about
    target_event: str | None = None  #: the event that it is about
    choices: Sequence[str] = ()


def one_line(reason: str) -> str:
    """Return what a person sees of a reason: one line, neither a stack nor a body."""
    line = " ".join(reason.split())
    return line if len(line) <= limits.REASON_CHARACTERS else f"{line[: limits.REASON_CHARACTERS - 1]}…"


def tell(
    tx: Transaction,
    event: str,
    session: SessionRow,
    message: str,
    turn: str | None,
    text: str = "",
    level: Callable[..., None] = journal.info,
    **fields: Any,
) -> None:
    """Tell the journal of a message: with its id, these lines are its story."""
    unit = unit_name(session.agent, session.name)
    tx.tell(level, event, text, message=message, turn=turn, agent=session.agent, unit=unit, **fields)


def notify(
    tx: Transaction,
    session: SessionRow,
    message: Message,
    turn: Turn | None,
    text: str,
    *,
    name: str = "notice",
    life: int = 0,
) -> None:
    # A dead letter that an operator put back may die again, and that is to be told, too.
    key = f"{message.id}.{name}{life or ''}"
    publish(tx, session, message, key, DeliveryKind.NOTICE, text, None if turn is None else turn.id)


def publish(
    tx: Transaction,
    session: SessionRow,
    message: Message,
    key: str,
    kind: DeliveryKind,
    text: str,
    turn: TurnId | None,
) -> None:
    """Queue something for the chat: about a whole turn, or about `message` alone."""
    channel, chat, thread = message.place
    tx.all(
        "publish",
        key=key,
        message=message.id,
        turn=turn,
        agent=session.agent,
        channel=channel,
        chat=chat,
        thread=thread,
        kind=kind,
        body=text,
        in_reply_to=message.event if message.is_event else None,
        now=now_ms(),
    )
    tx.places.append(message.place)
