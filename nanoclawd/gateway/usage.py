"""What a call of a model uses: read from its answer as that passes, or estimated if nothing tells it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from nanoclawd.gateway.jsonscan import Path, Scanner
from nanoclawd.prices import FAST, MODEL_CHARACTERS, NO_TOKENS, Tokens
from nanoclawd.routes import UsageShape
from nanoclawd.wire import printable

# --- what counts where nothing tells it ------------------------------------------------------------
#: Of a request. Texts have three to four bytes a token, so that this is too much rather than too little.
BYTES_PER_TOKEN = 2
#: Of an answer that is streamed: more than models give, so that what they think unseen is in it.
OUTPUT_TOKENS_PER_S = 300
#: Of an answer whose request names no limit: the longest that models give.
OUTPUT_TOKENS = 128_000

UNKNOWN = "(unknown)"  #: a model that nobody names
TOKENS_MAX = 1 << 40  #: in one number of an endpoint
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_ASKED: tuple[Path, ...] = (("model",), ("stream",), ("n",), *((name,) for name in _LIMITS))
_INNER = ("message", "response")  #: where a stream's event has the whole
_ANSWERED: tuple[Path, ...] = (
    *(("usage",), ("model",)),
    *((inner, key) for inner in _INNER for key in ("usage", "model")),
)


class Meter:
    """Watches one call. Sees every byte, keeps next to none."""

    def __init__(self, shape: UsageShape, *, size_bytes: int) -> None:
        """`size_bytes` is how long the request's body can be, at most."""
        self.used: dict[str, Tokens] = {}  #: as told so far, by model; "": the one that answers
        self._shape = shape
        self._size_bytes = size_bytes
        self._asked_bytes = 0
        self._request = Scanner(_ASKED)
        self._answer = Scanner(_ANSWERED)
        self._lines: _Lines | None = None  #: of an answer that is a stream
        self._model = ""  #: that answers
        self._is_fast = False
        self._status = 0
        self._sent_at: float | None = None  #: monotonic; the request is complete
        self._is_told = False  #: all of it

    # --- what passes -------------------------------------------------------------------------------

    def ask(self, data: bytes) -> None:
        """Take a piece of the request's body that is about to be sent."""
        self._request.feed(data)
        self._asked_bytes += len(data)
        if self._asked_bytes >= self._size_bytes:
            self.sent()

    def sent(self) -> None:
        """The request is whole. Before, nobody computes anything."""
        if self._sent_at is None:
            self._size_bytes = self._asked_bytes
            self._sent_at = time.monotonic()

    def answer(self, status: int, content_type: bytes) -> None:
        """Take the head of the answer."""
        self._status = status
        if content_type.startswith(b"text/event-stream"):
            self._lines = _Lines()

    def feed(self, data: bytes) -> None:
        """Take a piece of the answer's body."""
        if self._lines is None:
            self._answer.feed(data)
            return
        for piece in self._lines.split(data):
            if piece:
                self._answer.feed(piece)
            else:
                self._look()
                self._answer = Scanner(_ANSWERED)

    def _look(self) -> None:
        """Take over what the answer, or an event of its stream, has told."""
        found = self._answer.found
        for inner in ((), *((inner,) for inner in _INNER)):
            if isinstance(model := found.get((*inner, "model")), str):
                self._model = model
            if not isinstance(usage := found.get((*inner, "usage")), dict):
                continue
            self._is_fast = self._is_fast or usage.get("speed") == "fast"
            for model, tokens in _read(self._shape, usage).items():
                self.used[model] = self.used.get(model, NO_TOKENS).most(tokens)
                # The first event of a stream of Messages knows only what was asked.
                self._is_told = self._is_told or (inner != ("message",) and tokens.total > 0)

    # --- what is known -----------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether the endpoint may compute something of which it has not told what it costs."""
        return self._sent_at is not None and self._status < 400 and not (self._is_told or self.used)

    def expected(self) -> tuple[str, Tokens]:
        """Return what it may use at most, as far as that is known, and of which model ("": any)."""
        input = Tokens(input=-(-self._size_bytes // BYTES_PER_TOKEN))
        asked = self._asked_model if self._sent_at is not None else ""
        return asked, input + Tokens(output=self._max_output())

    def end(self) -> tuple[dict[str, Tokens], bool]:
        """Return what it has cost, by model, and whether that is an estimate."""
        self._look()  # a stream may end without an empty line, anything else always does
        used, is_estimate = self.used, not self._is_told and self._sent_at is not None and self._status < 400
        if is_estimate:
            known = used.get("", NO_TOKENS)
            if not known.total:
                known = Tokens(input=-(-self._size_bytes // BYTES_PER_TOKEN))
            used = used | {"": known.most(Tokens(output=self._estimate_output()))}
        model = (FAST if self._is_fast else "") + (_shorten(self._model) or self._asked_model or UNKNOWN)
        return {name or model: tokens for name, tokens in used.items()}, is_estimate

    @property
    def _asked_model(self) -> str:
        model = self._request.found.get(("model",))
        return _shorten(model) if isinstance(model, str) else ""

    def _max_output(self) -> int:
        asked = self._request.found
        named = [_number(asked[name,]) for name in _LIMITS if (name,) in asked]
        return (max(named) if self._sent_at and any(named) else OUTPUT_TOKENS) * max(
            1, _number(asked.get(("n",)))
        )

    def _estimate_output(self) -> int:
        assert self._sent_at is not None
        is_stream = self._lines is not None or self._request.found.get(("stream",)) is True
        took_s = time.monotonic() - self._sent_at
        by_time = math.ceil(took_s * OUTPUT_TOKENS_PER_S) if is_stream else OUTPUT_TOKENS
        return min(self._max_output(), by_time)


def _read(shape: UsageShape, usage: Mapping[str, Any]) -> dict[str, Tokens]:
    """Return what the object `usage` of an answer says, by model; "": the one that answers."""
    if shape is UsageShape.OPENAI:
        return {"": _read_openai(usage)}
    # One each time that the endpoint asked a model: for another one's advice, and to shorten the
    # conversation, too, which are not in the sum.
    iterations, steps = usage.get("iterations"), {"": NO_TOKENS}
    for step in iterations if isinstance(iterations, list) else ():
        if isinstance(step, dict):
            model = _shorten(step["model"]) if isinstance(step.get("model"), str) else ""
            steps[model] = steps.get(model, NO_TOKENS) + _read_anthropic(step)
    steps[""] = steps[""].most(_read_anthropic(usage))
    return steps


def _read_anthropic(usage: Mapping[str, Any]) -> Tokens:
    kept = usage.get("cache_creation")
    written = _number(usage.get("cache_creation_input_tokens"))
    return Tokens(
        input=_number(usage.get("input_tokens")),
        output=_number(usage.get("output_tokens")),
        cache_write=written,
        cache_read=_number(usage.get("cache_read_input_tokens")),
        hour_write=_number(kept.get("ephemeral_1h_input_tokens")) if isinstance(kept, dict) else 0,
    )


def _read_openai(usage: Mapping[str, Any]) -> Tokens:
    """Of Chat Completions, or of Responses: there the input has in it what the cache had."""
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    input = _number(usage.get("prompt_tokens")) or _number(usage.get("input_tokens"))
    cached = min(input, _number(details.get("cached_tokens"))) if isinstance(details, dict) else 0
    output = _number(usage.get("completion_tokens")) or _number(usage.get("output_tokens"))
    return Tokens(input=input - cached, output=output, cache_read=cached)


def _number(value: Any) -> int:
    return value if type(value) is int and 0 <= value <= TOKENS_MAX else 0


def _shorten(model: str) -> str:
    return printable(model[:MODEL_CHARACTERS])


class _Lines:
    """The data of a stream of events, in the pieces that come. https://html.spec.whatwg.org/#event-stream-interpretation"""

    _FIELD = b"data:"

    def __init__(self) -> None:
        self._head: bytes | None = b""  #: of the line, until it is known whether it is of data; then None
        self._is_data = False
        self._is_open = False  #: an event has begun

    def split(self, data: bytes) -> list[bytes]:
        """Return pieces of data, and b"" where an event ends of which there were some."""
        pieces: list[bytes] = []
        lines = data.split(b"\n")
        for nth, rest in enumerate(lines):
            if nth:
                if self._head is not None and not self._head.strip(b"\r") and self._is_open:
                    pieces.append(b"")
                    self._is_open = False
                self._head, self._is_data = b"", False
                # Most lines are whole, and tell nothing: no need to look at each closely.
                if nth < len(lines) - 1 and b'"usage"' not in rest and rest.strip(b"\r"):
                    self._head = None
                    continue
            if self._head is not None:
                line = self._head + rest
                if len(line) < len(self._FIELD):
                    self._head = line
                    continue
                self._is_data, self._head = line.startswith(self._FIELD), None
                rest = line[len(self._FIELD) :]
            if self._is_data and rest:
                pieces.append(rest)
                self._is_open = True
        return pieces
