"""The files of SQLite, read without it: frames of the log, pages, rows.

For what SQLite refuses to read, or leaves out in silence. Nothing here trusts what it reads.
Source: sqlite.org/fileformat2.html.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Value = int | float | str | bytes | None

PAGE_BYTES = 4096  #: SQLite's default, for a header that does not tell
TABLE_LEAF = 13
OTHER_PAGES = (
    0,
    2,
    10,
    5,
)  #: first bytes: free or overflow, an index's inner page and leaf, a table's inner
FREE_LIST = 32  #: where page 1 has the number of its first page
INTEGER_BYTES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}  #: by serial type


# --- the log ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """One page in the log."""

    page: int
    data: bytes
    pages: int  #: at the end of a transaction: how many the database then has; else 0
    current: bool  #: written since the log was last begun anew
    sound: bool  #: and its checksum follows from that of the frame before


class Log:
    """The write-ahead log of the database `path`; it need not exist."""

    def __init__(self, path: Path) -> None:
        self._path = path.with_name(f"{path.name}-wal")
        try:
            with self._path.open("rb") as file:
                header = file.read(32)
        except FileNotFoundError:
            header = b""
        self._order = ">" if header[3:4] == b"\x83" else "<"
        self._header = header
        self._sound = header[:3] == b"\x37\x7f\x06" and self._sum(bytes(8), header[:24]) == header[24:]

    def is_empty(self) -> bool:
        """Say whether it holds nothing, as after a router that ended in good order."""
        return not self._header

    def _sum(self, before: bytes, data: bytes) -> bytes:
        a, b = struct.unpack(">2I", before)
        words = struct.unpack(f"{self._order}{len(data) // 4}I", data)
        for x, y in zip(words[::2], words[1::2], strict=True):
            a = a + x + b & 0xFFFFFFFF
            b = b + y + a & 0xFFFFFFFF
        return struct.pack(">2I", a, b)

    def frames(self) -> Iterator[Frame]:
        """Yield all whole frames; those after an unsound one are checked by what it says its checksum is."""
        if len(self._header) < 32:
            return
        size = int.from_bytes(self._header[8:12], "big") if self._sound else PAGE_BYTES
        salts, before = self._header[16:24], self._header[24:]
        with self._path.open("rb") as file:
            file.seek(32)
            while len(head := file.read(24)) == 24 and len(data := file.read(size)) == size:
                if not self._sound and file.tell() == 56 + size:
                    salts = head[8:16]
                page, pages = struct.unpack_from(">2I", head)
                current = head[8:16] == salts
                sound = current and self._sum(before, head[:8] + data) == head[16:]
                before = head[16:]
                yield Frame(page=page, data=data, pages=pages, current=current, sound=sound)

    def is_damaged(self) -> bool:
        """Say whether it holds transactions that SQLite will leave out, though they were acknowledged.

        SQLite reads up to the first frame that is not sound. A power cut may leave one, in a transaction
        that was under way; then no other follows. Damage to the last transaction looks the same.
        """
        if not self._sound:
            return any(True for _ in self.frames())
        broken = ended = False
        for frame in self.frames():
            if ended and frame.sound:
                return True
            broken = broken or not frame.sound
            ended = ended or (broken and frame.current and frame.pages > 0)
        return False


# --- pages and rows ---------------------------------------------------------------------------------


def read_pages(path: Path) -> dict[int, bytes]:
    """Return the pages of a database by number, as its log has left them."""
    data = path.read_bytes()
    size = int.from_bytes(data[16:18], "big")
    if size < 512 or size & size - 1:
        size = PAGE_BYTES
    pages = {1 + at // size: data[at : at + size].ljust(size, b"\0") for at in range(0, len(data), size)}
    newer: dict[int, bytes] = {}
    for frame in Log(path).frames():
        if frame.current:  # also if not sound: with a bit wrong it is still newer
            newer[frame.page] = frame.data
        if frame.sound and frame.pages:
            pages |= newer
            newer.clear()
    return pages


def read_rows(pages: Mapping[int, bytes]) -> Iterator[tuple[int, list[Value]] | None]:
    """Yield rowid and values of each row of each table, and None for what is a row or more and unreadable.

    The first column of a table with INTEGER PRIMARY KEY is None: its value is the rowid.
    """
    free = _free_pages(pages)
    for number, page in sorted(pages.items()):
        header = 100 if number == 1 else 0
        if number in free or page[header] in OTHER_PAGES:
            continue
        if page[header] != TABLE_LEAF:
            yield None
            continue
        (cells,) = struct.unpack_from(">H", page, header + 3)
        for at in range(header + 8, min(header + 8 + 2 * cells, len(page) - 1), 2):
            try:
                yield _read_row(pages, page, *struct.unpack_from(">H", page, at))
            except (IndexError, KeyError, ValueError, struct.error):
                yield None


def _free_pages(pages: Mapping[int, bytes]) -> set[int]:
    """Return the pages that belong to no table: what they hold was deleted, or is elsewhere by now."""
    free: set[int] = set()
    trunk = int.from_bytes(pages.get(1, b"")[FREE_LIST : FREE_LIST + 4], "big")
    while trunk in pages and trunk not in free:
        following, leaves = struct.unpack_from(">2I", pages[trunk])
        if 8 + 4 * leaves > len(pages[trunk]):
            break
        free |= {trunk, *struct.unpack_from(f">{leaves}I", pages[trunk], 8)}
        trunk = following
    return free


def _read_row(pages: Mapping[int, bytes], page: bytes, at: int) -> tuple[int, list[Value]]:
    length, at = _varint(page, at)
    rowid, at = _varint(page, at)
    payload = _payload(pages, page, at, length)
    end, at = _varint(payload, 0)
    body, values = end, list[Value]()
    while at < end:
        kind, at = _varint(payload, at)
        if kind in (10, 11):
            raise ValueError("no such type")
        size = (kind - 12) // 2 if kind >= 12 else 8 if kind == 7 else INTEGER_BYTES.get(kind, 0)
        data = payload[body : body + size]
        body += size
        if kind == 0:
            values.append(None)
        elif kind >= 12:
            values.append(data.decode(errors="replace") if kind % 2 else data)
        elif kind == 7:
            values.append(*struct.unpack(">d", data))
        else:
            values.append(kind - 8 if kind in (8, 9) else int.from_bytes(data, "big", signed=True))
    if body != length:
        raise ValueError("the values do not fill the row")
    return rowid - (1 << 64) if rowid >> 63 else rowid, values


def _payload(pages: Mapping[int, bytes], page: bytes, at: int, length: int) -> bytes:
    """Return a row's bytes: those in its page, and those in the pages that it runs over to."""
    room = len(page)
    if length <= room - 35:
        return page[at : at + length]
    least = (room - 12) * 32 // 255 - 23
    here = least + (length - least) % (room - 4)
    if here > room - 35:
        here = least
    parts, rest = [page[at : at + here]], length - here
    following = int.from_bytes(page[at + here : at + here + 4], "big")
    for _ in pages:
        if rest <= 0:
            break
        parts.append(pages[following][4 : 4 + rest])
        rest -= len(parts[-1])
        following = int.from_bytes(pages[following][:4], "big")
    return b"".join(parts)


def _varint(data: Sequence[int], at: int) -> tuple[int, int]:
    """Return a number of up to 9 bytes, and where it ends."""
    value = 0
    for place in range(at, at + 8):
        value = value << 7 | data[place] & 0x7F
        if data[place] < 0x80:
            return value, place + 1
    return value << 8 | data[at + 8], at + 9
