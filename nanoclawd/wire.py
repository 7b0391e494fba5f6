"""JSON from the other side: decode within bounds, take fields out with their types."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from nanoclawd import limits

Json = dict[str, Any]  #: one JSON object; its values are checked where they are taken out

_HALF = re.compile(r"\\u[dD][89a-fA-F]")  #: may be half a surrogate pair; only an escape can spell one
#: A string, also one without an end, or what else is between brackets.
_BETWEEN = r'(?:"(?:[^"\\]+|\\.)*+"?|[^\[\]{}"]+)'
_NO_BRACKETS = re.compile(_BETWEEN, re.DOTALL)
#: From the beginning of a text up to the first bracket that is one too many.
_TOO_MANY = re.compile(rf"(?:{_BETWEEN}*+[\[\]{{}}]){{{limits.JSON_BRACKETS + 1}}}+", re.DOTALL)


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
    _check_brackets(text)
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except ValueError as exc:  # also what int() says of 5,000 digits
        raise WireError("message", f"is not JSON: {exc}") from None
    if _HALF.search(text):
        # Else it would come to light where we quote it: in an error reply, in the journal.
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise WireError("message", "holds half a surrogate pair") from None
    if not isinstance(value, dict):
        raise WireError("message", "is not a JSON object")
    return value


def encode(value: Json) -> bytes:
    """Return `value` as compact UTF-8 JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def printable(text: str) -> str:
    """Return `text` with escapes for what is not printable: a name from outside that is quoted."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")


def _check_brackets(text: str) -> None:
    """Raise WireError if `text` is nested deeper than JSON_DEPTH levels, or has too many brackets.

    Without a loop over its characters: a megabyte of brackets must not keep all others waiting.
    """
    if text.count("[") + text.count("{") <= limits.JSON_DEPTH:
        return
    if _TOO_MANY.match(text):
        raise WireError("message", f"has more than {limits.JSON_BRACKETS} brackets")
    brackets = _NO_BRACKETS.sub("", text).replace("{", "[").replace("}", "]")
    for _ in range(limits.JSON_DEPTH):
        before = len(brackets)
        brackets = brackets.replace("[]", "")  # the innermost level
        if len(brackets) in (0, before):
            break
    if brackets:  # or they do not match
        raise WireError("message", f"is nested deeper than {limits.JSON_DEPTH} levels")


def unpack(reply: Json) -> Json:
    """Return a reply's parameters, or raise the VarlinkError that it is."""
    parameters: Any = reply.get("parameters")
    if not isinstance(parameters, dict):
        parameters = {}
    if "error" in reply:
        raise VarlinkError(str(reply["error"]), parameters)
    return dict(parameters)
