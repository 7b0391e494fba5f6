"""One chat with an agent over io.nanoclaw.Channel, kept up while the router restarts."""

from __future__ import annotations

import contextlib
import os
import pwd
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread

from nanoclawd import limits, paths
from nanoclawd.cli import control
from nanoclawd.client import Client
from nanoclawd.errors import NanoclawError, Refused, Unavailable
from nanoclawd.wire import Json, VarlinkError, unpack

CHANNEL = "terminal"
INTERFACE = "io.nanoclaw.Channel"
CALL_S = 30.0  #: one short call
RECONNECT_FIRST_S = 0.1
RECONNECT_MAX_S = 2.0
GRACE_S = 2.0  #: how long the end of a turn and its last reply may lie apart


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """Something to show; report it by its key once it is shown."""

    key: str
    agent: str
    kind: str  #: reply, message or notice
    text: str
    event: str | None  #: what it answers


@dataclass(frozen=True, kw_only=True, slots=True)
class Activity:
    """What the agent is doing; may be dropped."""

    kind: str  #: as in io.nanoclaw.Channel
    text: str
    event: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """The stream from the router is up or down; it is tried again by itself."""

    up: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Broken:
    """The router does not want to stream: nothing more will come."""

    error: NanoclawError


#: What an attachment puts into its queue; None means: what was waiting has been sent.
Item = Delivery | Activity | Link | Broken | None


def chat_id(agent: str, name: str | None) -> str:
    """Return the chat's id on the terminal channel. Raises Refused."""
    chat = f"{agent}/{name}" if name is not None else agent
    if name is not None and (not name or not name.isprintable()):
        raise Refused(f"{name[:64]!r} is not a name for a chat", hint="use visible characters")
    if len(chat.encode()) > limits.NAME_BYTES:
        raise Refused(f"the chat's name is longer than {limits.NAME_BYTES} bytes")
    return chat


def check_text(text: str) -> str:
    """Return `text` if a message can hold it, or raise Refused."""
    if "\0" in text:
        raise Refused("a message cannot hold a NUL character")
    if len(text.encode("utf-8", "surrogatepass")) > limits.TEXT_BYTES:
        raise Refused(
            f"the message is longer than {limits.TEXT_BYTES >> 10} KiB",
            hint="put it into a file in the agent's workspace and tell the agent where",
        )
    return text


