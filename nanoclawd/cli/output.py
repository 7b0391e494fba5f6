"""What nanoclawctl prints: results on stdout, talk on stderr, colours only for a terminal."""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TextIO

from nanoclawd.cli import text
from nanoclawd.cli.parser import UsageError
from nanoclawd.errors import NanoclawError, Refused
from nanoclawd.wire import Json

#: Where a value is in a document, as in "runtime.state"; or what makes it of the document.
Field = str | Callable[[Json], object]
Fields = Mapping[str, Field]
RED, YELLOW, GREEN, BOLD, DIM = "31", "33", "32", "1", "2"


def colour(code: str, words: str, stream: TextIO | None = None) -> str:
    """Return `words` in colour if `stream` (stdout) is a terminal that wants it. Source: no-color.org."""
    stream = stream or sys.stdout
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") in (None, "", "dumb") or not stream.isatty():
        return words
    return f"\x1b[{code}m{words}\x1b[0m"


def say(words: str) -> None:
    """Print a result."""
    print(text.visible(words))


def talk(words: str) -> None:
    """Tell the person something that is not the result."""
    print(text.visible(words), file=sys.stderr, flush=True)


def say_json(document: Any) -> None:
    """Print the one document that --json promises."""
    print(_document(document))


def say_error(error: NanoclawError, *, as_json: bool) -> None:
    """Print an error on stderr, where it does not mix with results; with --json as one document."""
    if as_json:
        fields = {"code": error.code, "message": error.message, "hint": error.hint}
        print(_document({"error": fields}), file=sys.stderr)
        return
    print(f"{colour(RED, 'error:', sys.stderr)} {text.visible(error.message)}", file=sys.stderr)
    if error.hint:
        print(f"{colour(BOLD, 'hint:', sys.stderr)} {text.visible(error.hint)}", file=sys.stderr)


def say_table(documents: Iterable[Json], columns: Fields) -> None:
    """Print a line for each document under the names of the columns, each as wide as it needs."""
    cells = ([str(_look(field, document)) for field in columns.values()] for document in documents)
    lines = [[*columns], *([text.one_line(cell) or "-" for cell in row] for row in cells)]
    widths = [max(text.width(line[column]) for line in lines) for column in range(len(columns))]
    for number, line in enumerate(lines):
        padded = (cell + " " * (size - text.width(cell)) for cell, size in zip(line, widths, strict=True))
        shown = "  ".join(padded).rstrip()
        print(shown if number else colour(BOLD, shown))


def say_list(options: Namespace, name: str, documents: list[Json], columns: Fields, empty: str) -> None:
    """Print documents as a table, with --json as one document; say `empty` if there is none."""
    if options.json:
        return say_json({name: documents})
    if not documents:
        return talk(empty)
    say_table(documents, columns)


def say_document(document: Json) -> None:
    """Print what a document has, a field a line, by the names of the interface: "endedAt" is "Ended at"."""
    for key, value in document.items():
        if isinstance(value, dict):
            say_document(value)
        elif value not in (None, "", []) and value is not False:
            name = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in key)
            say_field(name[:1].upper() + name[1:], _plain(key, value))


def _plain(key: str, value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(", ".join(f"{k} {_plain(k, v)}" for k, v in item.items()) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return when(value) if key.endswith(("At", "Before")) else str(value)


def say_field(name: str, value: object, mark: str = "", code: str = "") -> None:
    """Print one line under a name; `mark` stands before the value, in the colour `code`."""
    print(
        f"{name + ':' if name else '':<17}",
        *([colour(code, mark)] if mark else []),
        text.visible(str(value)),
    )


def _look(field: Field, document: Any) -> object:
    if not isinstance(field, str):
        return field(document)
    for key in field.split("."):
        document = (document or {}).get(key)
    return "" if document is None else _plain(field, document)


def done(options: Namespace, document: Any, words: str) -> None:
    """Tell that something was done: in talk, or with --json by the document."""
    if options.json:
        say_json(document)
    elif words:
        talk(words)


def require_person() -> None:
    """Raise UsageError if nobody can be asked: on stderr, with the answer from stdin."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError("nobody can be asked here", hint="say --yes if you are sure")


def confirm(question: str) -> None:
    """Ask before something is removed. Raises Refused unless the answer is yes, UsageError."""
    require_person()
    print(f"{text.visible(question)} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Refused("nothing was removed")


def size(count: int | None) -> str:
    """Return a number of bytes as people write it, "-" if unknown."""
    if count is None:
        return "-"
    amount, unit = float(count), ""
    for unit in ("B", "K", "M", "G", "T"):
        if amount < 1024 or unit == "T":
            break
        amount /= 1024
    return f"{amount:.0f}{unit}" if unit == "B" or amount >= 100 else f"{amount:.1f}{unit}"


def when(seconds: float) -> str:
    """Return a time since 1970 as the person's clock shows it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def duration(seconds: float) -> str:
    """Return a span of time in its two largest units."""
    left, parts = int(seconds), []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def _document(value: Any) -> str:
    import json

    indent = 2 if sys.stdout.isatty() else None
    return text.visible_json(json.dumps(value, ensure_ascii=False, indent=indent))
