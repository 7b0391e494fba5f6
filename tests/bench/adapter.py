"""A channel adapter that takes the time of what it is pushed, over io.nanoclaw.Channel."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from nanoclawd import paths
from nanoclawd.varlink import Connection, call, connect

WAIT_S = 180.0  #: for one reply: above the container's start time-out and a retry
REPORTERS = 8  #: receipts on their way at once, as in an adapter of a real platform


class Adapter:
    """One attached adapter. Make it with attach()."""

    def __init__(self) -> None:
        self.replies: dict[str, list[str]] = defaultdict(list)  #: events answered, by chat, as they came
        self.keys: list[str] = []  #: of all deliveries
        self._at: dict[tuple[str, str], float] = {}
        self._awaited: set[str] = set()
        self._answered = asyncio.Event()  #: nothing is awaited any more
        self._unreported: asyncio.Queue[str] = asyncio.Queue()

    @staticmethod
    def now() -> float:
        """Return the time on the clock that everything here is timed by."""
        return time.monotonic()

    def at(self, event: str, kind: str) -> float | None:
        """Return when (s, monotonic) `kind` was first pushed for `event`: "reply", or a kind of activity."""
        return self._at.get((event, kind))

    async def wait_reply(self, event: str) -> float:
        """Return when the answer to `event` was pushed. Raises TimeoutError."""
        await self.wait_replies([event])
        return self._at[event, "reply"]

    async def wait_replies(self, events: list[str]) -> None:
        """Return once all are answered; one caller at a time. Raises TimeoutError."""
        self._awaited = {event for event in events if (event, "reply") not in self._at}
        self._answered.clear()
        if self._awaited:
            async with asyncio.timeout(WAIT_S):
                await self._answered.wait()

    async def settle(self) -> None:
        """Return when the router has a receipt for everything that came."""
        async with asyncio.timeout(WAIT_S):
            await self._unreported.join()

    async def read(self, stream: Connection) -> None:
        while (message := await stream.read()) is not None:
            now = time.monotonic()
            if "error" in message:
                raise RuntimeError(f"the router ended the stream: {message}")
            item: dict[str, Any] = message["parameters"]
            if delivery := item["delivery"]:
                self.keys.append(delivery["key"])
                self.replies[delivery["chat"]].append(delivery["inReplyTo"])
                self._at.setdefault((delivery["inReplyTo"], "reply"), now)
                self._unreported.put_nowait(delivery["key"])
                self._awaited.discard(delivery["inReplyTo"])
                if not self._awaited:
                    self._answered.set()
            else:
                activity = item["activity"]
                for about in activity["events"] or [activity["chat"]]:
                    self._at.setdefault((about, activity["kind"]), now)
        raise RuntimeError("the router closed the stream")

    async def report(self, connection: Connection) -> None:
        while True:
            key = await self._unreported.get()
            receipt = {"key": key, "receipt": key}
            await call(connection, "io.nanoclaw.Channel.ReportSent", receipt)
            self._unreported.task_done()


@asynccontextmanager
async def attach() -> AsyncIterator[Adapter]:
    """Attach to the whole channel, and report each delivery as sent."""
    adapter = Adapter()
    async with AsyncExitStack() as stack:
        stream = await open_channel(stack)
        await stream.write(
            {
                "method": "io.nanoclaw.Channel.Attach",
                "parameters": {},
                "more": True,
            }
        )
        reporters = [await open_channel(stack) for _ in range(REPORTERS)]
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(adapter.read(stream), name="read")]
            running += [tasks.create_task(adapter.report(each), name="report") for each in reporters]
            yield adapter
            await adapter.settle()
            for task in running:
                task.cancel()


async def open_channel(stack: AsyncExitStack) -> Connection:
    """Return a connection to the channel socket, which `stack` closes."""
    connection = await connect(paths.terminal_socket())
    stack.callback(connection.close)
    return connection


async def deliver(connection: Connection, agent: str, chat: str, event: str, text: str) -> None:
    """Hand over one message; returns when it is on the router's disk."""
    parameters = {
        "chat": chat,
        "thread": "",
        "event": event,
        "revision": 0,
        "sender": "bench",
        "text": text,
        "agent": agent,
    }
    await call(connection, "io.nanoclaw.Channel.Deliver", parameters)


async def control(method: str, **parameters: Any) -> dict[str, Any]:
    """Call a method of io.nanoclaw.Control and return its reply's parameters."""
    async with AsyncExitStack() as stack:
        connection = await connect(paths.control_socket())
        stack.callback(connection.close)
        return await call(connection, f"io.nanoclaw.Control.{method}", parameters)


@asynccontextmanager
async def agent(name: str, provider: str = "echo") -> AsyncIterator[str]:
    """Add an agent; afterwards it is gone, its containers and workspace too."""
    await control("AddAgent", name=name, provider=provider)
    try:
        yield name
    finally:
        await control("RemoveAgent", name=name)


async def stop_containers(agent_name: str) -> None:
    """Return when no container of the agent runs; the next message starts one."""
    await control("StopAgent", name=agent_name)
    await control("StartAgent", name=agent_name)
