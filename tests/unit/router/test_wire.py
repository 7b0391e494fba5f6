"""What comes in as bytes: JSON within bounds, or WireError; nothing else, whatever the bytes are."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanoclawd import limits, wire
from nanoclawd.wire import WireError, decode, encode

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def nested(levels: int) -> bytes:
    return b'{"a":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'"text"', "not a JSON object"),
        (b"{} {}", "is not JSON"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"a": "\xff"}', "is not UTF-8 at byte 7"),
        (b'{"a": "\xed\xa0\x80"}', "is not UTF-8"),  # half a surrogate pair, as bytes
        (b'{"a": "\\ud800"}', "half a surrogate pair"),
        (b'{"\\uDFFF": 1}', "half a surrogate pair"),
        (b'{"a": "\\ude00\\ud83d"}', "half a surrogate pair"),  # a pair the wrong way round
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8"),
        (b'\xef\xbb\xbf{"a": 1}', "is not JSON"),
        (b'{"a": "\x01"}', "is not JSON"),  # a control character must be escaped
        (nested(limits.JSON_DEPTH + 1), "nested deeper"),
        (b'{"a":' + b"[" * 10_000, "nested deeper"),
        (b'{"a":' + b'{"a":' * 10_000, "nested deeper"),
        (b'{"a":' + b"[" * 100_000, "more than 16384 brackets"),
        (b'{"a":[' + b"[]," * 8191 + b"[]]}", "more than 16384 brackets"),
        (b'{"a":[' + b"{}," * 100_000 + b"[]]}", "more than 16384 brackets"),
    ],
)
def test_what_is_no_message_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        decode(data)


def test_deepest_allowed_nesting_passes() -> None:
    assert decode(nested(limits.JSON_DEPTH))


def test_as_many_brackets_as_are_allowed_pass() -> None:
    text = "[{" * 100_000  # counts for nothing

    assert decode(b'{"a":[' + b"[]," * 8189 + b'[]],"b":"%s"}' % text.encode())["b"] == text


@pytest.mark.parametrize("text", ["[" * 100, '\\"' + "{" * 100, "]" * 50 + "[" * 100, "\\\\"])
def test_brackets_in_strings_are_text(text: str) -> None:
    assert decode(encode({"text": text})) == {"text": text}


def test_surrogate_pair_is_one_character() -> None:
    assert decode(b'{"a": "\\ud83d\\ude00 \\\\ud800"}') == {"a": "\N{GRINNING FACE} \\ud800"}


def test_last_of_duplicate_fields_counts() -> None:
    assert decode(b'{"a": 1, "a": 2}') == {"a": 2}


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.text(), JSON, max_size=5))
def test_what_is_encoded_is_decoded(value: wire.Json) -> None:
    try:
        data = encode(value)
    except ValueError:  # an infinity
        return

    assert b"\0" not in data
    assert decode(data) == value


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.text(), JSON, max_size=5))
def test_ascii_spelling_means_the_same(value: wire.Json) -> None:
    data = json.dumps(value).encode()
    try:
        decoded = decode(data)
    except WireError as exc:
        assert "Infinity" in exc.reason
        return

    assert decoded == value


ALPHABET = st.sampled_from(
    [*'{}[]",:\\u', "\\ud800", "\\u0000", "null", "1", "-", "1e999", "true", "\0", "é", "a"]
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=200) | st.lists(ALPHABET, max_size=60).map(lambda parts: "".join(parts).encode()))
def test_random_bytes_decode_or_are_refused(data: bytes) -> None:
    try:
        value = decode(data)
    except WireError:
        return

    assert isinstance(value, dict)
    try:
        encode(value)  # so that it can be named in a reply
    except ValueError:
        assert any(math.isinf(x) for x in value.values() if isinstance(x, float)) or b"e999" in data


@pytest.mark.parametrize("reply", [{}, {"parameters": None}, {"parameters": []}, {"parameters": "x"}])
def test_reply_without_parameters_is_empty(reply: wire.Json) -> None:
    assert wire.unpack(reply) == {}
