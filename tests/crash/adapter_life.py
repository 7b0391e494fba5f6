"""Lives of the kit's example adapter, each of which may be told to die at one of its points.

A process of its own, which imports the adapter once and forks for each life: reads the point, a line each
(0: live on), prints the pid, and at the end of that life what it was about.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any


class Kind(StrEnum):
    """What the adapter was about when it died."""

    BEFORE_SEND = "before a send"
    IN_SEND = "in the middle of a send"
    AFTER_SEND = "after a send"
    AFTER_ANSWER = "after an answer"
    BEFORE_MOVE = "before its position moves"
    AFTER_MOVE = "after its position has moved"


class Points:
    """Counts the points of this life, and ends it at one of them."""

    def __init__(self, kill_at: int) -> None:
        self._left = kill_at

    def reach(self, kind: Kind, what: str, dying: Callable[[], object] = lambda: None) -> None:
        self._left -= 1
        if self._left == 0:
            dying()
            print(kind, what, sep=": ", flush=True)
            os.kill(os.getpid(), 9)


def inject(adapter: Any, points: Points) -> None:
    """Wrap what the adapter does; it knows nothing of it."""
    send, receive, move = adapter.Line.send, adapter.Line.receive, adapter.write_position

    async def counted_send(line: Any, message: Any) -> None:
        what = message.get("method", "") or f"platform's {next(iter(message))}"
        data = json.dumps(message).encode() + line.end
        points.reach(Kind.BEFORE_SEND, what)
        points.reach(Kind.IN_SEND, what, lambda: line.writer.write(data[: len(data) // 2]))
        await send(line, message)
        points.reach(Kind.AFTER_SEND, what)

    async def counted_receive(line: Any) -> Any:
        message = await receive(line)
        points.reach(Kind.AFTER_ANSWER, str(next(iter(message or ["-"]))))
        return message

    def counted_move(number: int) -> None:
        points.reach(Kind.BEFORE_MOVE, str(number))
        move(number)
        points.reach(Kind.AFTER_MOVE, str(number))

    adapter.Line.send, adapter.Line.receive = counted_send, counted_receive
    adapter.write_position = counted_move


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "channel-kit"))
    import example_adapter as adapter  # which wants its environment at once

    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            inject(adapter, Points(int(line)))
            asyncio.run(adapter.main())
            os._exit(1)
        print("pid", pid, flush=True)
        os.waitpid(pid, 0)
        print("end", flush=True)


if __name__ == "__main__":
    main()
