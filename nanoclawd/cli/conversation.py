"""One chat with an agent over io.nanoclaw.Channel, kept up while the router restarts."""

from __future__ import annotations

import contextlib
import mimetypes
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from queue import Empty, SimpleQueue
from threading import Thread

from nanoclawd import limits, paths
from nanoclawd.cli import control
from nanoclawd.cli.doctor import user_name
from nanoclawd.cli.screen import Screen
from nanoclawd.client import Client
from nanoclawd.errors import NanoclawError, Refused, Unavailable
from nanoclawd.version import VERSION
from nanoclawd.wire import Json, VarlinkError

INTERFACE = "io.nanoclaw.Channel"
CALL_S = 30.0  #: one short call
RECONNECT_S = 0.3
GRACE_S = 2.0  #: how long the end of a turn and its last reply may lie apart
#: A terminal shows text as it is, and what an agent does while it does it.
ANNOUNCEMENT: Json = {
    "protocol": 1,
    "adapter": f"nanoclawctl {VERSION}",
    "capabilities": {
        **dict.fromkeys(("threads", "edits", "reactions", "redactions", "files"), False),
        "typing": True,
        "textBytes": 0,
        "fileBytes": 0,
        "markup": "plain",
    },
    "accounts": ["nanoclawctl"],
}
SHOWN = 500  #: keys of deliveries that are kept; unreported deliveries are few


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """Something to show; report it by its key once it is shown."""

    key: str
    agent: str
    kind: str  #: reply, message or notice
    text: str
    events: Sequence[str]  #: what it answers
    asks: bool = False  #: the agent waits for an answer


@dataclass(frozen=True, kw_only=True, slots=True)
class Activity:
    """What the agent is doing; may be dropped."""

    kind: str  #: as in io.nanoclaw.Channel; or away, back: the router, which is tried again by itself
    text: str = ""
    events: Sequence[str] = ()


#: None: what was waiting has been sent. NanoclawError: nothing more will come. KeyboardInterrupt: Ctrl-C.
Item = Delivery | Activity | NanoclawError | KeyboardInterrupt | None


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
        hint = "put it into a file in the agent's workspace and tell the agent where"
        raise Refused(f"the message is longer than {limits.TEXT_BYTES >> 10} KiB", hint=hint)
    return text


class Attachment:
    """A file that goes with a message. Use as a context manager."""

    def __init__(self, path: str) -> None:
        """Raises Refused."""
        try:
            self._file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115
        except OSError as exc:
            raise Refused(f"'{path}' cannot be read: {exc.strerror}") from None
        self.fd = self._file.fileno()
        state = os.fstat(self.fd)
        if not stat.S_ISREG(state.st_mode) or state.st_size > limits.FILE_BYTES:
            self._file.close()
            raise Refused(f"'{path}' is not a file of at most {limits.FILE_BYTES >> 20} MiB")
        kind = mimetypes.guess_type(path)[0] or ""
        self.shown: Json = {"name": os.path.basename(path), "mediaType": kind, "bytes": state.st_size}

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class Lines:
    """A private file of lines, to which several terminals add. One that cannot be kept does no harm."""

    def __init__(self, name: str, keep: int) -> None:
        self._path = paths.state() / "terminal" / name
        self.lines: list[str] = []
        with contextlib.suppress(OSError):
            # A last line without its end was not finished.
            self.lines = self._path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        if len(self.lines) > 2 * keep:
            self.lines = self.lines[-keep:]
            self._write(self.lines, os.O_TRUNC)

    def add(self, line: str) -> None:
        self.lines.append(line)
        if "\n" not in line:
            self._write([line], os.O_APPEND)

    def _write(self, lines: list[str], flag: int) -> None:
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # One write(2) of a short line to a file opened for appending is not mixed with another's.
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | flag, 0o600)
            with open(descriptor, "wb", buffering=0) as file:
                file.write("".join(f"{line}\n" for line in lines).encode(errors="replace"))


