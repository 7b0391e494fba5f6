"""TOML files of people: checked key by key, changed so that comments and order stay."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import tomli_w

from nanoclawd.errors import ConfigError

T = TypeVar("T")
Rows = Mapping[str, Callable[[Any], Any]]  #: for each key what makes its value, or raises BadValue
_HEAD = re.compile(r"\s*(\[\[?)([^]]+)\]")
_ASSIGNMENT = re.compile(r"\s*([^=#[]+)=")
KEY_PARTS = 32
#: A dotted key with more parts. No file of ours needs two, and tomllib takes 20 s for 30,000.
_LONG_KEY = re.compile(
    rf"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){{{KEY_PARTS}}}"""
)


class BadValue(Exception):
    """A value is not what its key takes; the reason reads on from the key, as in "must be a string"."""

    def __init__(self, reason: str, hint: str = "", *, secret: bool = False) -> None:
        super().__init__(reason)
        self.hint = hint
        self.secret = secret  #: the error must not show the value


class _BadKey(Exception):
    def __init__(self, key: str, reason: str, hint: str) -> None:
        self.key, self.reason, self.hint = key, reason, hint


# --- checking ---------------------------------------------------------------------------------------


def parse(text: str, rows: Rows, name: str) -> dict[str, Any]:
    """Return what `rows` make of TOML text, by key. Raises ConfigError with file, line and key."""
    return check(load(text, name), rows, name, text)


def load(text: str, name: str) -> dict[str, Any]:
    """Return the table that TOML text is. Raises ConfigError with file and line."""
    hint = "the format is TOML: key = value"
    if long := _LONG_KEY.search(text):
        where = f"{name}:{text.count(chr(10), 0, long.start()) + 1}"
        raise ConfigError(f"{where}: a key has more than {KEY_PARTS} parts", hint=hint)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        reason, _, place = str(exc).rpartition(" (at ")
        line = re.match(r"line ([0-9]+)", place)
        where = f"{name}:{line[1] if line else text.count(chr(10)) + 1}"
        raise ConfigError(f"{where}: is not TOML: {reason or exc}", hint=hint) from None
    except (RecursionError, ValueError) as exc:  # nested too deeply; a number of 5,000 digits
        raise ConfigError(f"{name}: is not TOML that can be read: {exc}", hint="remove that line") from None


def check(table: Mapping[str, Any], rows: Rows, name: str, text: str = "") -> dict[str, Any]:
    """Return what `rows` make of a table, whose `text` tells lines. Raises ConfigError as parse() does."""
    try:
        return _check(table, rows)
    except _BadKey as exc:
        line = _line(text, exc.key)
        raise ConfigError(f"{name}{f':{line}' if line else ''}: {exc.reason}", hint=exc.hint) from None


