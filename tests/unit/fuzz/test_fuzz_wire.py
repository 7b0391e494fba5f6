"""Bytes from the other side: a message, or WireError, in bounded time, however they are cut into pieces."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoclawd import limits, wire
from nanoclawd.varlink import Connection
from nanoclawd.wire import Json, WireError
from tests.support.fuzz import VALUES, bounded_time, fuzzed

PIECES = [
    *(
        '{"a":1}',
        "{",
        "}",
        "[",
        "]",
        '"',
        '"a":',
        ",",
        "1",
        "-",
        "1e999",
        "9" * 50,
        "null",
        "true",
        "NaN",
        " ",
    ),
    *(
        "\\",
        "\\u",
        "\\ud83d",
        "\\ude00",
        "\\u0000",
        '\\"',
        "é",
        "\N{GRINNING FACE}",
        "\n",
        "\x01",
        "[]",
        "{},",
    ),
]
BYTES = st.lists(
    st.sampled_from([*(p.encode() for p in PIECES), b"\0", b"\xff", b"\xed\xa0\x80"]) | st.binary(max_size=5)
)
MESSAGES = st.dictionaries(st.text(max_size=5), VALUES, max_size=3)


def decoded(data: bytes) -> Json | None:
    """Return the message, None if it is none; anything but WireError goes on to fail the test."""
    try:
        return wire.decode(data)
    except WireError as exc:
        assert str(exc).isprintable() and len(str(exc)) < 300
        return None


@fuzzed(300)
@given(BYTES.map(b"".join))
def test_any_bytes_are_a_message_or_a_wire_error(data: bytes) -> None:
    message = decoded(data)

    if message is not None:
        assert message == json.loads(data)
        if b"e999" not in data:  # JSON has no infinity, but what means it
            assert decoded(wire.encode(message)) == message


@fuzzed(200)
@given(MESSAGES)
def test_what_any_json_library_writes_is_a_message_or_a_wire_error(value: Json) -> None:
    data = json.dumps(value).encode()

    message = decoded(data)

    if message is not None:
        assert message == json.loads(data)


@fuzzed(150)
@given(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=4), st.lists(st.sampled_from(PIECES), max_size=4)
)
def test_a_megabyte_of_anything_takes_bounded_time(repeated: list[str], begin: list[str]) -> None:
    piece = "".join(repeated).encode()
    data = b'{"a":[' + "".join(begin).encode() + piece * (limits.MESSAGE_BYTES // len(piece))

    for end in (b"", b"]}", b'"]}'):
        with bounded_time():
            decoded(data + end)


def read_all(chunks: Sequence[bytes]) -> list[Json | str]:
    """Return what a connection makes of chunks that come one by one: messages, and the path of an error."""

    async def read() -> list[Json | str]:
        near, far = socket.socketpair()
        connection = Connection(near)
        seen: list[Json | str] = []

        async def collect() -> None:
            try:
                while (message := await connection.read()) is not None:
                    assert len(connection._buffer) <= limits.MESSAGE_BYTES + 65536
                    seen.append(message)
            except WireError as exc:
                seen.append(exc.path)

        reading = asyncio.create_task(collect())
        for chunk in chunks:
            far.sendall(chunk)
            await asyncio.sleep(0)
        far.close()
        await reading
        connection.close()
        return seen

    return asyncio.run(read())


@fuzzed(60)
@given(
    st.lists(
        MESSAGES.map(lambda m: json.dumps(m)[:500].encode() + b"\0") | BYTES.map(b"".join), max_size=4
    ).map(b"".join),
    st.lists(st.integers(0, 2000), max_size=6),
)
def test_the_same_comes_out_however_a_stream_is_cut(data: bytes, cuts: list[int]) -> None:
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "MESSAGE_BYTES", 200)

        pieces = read_all([data[a:b] for a, b in pairwise(edges)])

        assert pieces == read_all([data] if data else [])
