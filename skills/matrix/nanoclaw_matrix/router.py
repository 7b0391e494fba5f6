"""io.nanoclaw.Channel as this adapter uses it: announced connections, calls that wait for the router."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from nanoclaw_matrix.markup import PART_BYTES
from nanoclaw_matrix.varlink import CallError, Connection, Json, RouterAway

NAME = "nanoclaw-matrix 0.1"
INTERFACE = "io.nanoclaw.Channel"
PROTOCOL = 1
AGAIN_S = (0.2, 0.5, 1.0, 2.0, 5.0)  #: pauses before the router is tried again; the last one from then on
CAPABILITIES: Json = {
    "threads": True,
    "edits": True,
    "reactions": True,
    "redactions": True,
    "files": True,
    "typing": True,
    "textBytes": PART_BYTES,
    "markup": "markdown",
}
TEMPORARY = ("Unavailable",)  #: errors of calls that are worth another try

log = logging.getLogger("router")


class Router:
    """The router's side of one channel. Its lines are for one caller each; see Line."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._introduction: Json = {"accounts": [], "capabilities": {**CAPABILITIES, "fileBytes": 0}}

    def introduce(self, account: str, file_bytes: int) -> None:
        """Say from now on whose account it is, and how large a file may be."""
        capabilities = {**CAPABILITIES, "fileBytes": file_bytes}
        self._introduction = {"accounts": [account], "capabilities": capabilities}

    async def open(self) -> Connection:
        """Return an announced connection. Raises RouterAway, CallError."""
        connection = await Connection.open(self._path)
        try:
            announcement = {"protocol": PROTOCOL, "adapter": NAME, **self._introduction}
            await connection.call(f"{INTERFACE}.Announce", announcement)
        except BaseException:
            connection.close()
            raise
        return connection

    async def attach(self) -> AsyncIterator[Json]:
        """Yield deliveries, activity and news of chats, until the router hangs up.

        Raises RouterAway, CallError.
        """
        connection = await self.open()
        try:
            async for item in connection.stream(f"{INTERFACE}.Attach", {}):
                yield item
        finally:
            connection.close()


class Line:
    """Calls of one part of the adapter, one after another, each repeated until it is answered."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._connection: Connection | None = None
        self._lock = asyncio.Lock()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def call(
        self, method: str, parameters: Json, fds: Callable[[], Sequence[int]] = lambda: ()
    ) -> Json:
        """Return the answer, however long the router is away. Raises CallError: the router refuses it.

        fds: returns the descriptors to send along, at their beginnings; asked before each try.
        """
        async with self._lock:
            for pause_s in pauses():
                try:
                    connection = await self._open()
                    return await connection.call(f"{INTERFACE}.{method}", parameters, fds())
                except RouterAway as exc:
                    log.info("%s, retrying in %s s", exc, pause_s)
                    self.close()
                except CallError as exc:
                    if exc.name not in TEMPORARY:
                        raise
                    log.warning("%s: %s, retrying in %s s", method, exc, pause_s)
                except BaseException:
                    self.close()  # or its answer, on its way, would be taken for that of the next call
                    raise
                await asyncio.sleep(pause_s)
        raise AssertionError("there is always another pause")

    async def call_for_fd(self, method: str, parameters: Json) -> int:
        """Return the descriptor that comes with the answer; the caller closes it.

        Raises CallError, RouterAway.
        """
        async with self._lock:
            try:
                return await (await self._open()).call_for_fd(f"{INTERFACE}.{method}", parameters)
            except CallError:
                raise
            except BaseException:
                self.close()
                raise

    async def _open(self) -> Connection:
        if self._connection is None:
            self._connection = await self._router.open()
        return self._connection


def pauses() -> Iterator[float]:
    """Yield how long to wait before each further try, without end."""
    yield from AGAIN_S
    while True:
        yield AGAIN_S[-1]
