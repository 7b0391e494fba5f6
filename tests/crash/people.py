"""People, who write to agents, and the adapter of their platform, which shows what comes."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path
from random import Random

from nanoclawd.wire import Json, VarlinkError
from tests.crash.line import AGAIN_S, CHANNEL, Line
from tests.crash.record import Fault, Record, Shown
from tests.crash.script import Chat, Message, Pause, content

#: What becomes of a delivery that comes for the first time, and how often.
MOODS = {"well": 75, "says it twice": 5, "dies": 7, "dies with a part": 5, "put off": 6, "refuses": 2}


class Person:
    """Writes in one chat. What the router does not acknowledge is handed over again."""

    def __init__(self, chat: Chat, record: Record, socket: Path) -> None:
        self._chat, self._record = chat, record
        self._line = Line(socket)
        self._said: list[str] = []

    async def talk(self) -> None:
        try:
            for step in self._chat.steps:
                match step:
                    case Message():
                        await self._say(step)
                    case Pause.UNTIL_ENDED:
                        await self._until_ended()
                    case Pause.STOP:
                        await self._stop()
                    case Pause.STOP_RUNNING:
                        await self._record.until(lambda: any(map(self._is_running, self._said)))
                        await self._stop()
                    case Pause.A_SECOND:
                        await asyncio.sleep(1)
        finally:
            await self._line.drop()

    def _is_running(self, marker: str) -> bool:
        return marker in self._record.begun and not self._record.has_ended(marker)

    async def _until_ended(self) -> None:
        await self._record.until(lambda: all(map(self._record.has_ended, self._said)))

    async def _say(self, message: Message) -> None:
        parameters: Json = {
            "chat": self._chat.id,
            "thread": "",
            "event": message.marker,
            "revision": 0,
            "sender": self._chat.sender,
            "text": message.text,
            "agent": self._chat.agent,
        }
        fds: list[int] = []
        if message.order == "file" and not message.words:
            fds = [os.memfd_create(message.marker)]
            size = os.write(fds[0], content(message.text))
            parameters["files"] = [{"name": message.marker, "mediaType": "", "bytes": size}]
        try:
            await self._hand_over(message, parameters, fds)
        finally:
            for fd in fds:
                os.close(fd)

    async def _hand_over(self, message: Message, parameters: Json, fds: list[int]) -> None:
        reply = await self._line.call(f"{CHANNEL}.Deliver", parameters, fds)
        self._said.append(message.marker)
        self._record.acknowledged[message.marker] = reply["message"]
        self._record.note()
        if message.again:
            same = await self._line.call(f"{CHANNEL}.Deliver", parameters, fds)
            if reply["outcome"] == "queued" and same != {**reply, "duplicate": True}:
                self._record.fault(Fault.REPEATED, f"{message.marker} was stored twice: {reply}, {same}")

    async def _stop(self) -> None:
        running = {marker for marker in self._said if not self._record.has_ended(marker)}
        place = {"chat": self._chat.id, "thread": ""}
        await self._line.call(f"{CHANNEL}.StopTurn", place)
        self._record.told_to_stop |= running


class Adapter:
    """Shows deliveries, drops those whose key it knows, and is not always in best health."""

    def __init__(self, record: Record, socket: Path) -> None:
        self._record = record
        self._stream, self._calls = Line(socket), Line(socket)
        self._mood = Random(record.plan.mood)
        self._met: set[str] = set()  #: keys that came before
        self._parts: dict[str, int] = {}  #: parts that were reported and acknowledged, by key

    async def run(self) -> None:
        try:
            while True:
                with suppress(EOFError, OSError, _Broken):
                    stream = await self._stream.peer()
                    await stream.send(f"{CHANNEL}.Attach", more=True)
                    while True:
                        if (delivery := (await stream.result())["delivery"]) is not None:
                            await self._take(delivery)
                await self._stream.drop()
                await asyncio.sleep(AGAIN_S)
        finally:
            await self._stream.drop()
            await self._calls.drop()

    async def _take(self, delivery: Json) -> None:
        key = delivery["key"]
        shown = Shown(
            key, delivery["chat"], delivery["kind"], delivery["text"], frozenset(delivery["events"])
        )
        known = self._record.shown.get(key) or self._record.refused.get(key)
        if known is not None and (known.chat, known.text) != (shown.chat, shown.text):
            self._record.fault(Fault.REPEATED, f"one key, two deliveries: {known}, {shown}")
        if delivery["partsSent"] < self._parts.get(key, 0):
            self._record.fault(Fault.REPEATED, f"its first part would be shown again: {shown}")
        mood = "well"
        if known is None and key not in self._met:
            mood = self._mood.choices((*MOODS,), (*MOODS.values(),))[0]
        self._met.add(key)
        match mood:
            case "put off":
                return await self._report("Failed", key, reason="not now", retryable=True)
            case "refuses":
                self._record.refused[key] = shown
            case "dies with a part":
                await self._report("Part", key, parts=1, receipt="r")
                self._parts[key] = 1
                raise _Broken
        if key in self._record.refused:
            await self._report("Failed", key, reason="never", retryable=False)
        else:
            if delivery["files"]:
                await self._check_file(delivery)
            self._record.shown.setdefault(key, shown)
            if mood == "dies":
                raise _Broken
            await self._report("Sent", key, receipt="r")
            if mood == "says it twice":
                await self._report("Sent", key, receipt="r")
        self._record.reported.add(key)
        self._record.note()

    async def _check_file(self, delivery: Json) -> None:
        wanted = content(delivery["text"])
        try:
            fd = await self._calls.open_file(delivery["key"])
        except VarlinkError as exc:
            return self._record.fault(Fault.LOST, f"the file of {delivery['key']}: {exc}")
        if os.pread(fd, len(wanted) + 1, 0) != wanted:
            self._record.fault(Fault.OTHER, f"the file of {delivery['key']} is another one")
        os.close(fd)

    async def _report(self, what: str, key: str, **parameters: object) -> None:
        await self._calls.call(f"{CHANNEL}.Report{what}", {"key": key, **parameters})


class _Broken(Exception):
    """The adapter dies: what it has not reported comes again."""