def sender_name() -> str:
    """Return who the person is, as agents and the journal show it."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


class _Stream(Client):
    """A client that sends the call at once: the router knows of us before anything else is said."""

    def begin(self, method: str, parameters: Json) -> None:
        self._send({"method": method, "parameters": parameters, "more": True})

    def replies(self) -> Iterator[Json]:
        while True:
            reply = self._receive()
            yield unpack(reply)
            if not reply.get("continues"):
                return


class Attachment:
    """A thread that streams what the router has for a chat into a queue, and reconnects when that breaks."""

    def __init__(self, chat: str, *, event: str | None, put: Callable[[Item], None]) -> None:
        """Connect. Raises Unavailable if the router is away already. `put` is called in the thread."""
        self._parameters: Json = {"channel": CHANNEL, "chat": chat, "event": event}
        self._put = put
        client = self._attach()
        # It ends with the process: nothing of it is worth waiting for.
        Thread(target=self._run, args=(client,), name="attachment", daemon=True).start()

    def _attach(self) -> _Stream:
        client = _Stream(paths.channel_socket())
        client.begin(f"{INTERFACE}.Attach", self._parameters)
        return client

    def _run(self, stream: _Stream | None) -> None:
        wait_s = RECONNECT_FIRST_S
        while True:
            begun = False
            try:
                stream = stream or self._attach()
                self._put(Link(up=True))
                for reply in stream.replies():
                    begun, wait_s = True, RECONNECT_FIRST_S
                    self._put(parse_item(reply))
            except VarlinkError as exc:
                error = control.translate(exc)
                # Later it is no matter of what we asked for: we were too slow, say, and shall attach again.
                if not begun and not isinstance(error, Unavailable):
                    return self._put(Broken(error=error))
            except NanoclawError:
                pass  # away or restarting
            if stream is not None:
                stream.close()
                stream = None
            self._put(Link(up=False))
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, RECONNECT_MAX_S)


def parse_item(reply: Json) -> Item:
    """Return what one reply of Attach() holds; None if it has neither field."""
    if delivery := reply.get("delivery"):
        return Delivery(
            key=str(delivery["key"]),
            agent=str(delivery["agent"]),
            kind=str(delivery["kind"]),
            text=str(delivery["text"]),
            event=delivery.get("inReplyTo"),
        )
    if activity := reply.get("activity"):
        return Activity(
            kind=str(activity["kind"]), text=str(activity["text"]), event=activity.get("inReplyTo")
        )
    return None


class Calls:
    """The short calls of a chat, on a connection that is made again when it breaks."""

    def __init__(self, chat: str, agent: str) -> None:
        """Connect. Raises Unavailable if the router is away already."""
        self._chat = chat
        self._agent = agent
        self._client: Client | None = Client(paths.channel_socket(), timeout_s=CALL_S)

    def deliver(self, text: str, event: str, *, until: float) -> str:
        """Hand over a message and return its id. The same `event` again is stored once.

        Tries again on a broken connection until time.monotonic() is `until`. Raises NanoclawError.
        """
        parameters: Json = {
            "channel": CHANNEL,
            "chat": self._chat,
            "thread": "",
            "event": event,
            "revision": 0,
            "sender": sender_name(),
            "text": text,
            "agent": self._agent,
        }
        wait_s = RECONNECT_FIRST_S
        while True:
            try:
                return str(self._call("Deliver", parameters)["message"])
            except VarlinkError as exc:
                raise control.translate(exc) from exc
            except Unavailable:
                if time.monotonic() + wait_s > until:
                    raise
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, RECONNECT_MAX_S)

    def report_sent(self, key: str) -> None:
        """Report that a delivery was shown. If that fails it comes again, and is then only reported."""
        with contextlib.suppress(Unavailable, VarlinkError):
            self._call("ReportSent", {"channel": CHANNEL, "key": key, "receipt": key})

    def stop_turn(self) -> bool:
        """Stop what the agent does for this chat; False if there was nothing. Raises NanoclawError."""
        with control.translated():
            reply = self._call("StopTurn", {"channel": CHANNEL, "chat": self._chat, "thread": ""})
        return bool(reply["stopped"])

    def _call(self, method: str, parameters: Json) -> Json:
        if self._client is None:
            self._client = Client(paths.channel_socket(), timeout_s=CALL_S)
        try:
            return self._client.call(f"{INTERFACE}.{method}", parameters)
        except VarlinkError:
            raise
        except (
            BaseException
        ):  # an interrupt too leaves an answer behind that nobody may take for the next one
            self._client.close()
            self._client = None
            raise


class Turn:
    """Tells when the answer to one event is complete."""

    def __init__(self, event: str) -> None:
        self.event = event
        self.answered = False
        self.idle = False
        self._since = 0.0

    def note(self, item: Delivery | Activity, now: float) -> None:
        """Take into account what came at the time `now` (time.monotonic())."""
        if item.event != self.event:
            return
        if isinstance(item, Delivery):
            self.answered |= item.kind in ("reply", "notice")
        else:
            self.idle = item.kind == "idle"
            # Not the end after all: e.g. a notice told of a delay.
            self.answered &= self.idle
        self._since = now

    def left_s(self, now: float) -> float | None:
        """Return the seconds until the turn counts as over: 0 if it is, None if the end is not in sight.

        "idle" comes after the deliveries. It may be missed, since it is not stored, and a turn may end
        without a reply: either alone is the end only after a while.
        """
        if self.idle and self.answered:
            return 0.0
        return max(0.0, self._since + GRACE_S - now) if self.idle or self.answered else None


#: The queue between the attachment's thread and the person's.
Inbox = SimpleQueue[Item]
