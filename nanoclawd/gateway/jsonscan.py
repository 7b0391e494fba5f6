"""Picks a few values out of a JSON document that comes in pieces, and keeps nothing else of it. Pure."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection
from typing import Any

Path = tuple[str, ...]  #: keys from the outside in

DEPTH = 2  #: of paths
KEY_BYTES = 64
VALUE_BYTES = 16 << 10  #: of one value; a longer one is not kept
STEPS = 50_000  #: some 50 ms; whoever sends more brackets than that is not looked at any more
_STRING_REST = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_DEEP = re.compile(rb'(?:[^"{}\[\]]++|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)  #: between two brackets
_TOKEN = re.compile(rb'[{}\[\],:"]|[^{}\[\],:"]++')


class Scanner:
    """What is no JSON does no harm: then it finds nothing, or what looks like it."""

    def __init__(self, wanted: Collection[Path]) -> None:
        self.found: dict[Path, Any] = {}
        self._wanted = wanted
        self._depth = 0  #: open brackets
        self._steps = 0
        self._keys: list[str | None] = [None] * (DEPTH + 1)  #: the present key, by depth
        self._string: bytearray | None = None  #: the beginning of a string that is not complete
        self._last = b""  #: of the string before: perhaps a key
        self._is_escaped = False  #: a piece ended behind a backslash
        self._value: bytearray | None = None  #: what came of a value that is wanted
        self._path: Path = ()  #: its path

    def feed(self, data: bytes) -> None:
        position = 0
        while position < len(data) and self._steps < STEPS:
            self._steps += 1
            if self._string is not None:
                position = self._feed_string(data, position, self._string)
                continue
            if self._depth > DEPTH and (found := _DEEP.match(data, position)) and found[0]:
                self._keep(found[0])
                position = found.end()
                continue
            found = _TOKEN.match(data, position)
            assert found is not None  # each byte is in one of the two
            position = found.end()
            self._take(found[0])

    def _feed_string(self, data: bytes, position: int, string: bytearray) -> int:
        """Take what there is of a string; return where it ends."""
        first = position
        if self._is_escaped:
            self._is_escaped = False
            position += 1
        found = _STRING_REST.match(data, position)
        assert found is not None
        position = found.end()
        is_end = data[position : position + 1] == b'"'
        if not is_end and position < len(data):  # a backslash
            self._is_escaped = True
            position += 1
        position += is_end
        if len(string) <= KEY_BYTES:
            string += data[first : min(position, first + KEY_BYTES)]
        self._keep(data[first:position])
        if is_end:
            self._last = bytes(string)
            self._string = None
        return position

    def _take(self, token: bytes) -> None:
        match token:
            case b'"':
                self._string = bytearray(b'"')
                self._keep(token)
            case b":":
                self._keep(token)
                if self._value is None and 1 <= self._depth <= DEPTH:
                    self._begin(self._depth)
            case b",":
                self._end_value(self._depth)
                self._keep(token)
            case b"{" | b"[":
                self._keep(token)
                self._depth += 1
                if self._depth <= DEPTH:
                    self._keys[self._depth] = None
            case b"}" | b"]":
                self._end_value(self._depth)
                self._keep(token)
                self._depth = max(0, self._depth - 1)
            case _:
                self._keep(token)

    def _begin(self, depth: int) -> None:
        """A key has ended: keep its value if it is wanted."""
        self._keys[depth] = _string_of(self._last)
        path = tuple(str(key) for key in self._keys[1 : depth + 1])
        if None not in self._keys[1 : depth + 1] and path in self._wanted:
            self._value, self._path = bytearray(), path

    def _keep(self, piece: bytes) -> None:
        if self._value is not None and len(self._value) <= VALUE_BYTES:
            self._value += piece[: VALUE_BYTES + 1]

    def _end_value(self, depth: int) -> None:
        if self._value is None or len(self._path) != depth:
            return
        if len(self._value) <= VALUE_BYTES:
            with contextlib.suppress(ValueError, RecursionError):
                self.found[self._path] = json.loads(self._value)
        self._value = None


def _string_of(raw: bytes) -> str | None:
    """Return what a key says, which may be escaped."""
    try:
        key = json.loads(raw)
    except ValueError:
        return None
    return key if isinstance(key, str) else None
