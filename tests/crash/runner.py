"""A scripted runner, which outlives the router as a container does, and says all again to the next."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from contextlib import suppress

from nanoclawd.wire import Json, VarlinkError
from tests.crash.line import AGAIN_S, AGENT, Line
from tests.crash.record import Fault, Record
from tests.crash.script import Message, content
from tests.support.router import Container, killed

_PART_BYTES = 20_000
STOP_S = 2.0  #: a turn that is to be stopped waits for that so long


class Runner:
    """One container's program; see script.py for what it is told."""

    def __init__(self, container: Container, record: Record, leaving: asyncio.Event) -> None:
        self._container, self._record, self._leaving = container, record, leaving
        self._calls = Line(container.socket, hello=True)
        self._stream = Line(container.socket, hello=True)
        self._turns: asyncio.Queue[_Turn] = asyncio.Queue()
        self._known: dict[str, tuple[_Turn, asyncio.Event]] = {}  #: and the event that it is to stop

    async def run(self) -> None:
        reading = asyncio.create_task(self._read(), name="runner's stream")
        try:
            while (turn := await self._next()) is not None:
                with suppress(_Over):
                    await turn.run()
        finally:
            reading.cancel()
            await asyncio.wait((reading,))
            await self._stream.drop()
            await self._calls.drop()

    async def _read(self) -> None:
        while True:
            with suppress(EOFError, OSError):
                peer = await self._stream.peer()
                await peer.send(f"{AGENT}.Work", more=True)
                self._container.ready.set()
                while True:
                    self._take(await peer.result())
            await self._stream.drop()
            await asyncio.sleep(AGAIN_S)

    def _take(self, work: Json) -> None:
        if (told := work["turn"]) is None:
            if work["stop"] in self._known:
                self._known[work["stop"]][1].set()
        elif told["id"] in self._known:
            self._known[told["id"]][0].join(told["messages"])
        else:
            stop = asyncio.Event()
            turn = _Turn(told, self._record, self._container, self._calls, stop)
            self._known[told["id"]] = turn, stop
            self._turns.put_nowait(turn)

    async def _next(self) -> _Turn | None:
        """Return the next turn, or None after a good-bye."""
        idle_s = self._record.plan.idle_s
        while True:
            turn = asyncio.ensure_future(self._turns.get())
            leaving = asyncio.ensure_future(self._leaving.wait())
            try:
                await asyncio.wait((turn, leaving), timeout=idle_s, return_when=asyncio.FIRST_COMPLETED)
                if turn.done():
                    return turn.result()
            finally:
                turn.cancel()
                leaving.cancel()
            if not (await self._calls.call(f"{AGENT}.Goodbye"))["stay"]:
                return None
            await asyncio.sleep(AGAIN_S)


class _Over(Exception):
    """The router does not know this turn any more: it took its end before it died."""


class _Stopped(Exception):
    """The person said stop."""


class _Failed(Exception):
    def __init__(self, code: str, *, retryable: bool) -> None:
        self.error = {"code": code, "message": "As it was told.", "retryable": retryable}


