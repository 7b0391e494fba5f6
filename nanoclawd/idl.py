"""Varlink interface files: parse them, check parameters against them.

The .varlink file is the contract; checking each call against it means that no handler sees a missing,
unknown or wrongly typed field. Source: https://varlink.org/Interface-Definition.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoclawd import limits
from nanoclawd.wire import Json, WireError, printable


@dataclass(frozen=True, slots=True)
class Type:
    """One type expression: a base type, a named type, a struct or an enum, perhaps nullable or an array."""

    kind: str  #: bool, int, float, string, object, any, name, struct, enum, array, map, maybe
    name: str = ""
    fields: Mapping[str, Type] | None = None
    values: tuple[str, ...] = ()
    inner: Type | None = None


@dataclass(frozen=True, slots=True)
class Method:
    parameters: Type
    reply: Type


@dataclass(frozen=True, kw_only=True, slots=True)
class Interface:
    name: str
    text: str  #: as written, comments included: what introspection shows
    methods: Mapping[str, Method]
    types: Mapping[str, Type]
    errors: Mapping[str, Type]

    def check_parameters(self, method: str, parameters: Json) -> Json:
        """Return `parameters` with absent nullable fields as None, or raise WireError."""
        return _struct(self, self.methods[method].parameters, parameters, "")

    def check_reply(self, method: str, parameters: Json) -> Json:
        """The same for an answer."""
        return _struct(self, self.methods[method].reply, parameters, "")


def read_interface(path: Path) -> Interface:
    """Return the interface that the file `path` holds. Raises ValueError if it is none."""
    return parse_interface(path.read_text(encoding="utf-8"))


_PREFIXES = {"?": "maybe", "[]": "array", "[string]": "map"}
_BASE = ("bool", "int", "float", "string", "object", "any")
_TOKEN = re.compile(r"(?:\s|#[^\n]*+)*+(->|\[string\]|\[\]|[?:,()]|[A-Za-z][A-Za-z0-9._-]*|\Z)")


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.token = ""
        self.advance()

    def advance(self) -> str:
        found = _TOKEN.match(self.text, self.position)
        if found is None:
            line = self.text.count("\n", 0, self.position) + 1
            raise ValueError(f"line {line}: cannot be read")
        before, self.token, self.position = self.token, found[1], found.end()
        return before

    def expect(self, token: str) -> None:
        if self.token != token:
            line = self.text.count("\n", 0, self.position) + 1
            raise ValueError(f"line {line}: {token!r} expected, not {self.token!r}")
        self.advance()

    def type(self) -> Type:
        if self.token in _PREFIXES:
            return Type(_PREFIXES[self.advance()], inner=self.type())
        if self.token == "(":
            return self.struct_or_enum()
        name = self.advance()
        return Type(name) if name in _BASE else Type("name", name=name)

    def struct_or_enum(self) -> Type:
        self.expect("(")
        fields: dict[str, Type] = {}
        values: list[str] = []
        while self.token != ")":
            if not self.token:
                self.expect(")")
            name = self.advance()
            if self.token == ":":
                self.advance()
                fields[name] = self.type()
            else:
                values.append(name)
            if self.token == ",":
                self.advance()
        self.expect(")")
        if values:
            return Type("enum", values=tuple(values))
        return Type("struct", fields=fields)


def parse_interface(text: str) -> Interface:
    """Return the interface described by `text`. Raises ValueError with the line."""
    parser = _Parser(text)
    parser.expect("interface")
    name = parser.advance()
    methods: dict[str, Method] = {}
    types: dict[str, Type] = {}
    errors: dict[str, Type] = {}
    while parser.token:
        keyword, member = parser.advance(), parser.advance()
        if keyword == "method":
            parameters = parser.struct_or_enum()
            parser.expect("->")
            methods[member] = Method(parameters, parser.struct_or_enum())
        elif keyword in ("type", "error"):
            (types if keyword == "type" else errors)[member] = parser.struct_or_enum()
        else:
            raise ValueError(f"'{keyword}' is no keyword of Varlink")
    return Interface(name=name, text=text, methods=methods, types=types, errors=errors)


def _struct(interface: Interface, expected: Type, value: Any, path: str) -> Json:
    _require(isinstance(value, dict), path, "an object", value)
    fields = expected.fields or {}
    for name in value:
        if name not in fields:
            raise WireError(_join(path, name), "is not a known field")
    return {
        name: _check(interface, field, value.get(name), _join(path, name)) for name, field in fields.items()
    }


def _check(interface: Interface, expected: Type, value: Any, path: str) -> Any:
    match expected.kind:
        case "maybe":
            return None if value is None else _check(interface, _inner(expected), value, path)
        case "name":
            return _check(interface, interface.types[expected.name], value, path)
        case "struct":
            return _struct(interface, expected, value, path)
        case "array":
            _require(isinstance(value, list), path, "an array", value)
            _check_size(value, path)
            inner = _inner(expected)
            return [_check(interface, inner, item, f"{path}[{i}]") for i, item in enumerate(value)]
        case "map":
            _require(isinstance(value, dict), path, "an object", value)
            _check_size(value, path)
            inner = _inner(expected)
            return {key: _check(interface, inner, item, _join(path, key)) for key, item in value.items()}
        case "enum":
            if value not in expected.values:
                raise WireError(path, f"must be one of {', '.join(expected.values)}")
        case "string":
            _require(isinstance(value, str), path, "a string", value)
            # JSON can spell what UTF-8 cannot hold and what no C program takes.
            try:
                value.encode()
            except UnicodeEncodeError:
                raise WireError(path, "holds half a surrogate pair") from None
            if "\0" in value:
                raise WireError(path, "holds a NUL")
        case "bool":
            _require(isinstance(value, bool), path, "true or false", value)
        case "int":
            _require(isinstance(value, int) and not isinstance(value, bool), path, "an integer", value)
            if not -(1 << 63) <= value < 1 << 63:
                raise WireError(path, "does not fit into 64 bits")
        case "float":
            _require(
                isinstance(value, (int, float)) and not isinstance(value, bool), path, "a number", value
            )
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            if not math.isfinite(number):  # JSON has no infinity, but 1e999
                raise WireError(path, "is too large")
            return number
        case "object":
            _require(isinstance(value, dict), path, "an object", value)
            _check_free(interface, value, path)
    return value


def _check_free(interface: Interface, value: Any, path: str) -> None:
    """Check what the contract leaves open, by what holds for each kind elsewhere. Raises WireError."""
    match value:
        case dict():
            _check_size(value, path)
            for key, item in value.items():
                _check(interface, Type("string"), key, path)
                _check_free(interface, item, _join(path, key))
        case list():
            _check_size(value, path)
            for number, item in enumerate(value):
                _check_free(interface, item, f"{path}[{number}]")
        case str() | float() | int() if not isinstance(value, bool):
            kind = {str: "string", float: "float", int: "int"}[type(value)]
            _check(interface, Type(kind), value, path)


def _require(is_it: bool, path: str, wanted: str, value: Any) -> None:
    if not is_it:
        raise WireError(path, f"must be {wanted}, not {_kind(value)}")


def _check_size(items: Sized, path: str) -> None:
    """Before each item is looked at: that may cost more than all that was done for the message so far."""
    if len(items) > limits.JSON_ITEMS:
        raise WireError(path, f"has more than {limits.JSON_ITEMS} items")


def _inner(expected: Type) -> Type:
    assert expected.inner is not None
    return expected.inner


def _join(path: str, name: str) -> str:
    name = printable(name[:64])
    return f"{path}.{name}" if path else name


def _kind(value: Any) -> str:
    match value:
        case None:
            return "missing or null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "an array"
    return "an object"
