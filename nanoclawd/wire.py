"""JSON from the other side: decode within bounds, take fields out with their types."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from nanoclawd import limits

Json = dict[str, Any]  #: one JSON object; its values are checked where they are taken out


class WireError(Exception):
    """What came in is not what was agreed; `path` names the field, e.g. 'parameters.text'."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class VarlinkError(Exception):
    """An error reply: its full name and its parameters."""

    def __init__(self, name: str, parameters: Json | None = None) -> None:
        self.name = name
        self.parameters = parameters or {}
        super().__init__(f"{name} {self.parameters}" if self.parameters else name)


def decode(data: bytes) -> Json:
    """Return the JSON object in `data` (strict UTF-8, no NaN, bounded depth) or raise WireError."""
    try:
        # UTF-8 first and strictly: json.loads() of bytes would guess UTF-16 and let surrogates pass.
        text = data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise WireError("message", f"is not UTF-8 at byte {exc.start}") from None
    if _depth(text) > limits.JSON_DEPTH:
        raise WireError("message", f"is nested deeper than {limits.JSON_DEPTH} levels")
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except ValueError as exc:  # also what int() says of 5,000 digits
        raise WireError("message", f"is not JSON: {exc}") from None
    if not isinstance(value, dict):
        raise WireError("message", "is not a JSON object")
    return value


def encode(value: Json) -> bytes:
    """Return `value` as compact UTF-8 JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")


def _depth(text: str) -> int:
    """Return an upper bound of the nesting; brackets in strings count too, which only makes us stricter."""
    if text.count("[") + text.count("{") <= limits.JSON_DEPTH:
        return 0
    deepest = level = 0
    in_string = escaped = False
    for char in text:
        if in_string:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == '"':
                in_string = False
        elif char == '"':
            in_string = True
        elif char in "[{":
            level += 1
            deepest = max(deepest, level)
        elif char in "]}":
            level -= 1
    return deepest


def unpack(reply: Json) -> Json:
    """Return a reply's parameters, or raise the VarlinkError that it is."""
    parameters: Any = reply.get("parameters")
    if not isinstance(parameters, dict):
        parameters = {}
    if "error" in reply:
        raise VarlinkError(str(reply["error"]), parameters)
    return dict(parameters)
