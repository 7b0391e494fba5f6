"""What a call uses, read from whatever pieces it comes in; and what counts if it is not told."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoclawd.gateway import jsonscan, usage
from nanoclawd.gateway.jsonscan import Scanner
from nanoclawd.gateway.usage import BYTES_PER_TOKEN, OUTPUT_TOKENS, OUTPUT_TOKENS_PER_S, Meter
from nanoclawd.prices import Tokens
from nanoclawd.routes import UsageShape

REQUEST = json.dumps(
    {"max_tokens": 1000, "messages": [{"role": "user", "content": 'a "b" {}[], \\ c'}], "stream": True}
    | {"model": "m-1"}
).encode()
USED = {"input_tokens": 10, "output_tokens": 500, "cache_creation_input_tokens": 20}
USED |= {"cache_read_input_tokens": 30, "cache_creation": {"ephemeral_1h_input_tokens": 5}}
TOLD = Tokens(10, 500, 20, 30, 5)


def event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\r\ndata: {json.dumps({'type': kind, **fields})}\r\n\r\n".encode()


START = event(
    "message_start", message={"model": "m-1-0", "usage": {**USED, "output_tokens": 1}, "content": []}
)
DELTA = event("content_block_delta", delta={"text": '"usage": {"output_tokens": 9999}} \\" '})
END = event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 500})
STREAM = b": hello\n\n" + START + event("ping") + DELTA * 3 + END + event("message_stop")

PLAIN = json.dumps({"content": [{"usage": {"output_tokens": 7}}], "model": "m-1-0", "usage": USED}).encode()


def pieces(data: bytes, size: int) -> Iterable[bytes]:
    return (data[first : first + size] for first in range(0, len(data), size))


def meter(request: bytes = REQUEST, *, shape: UsageShape = UsageShape.ANTHROPIC) -> Meter:
    made = Meter(shape, size_bytes=len(request))
    for piece in pieces(request, 3):
        made.ask(piece)
    made.sent()
    return made


def of(
    answer: bytes, *, size: int = 1, shape: UsageShape = UsageShape.ANTHROPIC, request: bytes = REQUEST
) -> Any:
    """Return what is read of an answer that comes in pieces of that size."""
    made = meter(request, shape=shape)
    made.answer(200, b"text/event-stream; charset=utf-8" if b"data:" in answer else b"application/json")
    for piece in pieces(answer, size):
        made.feed(piece)
    return made.end()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("answer", [STREAM, PLAIN, STREAM.replace(b"\r\n", b"\n")])
def test_usage_is_read_in_whatever_pieces_it_comes(answer: bytes, size: int) -> None:
    assert of(answer, size=size) == ({"m-1-0": TOLD}, False)


def test_what_shortens_the_conversation_and_advice_of_other_models_count_too() -> None:
    steps = [
        {"type": "compaction", "input_tokens": 7000, "output_tokens": 300},
        {"type": "message", **USED},
        {"type": "advisor_message", "model": "m-9", "input_tokens": 40, "output_tokens": 2},
    ]
    answer = json.dumps({"model": "m-1-0", "usage": {**USED, "iterations": steps}}).encode()

    used, is_estimate = of(answer)

    assert used == {"m-1-0": TOLD + Tokens(7000, 300), "m-9": Tokens(40, 2)} and not is_estimate


def test_fast_mode_is_a_model_of_its_own() -> None:
    assert of(PLAIN.replace(b'"usage": {"input', b'"usage": {"speed": "fast", "input')) == (
        {"fast:m-1-0": TOLD},
        False,
    )


CHAT = {"prompt_tokens": 100, "completion_tokens": 50, "prompt_tokens_details": {"cached_tokens": 40}}
RESPONSES = {"input_tokens": 100, "output_tokens": 50, "input_tokens_details": {"cached_tokens": 40}}


def data(document: object) -> bytes:
    return b"data: %s\n\n" % json.dumps(document).encode()


@pytest.mark.parametrize(
    "answer",
    [
        json.dumps({"model": "g-1", "choices": [{"usage": 3}], "usage": CHAT}).encode(),
        json.dumps({"model": "g-1", "output": [], "usage": RESPONSES}).encode(),
        data({"model": "g-1", "usage": None}) + data({"model": "g-1", "usage": CHAT}) + b"data: [DONE]\n\n",
        data({"type": "response.created", "response": {"model": "g-1", "usage": None}})
        + data(
            {
                "type": "response.completed",
                "response": {"model": "g-1", "output": "x" * 99, "usage": RESPONSES},
            }
        ),
    ],
)
def test_usage_of_the_other_kind_of_endpoint(answer: bytes) -> None:
    assert of(answer, shape=UsageShape.OPENAI) == ({"g-1": Tokens(60, 50, 0, 40)}, False)


# --- what is not told --------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


INPUT = -(-len(REQUEST) // BYTES_PER_TOKEN)


def test_before_it_is_sent_and_when_it_is_refused_nothing_is_used() -> None:
    unsent = Meter(UsageShape.ANTHROPIC, size_bytes=100)
    unsent.ask(REQUEST[:50])
    refused = meter()
    refused.answer(429, b"application/json")

    assert unsent.end() == refused.end() == ({}, False)


def test_a_call_that_breaks_off_counts_what_was_asked_and_what_may_be_answered(clock: list[float]) -> None:
    streamed, whole = meter(), meter(REQUEST.replace(b"true", b"null"))
    clock[0] += 2.5

    assert streamed.end() == ({"m-1": Tokens(INPUT, int(2.5 * OUTPUT_TOKENS_PER_S))}, True)
    assert whole.end() == ({"m-1": Tokens(INPUT, 1000)}, True)  # as much as it asked for
    clock[0] += 60
    assert streamed.end() == ({"m-1": Tokens(INPUT, 1000)}, True)


def test_a_stream_that_breaks_off_knows_its_input(clock: list[float]) -> None:
    made = meter()
    made.answer(200, b"text/event-stream")
    made.feed(START + DELTA)
    clock[0] += 2

    assert made.end() == ({"m-1-0": Tokens(10, 600, 20, 30, 5)}, True)


@pytest.mark.parametrize("answer", [b"{}", b"", b"data: {}\n\ndata: [DONE]\n\n", b'{"usage": {}}'])
def test_an_answer_that_does_not_tell_is_an_estimate(answer: bytes) -> None:
    used, is_estimate = of(answer, shape=UsageShape.OPENAI, request=b'{"x": 1}')

    assert is_estimate and used[usage.UNKNOWN].input == 4


def test_who_names_no_limit_is_expected_to_use_the_most_that_there_is() -> None:
    made = meter(b'{"model": "m-1", "n": 3}')

    assert made.expected() == ("m-1", Tokens(12, 3 * OUTPUT_TOKENS))
    assert Meter(UsageShape.OPENAI, size_bytes=100).expected() == ("", Tokens(50, OUTPUT_TOKENS))


# --- what is hostile -----------------------------------------------------------------------------------

KEYS = st.sampled_from(["usage", "model", "x"]) | st.text(max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner),
    max_leaves=20,
)


@settings(deadline=None)
@given(st.dictionaries(KEYS, JSON), st.integers(1, 9), st.booleans())
def test_a_scanner_finds_what_a_parser_finds(document: dict[str, Any], size: int, ascii: bool) -> None:
    inner = document.get("x")
    expected: dict[tuple[str, ...], Any] = {
        (key,): document[key] for key in ("usage", "model") if key in document
    }
    if isinstance(inner, dict) and "usage" in inner:
        expected["x", "usage"] = inner["usage"]
    scanner = Scanner([("usage",), ("model",), ("x", "usage")])

    for piece in pieces(json.dumps(document, ensure_ascii=ascii).encode(), size):
        scanner.feed(piece)

    assert scanner.found == expected


@settings(deadline=None)
@given(
    st.binary(), st.lists(st.sampled_from([b'"', b"{", b"}", b":", b"\\", b"usage", b"data:", b"\n", b"["]))
)
def test_garbage_harms_nobody(noise: bytes, parts: list[bytes]) -> None:
    for answer in (noise + b"".join(parts), b"data:" + b"".join(parts) + noise):
        of(answer)


def test_memory_is_bounded_whatever_comes() -> None:
    huge = b'{"usage": "' + b"x" * (1 << 20) + b'", "' + b"k" * (1 << 20) + b'": 1' + b"[" * (1 << 16)
    scanner = Scanner([("usage",)])

    for piece in pieces(huge, 4096):
        scanner.feed(piece)

    held = [scanner._value or b"", scanner._string or b"", scanner._last]
    assert sum(map(len, held)) < 2 * jsonscan.VALUE_BYTES and scanner.found == {}
    made = meter()
    made.answer(200, b"text/event-stream")
    for piece in pieces(b"data: " + huge * 3 + b"\n\n" + STREAM, 4096):
        made.feed(piece)
    assert made.end() == ({"m-1-0": TOLD}, False)


@pytest.mark.parametrize("flood", [b'""', b"{}", b"[", b'{"":'])
def test_who_sends_nothing_but_brackets_is_not_looked_at_for_long(flood: bytes) -> None:
    scanner = Scanner([("usage",)])

    scanner.feed(b'{"usage": 1, "x": [' + flood * jsonscan.STEPS)

    assert scanner._steps == jsonscan.STEPS and scanner.found == {("usage",): 1}


def test_numbers_that_are_none_count_as_nothing() -> None:
    answer = json.dumps({"model": 7, "usage": {"input_tokens": -5, "output_tokens": 1 << 70}}).encode()

    _, is_estimate = of(answer)

    assert is_estimate