def _check(table: Mapping[str, Any], rows: Rows, prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for part, value in table.items():
        key = f"{prefix}{part}"
        if key in rows:
            values[key] = _value(key, rows[key], value)
        elif any(known.startswith(f"{key}.") for known in rows):
            values |= _check(_value(key, _table, value), rows, f"{key}.")
        else:
            close = difflib.get_close_matches(key, rows, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"the keys are {', '.join(rows)}"
            raise _BadKey(key, f"there is no key {_shown(key)}", hint)
    return values


def _value(key: str, make: Callable[[Any], T], value: Any) -> T:
    try:
        return make(value)
    except BadValue as exc:
        what = "" if exc.secret else f": {_shown(value)}"
        raise _BadKey(key, f"{key} {exc}{what}", exc.hint) from None
    except _BadKey as exc:  # in a table of an array
        raise _BadKey(f"{key}.{exc.key}", f"{key}: {exc.reason}", exc.hint) from None


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadValue("must be a table", "write its name as [NAME], and its keys below")
    return value


def _line(text: str, key: str) -> int:
    """Return the line of `key`, else of the table that it would be in, else 0. tomllib tells none."""
    key, table, around = _plain(key), "", 0
    tables: Counter[str] = Counter()
    for number, line in enumerate(text.split("\n"), 1):
        if head := _HEAD.match(line):
            table = _plain(head[2])
            if head[1] == "[[":
                tables[table] += 1
                table = f"{table}.{tables[table] - 1}"
            found = table
        elif assignment := _ASSIGNMENT.match(line):
            found = _plain(f"{table}.{assignment[1]}" if table else assignment[1])
        else:
            continue
        if f"{found}.".startswith(f"{key}."):
            return number
        if key.startswith(f"{found}."):
            around = number
    return around


def _plain(key: str) -> str:
    return re.sub(r"""["'\s]""", "", key)


def _shown(value: Any) -> str:
    match value:
        case bool():
            text = str(value).lower()
        case int() if value.bit_length() > 64:  # Python refuses to print a really long one
            text = "a number of more than 64 bits"
        case str() if value.isprintable():
            text = f"'{value}'"
        case _:
            try:
                text = repr(value)
            except RecursionError:
                text = "something nested too deeply"
    return text if len(text) <= 80 else text[:79] + "…"


# --- values -----------------------------------------------------------------------------------------


def line_of_text(
    max_characters: int, pattern: str = ".*", reason: str = "", hint: str = ""
) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if not isinstance(value, str):
            raise BadValue("must be a string", 'write it in quotes: "…"')
        if len(value) > max_characters:
            raise BadValue(f"is longer than {max_characters} characters")
        if not value.isprintable():
            raise BadValue("has a line break or another control character", "use one line of text")
        if not re.fullmatch(pattern, value, re.ASCII):
            raise BadValue(reason, hint)
        return value

    return parse


def whole_number(lowest: int, highest: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool):  # True is an int to Python
            raise BadValue("must be a whole number", "write it without quotes")
        if not lowest <= value <= highest:
            raise BadValue(f"must be from {lowest} to {highest}", "remove it for the default")
        return value

    return parse


def true_or_false(value: Any) -> bool:
    if not isinstance(value, bool):
        raise BadValue("must be true or false", "write it without quotes")
    return value


def table(
    make: Callable[..., T], rows: Rows, *, required: Iterable[str] = (), hint: str
) -> Callable[[Any], T]:
    """Return what makes a value of one table, made of the values of `rows`. `make` may raise BadValue."""

    def parse(value: Any) -> T:
        if not isinstance(value, dict):
            raise BadValue("must be a table", hint)
        values = _check(value, rows)
        for key in required:
            if key not in values:
                raise _BadKey(key, f"{key} is missing", f"add {key} = …")
        return make(**values)

    return parse


def tables(
    make: Callable[..., T], rows: Rows, *, required: Iterable[str], max_count: int, hint: str
) -> Callable[[Any], tuple[T, ...]]:
    """Return what makes a tuple of an array of tables, each made as by table()."""
    make_one = table(make, rows, required=required, hint=hint)

    def parse(value: Any) -> tuple[T, ...]:
        if not isinstance(value, list) or not all(isinstance(table, dict) for table in value):
            raise BadValue("must be tables", hint)
        made = []
        for nth, each in enumerate(value):
            try:
                if nth >= max_count:
                    raise _BadKey("", f"there are more than {max_count}", "remove one")
                made.append(make_one(each))
            except _BadKey as exc:
                raise _BadKey(f"{nth}.{exc.key}", exc.reason, exc.hint) from None
            except BadValue as exc:  # of the table as a whole
                raise _BadKey(str(nth), f"it {exc}", exc.hint) from None
        return tuple(made)

    return parse


def by_name(
    make: Callable[[Any], T], check: Callable[[Any], str], *, max_count: int
) -> Callable[[Any], dict[str, T]]:
    """Return what makes a mapping of a table, whose keys are names and no keys of ours."""

    def parse(value: Any) -> dict[str, T]:
        if len(_table(value)) > max_count:
            raise BadValue(f"has more than {max_count} rows", "remove some")
        made = {}
        for name, each in value.items():
            try:
                checked = check(name)
                made[checked] = make(each)
            except _BadKey as exc:
                raise _BadKey(f"{name}.{exc.key}", f"{_shown(name)}: {exc.reason}", exc.hint) from None
            except BadValue as exc:
                raise _BadKey(name, f"{_shown(name)} {exc}", exc.hint) from None
        return made

    return parse


# --- changing ---------------------------------------------------------------------------------------


def change(text: str, changes: Mapping[str, Any]) -> str:
    """Return the TOML text with top-level keys set to new values; a list of dicts becomes [[key]] tables.

    The result always says exactly what was asked for; where the text is written in a way that we cannot
    edit, its comments are lost. Raises tomllib.TOMLDecodeError if `text` is not TOML.
    """
    wanted = tomllib.loads(text) | dict(changes)
    new = text
    for key, value in changes.items():
        inline = re.search(rf"^\s*{re.escape(key)}\s*=", new, re.MULTILINE)
        set_value = _set_tables if isinstance(value, list) and not inline else _set
        new = set_value(new, key, value)
    return new if _loads_or_none(new) == wanted else tomli_w.dumps(wanted)


def change_table(text: str, key: str, changes: Mapping[str, Any]) -> str:
    """Return the TOML text with keys of the table [key] set to new values, or taken out (None).

    As change() does, of which it has the errors.
    """
    wanted = tomllib.loads(text)
    table = wanted.get(key, {}) | changes
    wanted[key] = table = {part: value for part, value in table.items() if value is not None}
    # From [key] up to the next line that begins with a bracket.
    block = re.search(rf"^[ \t]*\[\s*{re.escape(key)}\s*\].*\n?((?:(?![ \t]*\[).*\n?)*)", text, re.MULTILINE)
    if block is None:
        new = f"{text.rstrip()}\n\n[{key}]\n{tomli_w.dumps(table)}".lstrip()
    else:
        body = block[1].rstrip() + "\n"
        for part, value in changes.items():
            if value is None:
                body = re.sub(rf"^[ \t]*{re.escape(part)}[ \t]*=.*\n", "", body, flags=re.MULTILINE)
            else:
                body = _set(body, part, value)
        rest = text[block.end() :]
        new = text[: block.start(1)] + body + ("\n" if rest else "") + rest
    return new if _loads_or_none(new) == wanted else tomli_w.dumps(wanted)


def _set(text: str, key: str, value: Any) -> str:
    """Return the TOML text with one top-level key changed in place, or added below the others."""
    assignment = tomli_w.dumps({key: value}).rstrip("\n")
    lines = text.splitlines(keepends=True)
    head = next((i for i, line in enumerate(lines) if line.lstrip().startswith("[")), len(lines))
    for first in range(head):
        if not re.match(rf"""\s*["']?{re.escape(key)}["']?\s*=""", lines[first]):
            continue
        for last in range(first, head):  # a value may go over several lines
            old = "".join(lines[first : last + 1])
            if _loads_or_none(old) is not None:
                lines[first : last + 1] = [assignment + _comment(old) + "\n"]
                return "".join(lines)
    if head < len(lines):  # above the comment that belongs to the first table, and the empty lines before it
        while head and lines[head - 1].lstrip().startswith("#"):
            head -= 1
        while head and not lines[head - 1].strip():
            head -= 1
    if head and not lines[head - 1].endswith("\n"):
        lines[head - 1] += "\n"
    return "".join([*lines[:head], assignment + "\n", *lines[head:]])


def _comment(assignment: str) -> str:
    """Return the comment at the end of `key = value  # comment`, with the space before it."""
    for found in re.finditer(r"\s*#", assignment):
        # The first sign that is not within the value: what stands before it is complete.
        if _loads_or_none(assignment[: found.start()]) is not None:
            return assignment[found.start() :].rstrip("\r\n")
    return ""


def _set_tables(text: str, key: str, tables: list[Any]) -> str:
    """Return the TOML text with all [[key]] tables replaced; what stays or is changed keeps its comments."""
    # From each [[key]], with the comment right above it, up to the next line that begins with a bracket. In
    # bounds, for a file of nothing but comments.
    comments = r"(?:^[ \t]*#.*\n){0,20}+"
    block = rf"{comments}^[ \t]*\[\[\s*{re.escape(key)}\s*\]\].*\n?(?:(?!{comments}[ \t]*\[).*\n?)*"
    rest = re.sub(block, "", text, flags=re.MULTILINE).rstrip()
    blocks = (found[0] for found in re.finditer(block, text, re.MULTILINE))
    old = [(values[key][0], found) for found in blocks if (values := _loads_or_none(found))]

    def render(table: Any) -> str:
        for values, found in old:
            if values == table:
                return found
        gone = (each for each in old if each[0] not in tables)
        like = max(gone, key=lambda each: sum(table.get(k) == v for k, v in each[0].items()), default=None)
        changed = _change_table(like[1], like[0], table) if like else ""
        return (
            changed if _loads_or_none(changed) == {key: [table]} else f"[[{key}]]\n" + tomli_w.dumps(table)
        )

    return "\n\n".join(part.rstrip() for part in (rest, *map(render, tables)) if part) + "\n"


def _change_table(block: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return the text of one [[table]] with its keys made those of `new`, as far as that is easy."""
    start = re.compile(r"^[ \t]*\[\[.*\n?", re.MULTILINE).search(block)
    assert start is not None
    body = block[start.end() :].rstrip() + "\n"
    for key in old.keys() - new.keys():
        body = re.sub(rf"^[ \t]*{re.escape(key)}[ \t]*=.*\n", "", body, flags=re.MULTILINE)
    for key, value in new.items():
        if key not in old or old[key] != value:
            body = _set(body, key, value)
    return block[: start.end()] + body


def _loads_or_none(text: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None
