"""One live session: its container's state, its runner's stream of work, the turn it has leased."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from nanoclawd import limits, messages
from nanoclawd.db import Row, now_ms
from nanoclawd.errors import NanoclawError
from nanoclawd.ids import TurnId, unit_name
from nanoclawd.messages import Message, Place, SessionRow, Turn
from nanoclawd.rates import Rate
from nanoclawd.slots import Claim
from nanoclawd.states import MessageState
from nanoclawd.wire import Json

#: The exit status with which Podman and shells name the signal that ended a program.
_SIGNALS = {128 + number: number.name for number in signal.Signals}


class SessionState(StrEnum):
    IDLE = "idle"  #: no container
    QUEUED = "queued"  #: waits for a slot, or for the time of the next attempt
    STARTING = "starting"  #: systemd starts the unit
    READY = "ready"  #: the runner waits for work
    WORKING = "working"  #: the runner has a turn
    STOPPING = "stopping"  #: the runner said good-bye, or is being stopped


def _offences() -> Rate:
    return Rate(limits.OFFENCES_FORGIVEN_PER_S, limits.OFFENCES)


@dataclass(eq=False, slots=True)
class Session:
    """The state that is not in the database. Only one task runs its life, see Sessions."""

    row: SessionRow
    state: SessionState = SessionState.QUEUED
    host: socket.socket | None = None  #: listener of the agent interface
    gateway: socket.socket | None = None  #: listener of the gateway, which has a copy
    stream: asyncio.Queue[Json | None] | None = None  #: to the runner's Work() call; None ends it
    turn: Turn | None = None
    slot: Claim | None = None  #: what allows it a container, or is waited for
    seq: int = 0  #: of the oldest message, while it waits for a container
    waiting_events: Sequence[str] = ()  #: of the same
    waiting_at: Place = ("", "", "")  #: of the same
    taking: bool = False  #: a write is under way that may lease a turn
    hello: bool = False  #: the runner of this life has introduced itself
    worked: bool = False  #: this life has taken a turn
    left: bool = False  #: the runner said good-bye, or has been sent away
    ending: str = ""  #: why the container of this life is being stopped
    stopped_by_person: bool = False
    #: What the agent has kept is to go as soon as there is no container; then this has where it went.
    anew: asyncio.Future[Path | None] | None = None
    idle_since: float | None = None  #: the loop's time when there was nothing for the runner to do
    alive: bool = False  #: systemd has said that the unit runs
    result: str = ""  #: systemd's Result= of the unit
    exit_status: int = 0  #: of its main process
    refused: NanoclawError | None = None  #: why the runner of this life cannot be worked with
    offences: Rate = field(default_factory=_offences)  #: of the runner of this life
    serving: asyncio.Task[None] | None = None  #: listens on `host`
    gone: asyncio.Event = field(default_factory=asyncio.Event)  #: the unit is inactive
    wanted: asyncio.Event = field(default_factory=asyncio.Event)  #: there may be something to do
    lease: asyncio.TimerHandle | None = None
    retry: asyncio.TimerHandle | None = None
    stopping: asyncio.TimerHandle | None = None
    silence: asyncio.TimerHandle | None = None  #: until the runner must have asked for work

    @property
    def unit(self) -> str:
        return unit_name(self.row.agent, self.row.name)

    def can_take(self) -> bool:
        """Whether a turn may be leased for the runner at this moment."""
        return (
            self.stream is not None
            and self.turn is None
            and not self.taking
            and self.state in (SessionState.STARTING, SessionState.READY)
            and not self.left
        )

    def find_turn(self, turn: str) -> Turn | None:
        """Return the turn if it is the one that runs."""
        return self.turn if self.turn is not None and self.turn.id == TurnId(turn) else None

    def push(self, work: Json) -> None:
        """Queue work for the runner; one that reads nothing loses its stream, and gets all again when it is
        back.
        """
        if self.stream is None:
            return
        try:
            self.stream.put_nowait(work)
        except asyncio.QueueFull:
            self.end_stream()

    def open_stream(self, size: int) -> asyncio.Queue[Json | None]:
        """Return a new stream to the runner."""
        if self.silence is not None:
            self.silence.cancel()
            self.silence = None
        self.stream = asyncio.Queue(size)
        return self.stream

    def end_stream(self) -> None:
        if self.stream is not None:
            while not self.stream.empty():
                self.stream.get_nowait()
            self.stream.put_nowait(None)
            self.stream = None

    def begin_life(self) -> None:
        """Forget the previous container."""
        self.state = SessionState.STARTING
        self.hello = self.worked = self.left = self.stopped_by_person = self.alive = False
        self.result = self.ending = ""
        self.exit_status = 0
        self.refused = None
        self.offences = _offences()
        self.idle_since = None
        self.gone = asyncio.Event()  # a new one: a stop of the previous container may still have the old one

    def cancel_timers(self) -> None:
        for timer in (self.lease, self.retry, self.stopping, self.silence):
            if timer is not None:
                timer.cancel()
        self.lease = self.retry = self.stopping = self.silence = None

    def describe_end(self) -> str:
        """Say in one line why the container is gone."""
        if self.ending:
            return self.ending
        match self.result:
            case "oom-kill":
                return "its container used more memory than it may"
            case "timeout":
                return "its runner did not say hello in time"
            case "start-limit-hit":
                return "its container was started too often in a short time"
            case "protocol":
                return "its runner left without a word"
            case "exit-code" if self.exit_status in _SIGNALS:
                return f"its runner was ended by {_SIGNALS[self.exit_status]}"
            case "exit-code":
                return f"its container failed with status {self.exit_status}"
            case "" | "success" if self.exit_status == signal.SIGKILL:  # conmon's, see SuccessExitStatus=
                return "its container was stopped from outside"
            case "" | "success":
                return "its container ended"
        return f"its container failed ({self.result})"


def explain_wait(head: Row) -> str:
    """Say in one line what keeps the oldest message of a session, a row of find_work; "" if nothing does."""
    tries, now = head["attempts"] + head["deferrals"], now_ms()
    after = f": {messages.one_line(head['reason'])}" if head["reason"] else ""
    if head["state"] == MessageState.LEASED:
        silent_s = limits.LEASE_S - (head["lease_expires_at"] - now) / 1000
        if silent_s > 2 * limits.HEARTBEAT_S:
            return (
                f"its runner says nothing since {silent_s:.0f} s, and is stopped at {limits.LEASE_S:.0f} s"
            )
        return f"attempt {tries}{after}" if tries > 1 else ""
    if head["not_before"] > now:
        return f"attempt {tries + 1} in {(head['not_before'] - now) / 1000:.0f} s{after}"
    return ""


def describe_messages(messages: Iterable[Message]) -> list[Json]:
    """Return what the runner gets (type Message of io.nanoclaw.Agent)."""
    return [
        {
            "id": message.id,
            "sender": message.sender,
            "receivedAt": message.received_at / 1000,
            "text": message.text,
            "context": json.loads(message.context or "[]"),
            "command": message.command or None,
            "files": [
                {
                    "id": file["id"],
                    "name": file["name"],
                    "mediaType": file["media_type"],
                    "bytes": file["bytes"],
                }
                for file in message.files
            ],
        }
        for message in messages
    ]


def describe_turn(turn: Turn) -> Json:
    """Return what the runner gets (type Turn of io.nanoclaw.Agent)."""
    return {
        "turn": {
            "id": turn.id,
            "attempt": turn.attempt,
            "messages": describe_messages(turn.messages),
            # The id of a message was put before the runner's key, see Turn.full_key().
            "alreadySent": [{"key": key.partition("/")[2], "text": text} for key, text in turn.already_sent],
        },
        "stop": None,
    }
