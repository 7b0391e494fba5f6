"""Files that come with messages or go with deliveries: bytes in the directory files/, rows in the database.

Each is a copy of ours under a name of ours: no path of an agent or an adapter is ever opened. A row is there
only while its file is, so what is in the directory without a row is nobody's, and is swept at start and
after each pruning.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from nanoclawd import files, journal, limits, paths
from nanoclawd.apart import Apart
from nanoclawd.db import Database, Row, Transaction, now_ms
from nanoclawd.errors import NotFound, Refused, Unavailable
from nanoclawd.wire import Json

_MEDIA_TYPE = re.compile(r"[a-z0-9][a-z0-9!#$&^_.+-]{0,62}/[a-z0-9][a-z0-9!#$&^_.+-]{0,62}", re.ASCII)
_UNKNOWN = "application/octet-stream"
_CHUNK_BYTES = 1 << 18


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A file that is on disk, and has no row yet."""

    id: str
    name: str
    media_type: str
    bytes: int
    sha256: str


class Incoming:
    """A file that is being written. Its methods wait for the disk; any thread may call them."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self.path = path
        self.bytes = 0
        self._hash = hashlib.sha256()
        self._lock = Lock()
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)

    def write(self, data: bytes) -> None:
        """Append. Raises OSError, ValueError if it has been given up."""
        with self._lock:
            if self._fd < 0:
                raise ValueError("given up")
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
            self._hash.update(data)
            self.bytes += len(data)

    def finish(self) -> str:
        """Return its SHA-256; it is durable then. Raises OSError, ValueError if it has been given up."""
        with self._lock:
            if self._fd < 0:
                raise ValueError("given up")
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1
        files.sync_directory(self.path.parent)
        return self._hash.hexdigest()

    def give_up(self) -> None:
        """Remove it. Harmless if repeated."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
        with suppress(OSError):  # then it is swept
            self.path.unlink()


