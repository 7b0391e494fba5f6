"""A thread for descriptors that others send: whatever is done with one of these may hang.

To read a file of a FUSE file system takes as long as whoever serves it likes. To close the last descriptor
of a TCP socket that lingers (man 7 socket) does, too; and a message that holds one is enough: it is closed
when there is no room for it, or when its connection is closed unread.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


class Apart:
    """Does one thing after the other. What hangs here holds up what comes from the same listener only."""

    def __init__(self) -> None:
        self._work: SimpleQueue[Callable[[], None]] | None = None

    def do(self, work: Callable[[], None]) -> None:
        """Have `work` done, which raises nothing. The process ends without waiting for it."""
        if self._work is None:
            self._work = SimpleQueue()
            Thread(target=_work, args=(self._work,), name="apart", daemon=True).start()
        self._work.put(work)

    async def run(self, work: Callable[[], T]) -> T:
        """The same, and return what it returns or raise what it raises. If cancelled, `work` goes on."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def end(result: T | None, error: Exception | None) -> None:
            if done.done():  # cancelled
                return
            if error is None:
                done.set_result(result)  # type: ignore[arg-type]  # T may be None
            else:
                done.set_exception(error)

        def step() -> None:
            result, error = None, None
            try:
                result = work()
            except Exception as exc:
                error = exc
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(end, result, error)

        self.do(step)
        return await done

    def close(self, *fds: int, then: Callable[[], None] = lambda: None) -> None:
        """Close descriptors; `then` is called on the loop."""
        loop = asyncio.get_running_loop()

        def step() -> None:
            for fd in fds:
                with suppress(OSError):
                    os.close(fd)
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(then)

        self.do(step)


def _work(queue: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        queue.get()()
