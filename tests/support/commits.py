"""HeldCommits: a disk that is as slow as a test wants it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from nanoclawd.db import Database

HELD_AT_MOST_S = 60


class HeldCommits(ThreadPoolExecutor):
    """Takes the place of a database's committer: each commit waits, its writes done, until release()."""

    def __init__(self, db: Database) -> None:
        super().__init__(1)
        self.entered = asyncio.Event()
        self._released = threading.Event()
        db._committer.shutdown()
        db._committer = self

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.entered.set()
        return super().submit(self._run, fn, *args)

    def _run(self, fn: Callable[..., Any], *args: Any) -> Any:
        self._released.wait(HELD_AT_MOST_S)
        return fn(*args)

    def release(self) -> None:
        self._released.set()
