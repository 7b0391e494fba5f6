"""A Varlink connection that outlives the router: what was not answered is said again to the next."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from nanoclawd.wire import Json, VarlinkError
from tests.support.varlink_peer import Peer

AGENT = "io.nanoclaw.Agent"
CHANNEL = "io.nanoclaw.Channel"
T = TypeVar("T")
AGAIN_S = 0.001  #: until a connection that broke is made again


class Line:
    """A connection that is made anew whenever it breaks; one call at a time."""

    def __init__(self, path: Path, *, hello: bool = False) -> None:
        self._path, self._hello = path, hello
        self._peer: Peer | None = None
        self._lock = asyncio.Lock()

    async def call(self, method: str, parameters: Json | None = None, fds: Sequence[int] = ()) -> Json:
        """Call until it is answered; `fds` go with it and stay the caller's. Raises VarlinkError."""
        return await self._until_answered(
            lambda peer: (
                peer.call_with_fds(method, parameters or {}, fds) if fds else peer.call(method, parameters)
            )
        )

    async def open_file(self, key: str) -> int:
        """Return a descriptor of the file of a delivery. Raises VarlinkError."""
        what = {"key": key, "number": 0}
        return await self._until_answered(lambda peer: peer.call_for_fd(f"{CHANNEL}.OpenFile", what))

    async def _until_answered(self, call: Callable[[Peer], Awaitable[T]]) -> T:
        async with self._lock:
            while True:
                with suppress(EOFError, OSError):
                    try:
                        return await call(await self.peer())
                    except VarlinkError as exc:
                        if not exc.name.endswith(".Unavailable"):
                            raise
                        continue
                await self.drop()
                await asyncio.sleep(AGAIN_S)

    async def peer(self) -> Peer:
        """Return the connection, made if need be. Raises OSError, EOFError."""
        if self._peer is None:
            self._peer = await Peer.connect(self._path)
            if self._hello:
                await self._peer.call(f"{AGENT}.Hello", {"protocol": 1, "version": "crash"})
        return self._peer

    async def drop(self) -> None:
        if self._peer is not None:
            peer, self._peer = self._peer, None
            await peer.close()