class FileStore:
    """All files. What is being written is known here alone, and gone with the router."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._writing: set[str] = set()

    async def prepare(self) -> None:
        """Make the directory, and remove what an earlier life has left in it. Raises Unavailable."""
        try:
            paths.files().mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise _unavailable(exc) from None
        await self.sweep()

    async def prune(self) -> None:
        """Remove files whose messages and deliveries are gone. Raises Unavailable."""
        if await self._db.write(lambda tx: tx.all("prune_files", now=now_ms())):
            await self.sweep()

    async def sweep(self) -> None:
        """Remove what has no row. Raises Unavailable."""
        names = await asyncio.to_thread(os.listdir, paths.files())
        # After the names: what has got its row meanwhile is found by the query that follows.
        writing = set(self._writing)
        known = {row["id"] for row in await self._db.read("file_ids")}
        if strays := [name for name in names if name not in known and name not in writing]:
            await asyncio.to_thread(_remove, strays)
            journal.info("files-removed", files=len(strays))

    # --- coming ------------------------------------------------------------------------------------

    def begin(self) -> Incoming:
        """Return a new file; settle() or discard() must follow. Raises Unavailable."""
        id = "f" + secrets.token_hex(8)
        try:
            incoming = Incoming(paths.files() / id)
        except OSError as exc:
            raise _unavailable(exc) from None
        self._writing.add(id)
        return incoming

    async def write(self, incoming: Incoming, data: bytes) -> None:
        """Raises Unavailable."""
        try:
            await asyncio.to_thread(incoming.write, data)
        except OSError as exc:
            raise _unavailable(exc) from None

    async def settle(self, incoming: Incoming, name: str, media_type: str) -> Stored:
        """Make it durable. Add its row, or discard it, and then call forget(). Raises Unavailable."""
        try:
            digest = await asyncio.to_thread(incoming.finish)
        except OSError as exc:
            raise _unavailable(exc) from None
        return Stored(
            id=incoming.path.name,
            name=safe_name(name),
            media_type=media_type if _MEDIA_TYPE.fullmatch(media_type) else _UNKNOWN,
            bytes=incoming.bytes,
            sha256=digest,
        )

    def forget(self, ids: Collection[str]) -> None:
        """They have rows now, or are gone."""
        self._writing.difference_update(ids)

    def discard(self, incoming: Incoming) -> None:
        """Remove what is not wanted, soon; nobody waits for the disk."""

        def remove() -> None:
            incoming.give_up()
            self._writing.discard(incoming.path.name)

        asyncio.get_running_loop().run_in_executor(None, remove)

    async def take(self, apart: Apart, shown: Sequence[Json], fds: Sequence[int]) -> list[Stored]:
        """Copy what descriptors of an adapter hold; all or nothing. They stay the caller's.

        Raises Refused if one is no such file as was said, Unavailable.
        """
        stored: list[Stored] = []
        incoming: Incoming | None = None
        try:
            for file, fd in zip(shown, fds, strict=True):
                incoming = self.begin()
                try:
                    async with asyncio.timeout(limits.FILE_COPY_S):
                        await apart.run(_Copy(fd, file["bytes"], incoming))
                except TimeoutError:
                    raise Refused(f"files: '{file['name'][:80]}' cannot be read in time") from None
                except OSError as exc:
                    raise _unavailable(exc) from None
                stored.append(await self.settle(incoming, file["name"], file["mediaType"]))
            return stored
        except BaseException:
            if incoming is not None:
                self.discard(incoming)
            await self.drop(stored)
            raise

    async def drop(self, stored: Sequence[Stored]) -> None:
        """Remove files that have got no row after all."""
        ids = [file.id for file in stored]
        if ids:
            await asyncio.to_thread(_remove, ids)
        self.forget(ids)

    # --- going -------------------------------------------------------------------------------------

    def open(self, file: Row) -> int:
        """Return a descriptor for reading, which the caller closes. Raises NotFound."""
        try:
            return os.open(paths.files() / file["id"], os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as exc:  # e.g. the database is a backup
            raise NotFound(f"the file '{file['name']}' is gone: {exc.strerror}") from None

    async def read(self, file: Row, offset: int, size: int) -> bytes:
        """Return a part of it. Raises NotFound."""

        def read() -> bytes:
            fd = self.open(file)
            try:
                return os.pread(fd, size, offset)
            finally:
                os.close(fd)

        return await asyncio.to_thread(read)


class _Copy:
    """What is done with a descriptor of somebody else, in a thread that may hang."""

    def __init__(self, fd: int, expected: int, incoming: Incoming) -> None:
        # A copy: if nobody waits any more the caller closes its own, and the number may be another file's.
        self._fd, self._expected, self._incoming = os.dup(fd), expected, incoming

    def __call__(self) -> None:
        try:
            self._copy()
        finally:
            os.close(self._fd)

    def _copy(self) -> None:
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            raise Refused("files: a descriptor is none of a regular file")
        if flags & os.O_PATH or flags & os.O_ACCMODE == os.O_WRONLY:
            raise Refused("files: a descriptor is not open for reading")
        # Never more than was said, and is allowed, whatever becomes of the file meanwhile.
        offset = 0
        while offset <= self._expected:
            data = os.pread(self._fd, min(_CHUNK_BYTES, self._expected + 1 - offset), offset)
            if not data:
                break
            offset += len(data)
            if offset <= self._expected:
                self._incoming.write(data)
        if offset != self._expected:
            raise Refused(f"files: one is not {self._expected} bytes long, as was said")


def add_rows(
    tx: Transaction,
    stored: Sequence[Stored],
    *,
    agent: str,
    key: str | None = None,
    event: dict[str, Any] | None = None,
    kept_until: int = 0,
) -> None:
    """Note what files go with: a delivery, or the key of an event. Raises Refused if that is too much."""
    about = event or dict.fromkeys(("channel", "chat", "thread", "event", "revision"))
    check_room(tx.all("count_files", agent=agent)[0], sum(file.bytes for file in stored))
    for number, file in enumerate(stored):
        tx.all(
            "add_file",
            id=file.id,
            agent=agent,
            number=number,
            name=file.name,
            media_type=file.media_type,
            bytes=file.bytes,
            sha256=file.sha256,
            kept_until=kept_until,
            key=key,
            **about,
        )


def choose_files(shown: Sequence[Json], count: Row, *, held: bool) -> tuple[list[int], list[str]]:
    """Return which files of a message are taken, by number, and a line for its text about each other one.

    `count` is of count_files; `held`: it waits until somebody has answered. Raises Refused.
    """
    chosen: list[int] = []
    notes: list[str] = []
    size = 0
    for number, file in enumerate(shown):
        if file["bytes"] < 0:
            raise Refused("files: bytes must not be negative")
        problem = ""
        if file["bytes"] > limits.FILE_BYTES:
            problem = f"it is larger than {limits.FILE_BYTES >> 20} MiB"
        elif held and count["held"] + size + file["bytes"] > limits.FILES_HELD_BYTES:
            problem = "too much waits for an answer"
        else:
            try:
                check_room(count, size + file["bytes"])
            except Refused as exc:
                problem = exc.message
        if problem:
            notes.append(f"[The file '{safe_name(file['name'])}' did not come along: {problem}.]")
        else:
            chosen.append(number)
            size += file["bytes"]
    return chosen, notes


def check_room(count: Row, size: int) -> None:
    """Raise Refused if `size` bytes more are too much beside what count_files found."""
    if count["of_agent"] + size > limits.FILES_PER_AGENT_BYTES:
        raise Refused(
            f"the files of this agent are {count['of_agent'] >> 20} MiB already",
            hint="they go with their messages, see retention_days in nanoclaw.toml(5)",
        )
    if count["total"] + size > limits.FILES_BYTES:
        raise Refused(
            f"all files together are {count['total'] >> 20} MiB already",
            hint="they go with their messages, see retention_days in nanoclaw.toml(5)",
        )


def safe_name(name: str) -> str:
    """Return a name that is no path, hides nothing and fits everywhere."""
    line = "".join(c if c.isprintable() and c not in '/\\:*?"<>|' else "_" for c in name).strip(" .")
    if len(line.encode()) > limits.FILE_NAME_BYTES:
        stem, dot, suffix = line.rpartition(".")
        end = dot + suffix if stem and len(suffix.encode()) <= _SUFFIX_BYTES else ""
        room = limits.FILE_NAME_BYTES - len(end.encode())
        line = line.encode()[:room].decode(errors="ignore").rstrip(" .") + end
    return line or "file"


_SUFFIX_BYTES = 16


def _remove(ids: Collection[str]) -> None:
    for id in ids:
        with suppress(OSError):
            (paths.files() / id).unlink()


def _unavailable(exc: OSError) -> Unavailable:
    full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
    hint = f"make room: 'df -h {paths.files()}' shows how much there is" if full else ""
    return Unavailable(f"a file cannot be stored: {exc.strerror}", hint=hint)
