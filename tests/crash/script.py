"""A scripted conversation: what is said in which chat, what agents are to do with it, when the router dies.

All follows from two numbers: a seed, and the conversation's own. A message's text is its marker, which no
other message has, and the runner's orders:

    c1-3 say 2      reply twice            c1-3 fail 2     fail twice, retryable, then reply
    c1-3 quiet      no reply               c1-3 crash 1    end the container in mid-turn once, then reply
    c1-3 die        fail for ever          c1-3 poison     fail each time
    c1-3 busy 2     the same, as a model that is overloaded does
    c1-3 send 2     send twice in mid-turn, then reply
    c1-3 gate c1-5  reply once the router has taken c1-5, which so arrives in mid-turn
    c1-3 stop       wait until it is stopped
    c1-3 file       comes with a file; send one in mid-turn, too, then reply

What is in a file follows from the text that goes with it, see content().
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from random import Random

AGENTS = ("berta", "emil")

#: Of a conversation without a kill: where its points are, about.
POINTS_OF_CHAT, POINTS_OF_MESSAGE = 25, 40


@dataclass(frozen=True, slots=True)
class Message:
    """One event of a chat."""

    marker: str
    order: str
    argument: str = "1"
    again: bool = False  #: the adapter hands it over twice
    words: str = ""  #: what the echo provider is told, which does not know these orders

    @property
    def text(self) -> str:
        return self.words or f"{self.marker} {self.order} {self.argument}"

    def replies(self) -> list[str]:
        """Return the replies that it gets if it is answered."""
        count = int(self.argument) if self.order == "say" else self.order != "quiet"
        return [f"r:{self.marker}:{index}" for index in range(count)]

    def sends(self) -> list[str]:
        """Return what is sent on the way to its end."""
        orders = ("fail", "crash", "poison", "file")
        count = int(self.argument) if self.order == "send" else self.order in orders
        return [f"s:{self.marker}:{index}" for index in range(count)]


def content(text: str) -> bytes:
    """Return what is in the file that goes with a text."""
    return text.encode() * 3000


class Pause(Enum):
    """What a person does between messages."""

    UNTIL_ENDED = "waits until all that was said has come to its end"
    STOP = "says stop"
    STOP_RUNNING = "says stop once a runner has something of it"
    A_SECOND = "does nothing"


Step = Message | Pause


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    name: str
    agent: str
    steps: list[Step]
    channel: str = "test"
    #: Who writes is unknown there at first: what is said waits until the owner has let them in.
    asks: bool = False

    @property
    def id(self) -> str:
        """What the channel calls it."""
        return f"{self.agent}/{self.name}" if self.channel == "terminal" else self.name

    @property
    def sender(self) -> str:
        return f"@{self.name}" if self.asks else "someone"

    @property
    def messages(self) -> list[Message]:
        return [step for step in self.steps if isinstance(step, Message)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One conversation."""

    seed: int
    number: int
    chats: list[Chat]
    mood: int  #: seed of what the adapter does with deliveries
    # Of scripted runners and kill points.
    slots: int = 4
    kills: list[int] = field(default_factory=list)  #: points at which lives of the router end, but the last
    idle_s: float = 0.0  #: runners say good-bye after this time
    joins: bool = True  #: runners let messages join their turn
    answers_each: bool = True  #: runners say which message a reply is for
    careful: bool = True  #: runners leave out what an earlier attempt sent; others send it again


def make_plan(seed: int, number: int, *, kills: list[int] | None = None) -> Plan:
    """Return a conversation, with kills of its own unless others are given."""
    random = Random(f"{seed}/{number}")
    chats = [_make_chat(random, f"c{index}") for index in range(1, random.randint(2, 4) + 1)]
    said = sum(len(chat.messages) for chat in chats)
    own = list(_choose_kills(random, POINTS_OF_CHAT * len(chats) + POINTS_OF_MESSAGE * said))
    return Plan(
        seed=seed,
        number=number,
        chats=chats,
        mood=random.getrandbits(32),
        slots=random.choice((1, 2, 2, 4)),
        kills=own if kills is None else kills,
        idle_s=random.choice((0.0, 0.005, 60.0)),
        joins=random.random() < 0.7,
        answers_each=random.random() < 0.5,
        careful=random.random() < 0.5,
    )


def _make_chat(random: Random, name: str) -> Chat:
    steps: list[Step] = []
    said = 0

    def say(order: str, argument: str = "1") -> None:
        nonlocal said
        said += 1
        steps.append(Message(f"{name}-{said}", order, argument, again=random.random() < 0.1))

    for _ in range(random.randint(1, 3)):
        more = random.randint(1, 2)
        match random.choice(
            ("say", "say", "send", "file", "gate", "fail", "busy", "crash", "quiet", "die", "poison", "stop")
        ):
            case "gate":
                say("gate", f"{name}-{said + 1 + more}")
                for _ in range(more):
                    say("say")
            case "stop":
                steps.append(Pause.UNTIL_ENDED)
                say("stop")
                for _ in range(random.randint(0, 2)):
                    say("say")
                steps.append(random.choice((Pause.STOP, Pause.STOP_RUNNING)))
                steps.append(Pause.UNTIL_ENDED)
            case order:
                say(order, str(more))
        if random.random() < 0.3:
            steps.append(Pause.UNTIL_ENDED)
    # What is held is no agent's yet, and not stopped with what is.
    asks = random.random() < 0.5 and not {Pause.STOP, Pause.STOP_RUNNING} & {*steps}
    return Chat(name=name, agent=random.choice(AGENTS), steps=steps, asks=asks)


def _choose_kills(random: Random, about: int) -> Iterator[int]:
    """Choose where lives end: the first anywhere, half of all others while they recover."""
    left = about
    while True:
        kill = random.randint(1, left)
        yield kill
        left = max(30, left - kill)
        if random.random() < 0.5:
            return
        if random.random() < 0.5:
            left = 30