class Conversation:
    """Says something, and yields what comes. A thread fills `inbox`, whatever becomes of the connection."""

    def __init__(self, agent: str, name: str | None, screen: Screen) -> None:
        """`name` tells several chats with one agent apart. Raises Refused if it is none."""
        self._chat: Json = {"chat": chat_id(agent, name)}
        self._agent = agent
        self._screen = screen
        self.inbox: SimpleQueue[Item] = SimpleQueue()
        self._client: Client | None = None
        self._shown = Lines("shown", SHOWN)
        self.until = inf  #: what is waited for is given up when time.monotonic() is this

    def connect(self, event: str | None = None, put: Callable[[Item], None] | None = None) -> None:
        """Connect; `put` is then called in a thread for all that comes, for `event` alone if it is one.

        Raises Unavailable if the router is away already.
        """
        if put is not None:
            # First, so that nothing said about a message is missed. The thread ends with the process.
            parameters = {**self._chat, "event": event}
            Thread(target=_receive, args=(parameters, put, *_attach(parameters)), daemon=True).start()
        self._client = _connect(CALL_S)

    def deliver(self, text: str, event: str, files: Sequence[Attachment] = ()) -> str:
        """Hand over a message and return its id, or "": it was a command. The same `event` is stored once.

        Tries again on a broken connection. Raises NanoclawError.
        """
        message: Json = {
            "event": event,
            "revision": 0,
            "sender": user_name(),
            "text": text,
            "agent": self._agent,
        }
        message["files"] = [file.shown for file in files]
        fds = [file.fd for file in files]
        while True:
            try:
                reply = self._call("Deliver", {**self._chat, "thread": "", **message}, fds)
                return reply["message"] or ""
            except Unavailable as error:
                if isinstance(error.__cause__, VarlinkError) or time.monotonic() + RECONNECT_S > self.until:
                    raise
            time.sleep(RECONNECT_S)

    def follow(self, event: str) -> Iterator[Item]:
        """Yield what comes, until the answer to `event` is complete. Raises TimeoutError if it is too late.

        "idle" comes after the deliveries. It may be missed, since it is not stored, and a turn may end
        without a reply: either alone is the end only after a while.
        """
        answered = idle = False
        end = inf
        while (now := time.monotonic()) < end:
            if end == inf and now >= self.until:
                raise TimeoutError
            try:
                item = self.inbox.get(timeout=min(1.0, end - now, self.until - now if end == inf else inf))
            except Empty:
                self._screen.tick()
                continue
            if isinstance(item, Delivery | Activity) and event in item.events:
                if isinstance(item, Delivery):
                    answered |= item.kind in ("reply", "notice")
                else:
                    idle = item.kind == "idle"
                    answered &= idle  # not the end after all: e.g. a notice told of a delay
                now = time.monotonic()
                end = now if idle and answered else now + GRACE_S if idle or answered else inf
            yield item

    def was_shown(self, delivery: Delivery) -> bool:
        """Return whether it was, be it just before a kill -9 in another terminal."""
        return delivery.key in self._shown.lines

    def report(self, key: str) -> None:
        """Report that a delivery was shown. If that fails it comes again, and is then only reported."""
        if key not in self._shown.lines:
            self._shown.add(key)
        for _ in range(2):  # the first connection may be to a router that is gone; one of now sent this
            with contextlib.suppress(NanoclawError):
                self._call("ReportSent", {"key": key, "receipt": key})
                return

    def stop_turn(self) -> bool:
        """Stop what the agent does for this chat; False if there was nothing. Raises NanoclawError."""
        return bool(self._call("StopTurn", {**self._chat, "thread": ""})["stopped"])

    def _call(self, method: str, parameters: Json, fds: Sequence[int] = ()) -> Json:
        client, self._client = self._client or _connect(CALL_S), None
        try:
            with control.translated():
                reply = client.call(f"{INTERFACE}.{method}", parameters, fds)
        except BaseException:
            client.close()  # an interrupt too leaves an answer behind that nobody may take for the next one
            raise
        self._client = client
        return reply


def _connect(timeout_s: float | None = None) -> Client:
    """Return a connection on which the terminal has introduced itself. Raises NanoclawError."""
    client = Client(paths.terminal_socket(), timeout_s=timeout_s)
    try:
        with control.translated():
            client.call(f"{INTERFACE}.Announce", ANNOUNCEMENT)
    except BaseException:
        client.close()
        raise
    return client


def _attach(parameters: Json) -> tuple[Client, Iterator[Json]]:
    client = _connect()
    return client, client.stream(f"{INTERFACE}.Attach", parameters)


def _receive(parameters: Json, put: Callable[[Item], None], client: Client, replies: Iterator[Json]) -> None:
    """Put what the router has for a chat, and attach again when the connection breaks."""
    while True:
        begun = False
        try:
            with client, control.translated():
                for reply in replies:
                    begun = True
                    put(parse_item(reply))
        except NanoclawError as error:
            # Later it is no matter of what we asked for: we were too slow, say, and shall attach again.
            if not begun and not isinstance(error, Unavailable):
                return put(error)
        put(Activity(kind="away"))
        while True:
            time.sleep(RECONNECT_S)
            with contextlib.suppress(NanoclawError):
                client, replies = _attach(parameters)
                break
        put(Activity(kind="back"))


def parse_item(reply: Json) -> Item:
    """Return what one reply of Attach() holds; None if it has neither field."""
    if found := reply.get("delivery"):
        words = {key: str(found[key]) for key in ("key", "agent", "kind", "text")}
        return Delivery(**words, events=found["events"], asks=bool(found.get("choices")))
    if found := reply.get("activity"):
        return Activity(kind=str(found["kind"]), text=str(found["text"]), events=found["events"])
    return None