class _Turn:
    """One turn, from its first message to its end."""

    def __init__(
        self, turn: Json, record: Record, container: Container, calls: Line, stop: asyncio.Event
    ) -> None:
        self._id, self._attempt = turn["id"], turn["attempt"]
        self._already_sent = {sent["text"] for sent in turn["alreadySent"]}
        self._record, self._container, self._calls, self._stop = record, container, calls, stop
        self._messages: list[Message] = []
        self._ids: dict[str, str] = {}  #: of messages, by marker
        self._files: dict[str, str] = {}  #: the same of files
        self.join(turn["messages"])

    def join(self, messages: list[Json]) -> None:
        """Take on messages, unless it has them."""
        for message in messages:
            known = self._record.messages[message["text"].split()[0]]
            if known in self._messages:
                continue
            self._messages.append(known)
            self._ids[known.marker] = message["id"]
            for file in message["files"]:
                self._files[known.marker] = file["id"]
            if known.marker in self._record.finished:
                self._record.fault(Fault.REPEATED, f"{known.marker} came to a runner again after its end")
            if unsaid := self._record.sent & {*known.sends()} - self._already_sent:
                self._record.fault(Fault.OTHER, f"attempt {self._attempt} was not told of {unsaid}")
        self._record.begun |= self._markers
        self._record.note()

    @property
    def _markers(self) -> set[str]:
        return {message.marker for message in self._messages}

    @property
    def _last(self) -> str:
        return self._ids[self._messages[-1].marker]

    async def run(self) -> None:
        try:
            replies = await self._obey_all()
        except _Failed as exc:
            await self._call("FinishTurn", outcome="failed", replies=[], error=exc.error)
        except _Stopped:
            await self._call("FinishTurn", outcome="stopped", replies=[], last=self._last)
        else:
            await self._answer(replies)

    async def _answer(self, replies: list[tuple[str, str]]) -> None:
        answers = [message for message, _ in replies] if self._record.plan.answers_each else None
        texts = [text for _, text in replies]
        self._record.unsure |= self._markers
        with suppress(_Over):
            await self._call(
                "FinishTurn", outcome="answered", replies=texts, answers=answers, last=self._last
            )
        self._record.unsure -= self._markers
        self._record.finished |= self._markers
        self._record.note()

    async def _obey_all(self) -> list[tuple[str, str]]:
        """Return the replies, each with the id of its message."""
        replies: list[tuple[str, str]] = []
        for message in self._messages:  # grows
            replies += [(self._ids[message.marker], text) for text in await self._obey(message)]
            if self._stop.is_set():
                raise _Stopped
            if message is self._messages[-1] and self._record.plan.joins:
                self.join((await self._call("TakeMessages", last=self._last))["messages"])
        return replies

    async def _obey(self, message: Message) -> list[str]:
        """Do what one message says, and return the replies to it."""
        for text in message.sends():
            if message.order == "file":
                await self._check_file(message)
                await self._send_file(text)
            else:
                await self._send(text)
        match message.order:
            case "fail" | "busy" if self._attempt <= int(message.argument):
                raise _Failed("internal" if message.order == "fail" else "overloaded", retryable=True)
            case "crash" if self._attempt <= int(message.argument):
                await killed(self._container)
            case "poison":
                raise _Failed("internal", retryable=True)
            case "die":
                raise _Failed("invalid_request", retryable=False)
            case "gate":
                await self._until_stopped_or(lambda: message.argument in self._record.acknowledged)
                await self._call("RenewTurn")
            case "stop":
                with suppress(TimeoutError):
                    async with asyncio.timeout(STOP_S):
                        await self._stop.wait()
        return message.replies()

    async def _until_stopped_or(self, condition: Callable[[], bool]) -> None:
        tasks = [asyncio.ensure_future(wait) for wait in (self._record.until(condition), self._stop.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    async def _send(self, text: str) -> None:
        if text in self._already_sent and self._record.plan.careful:
            return
        await self._call("SendMessage", key=text.replace(":", "."), text=text)
        self._record.sent.add(text)

    async def _send_file(self, text: str) -> None:
        if text in self._already_sent and self._record.plan.careful:
            return
        data, key = content(text), text.replace(":", ".")
        said = {"name": "f", "mediaType": "", "bytes": len(data), "caption": text, "destination": None}
        while (await self._call("SendFile", key=key, **said))["outcome"] is None:
            for offset in range(0, len(data), _PART_BYTES):  # begun anew if the router has died
                part = base64.b64encode(data[offset : offset + _PART_BYTES]).decode()
                await self._call("PutFile", key=key, offset=offset, data=part)
        self._record.sent.add(text)

    async def _check_file(self, message: Message) -> None:
        data = b""
        file = self._files[message.marker]
        while part := base64.b64decode((await self._call("ReadFile", id=file, offset=len(data)))["data"]):
            data += part
        if data != content(message.text):
            self._record.fault(Fault.OTHER, f"the file of {message.marker} is another one")

    async def _call(self, method: str, **parameters: object) -> Json:
        try:
            return await self._calls.call(f"{AGENT}.{method}", {"turn": self._id, **parameters})
        except VarlinkError as exc:
            if exc.name != f"{AGENT}.NoSuchTurn":
                raise
            raise _Over from exc
