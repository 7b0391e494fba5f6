"""TOML text changed in place, so that a person's comments and order stay."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import Any

import tomli_w


def change(text: str, changes: Mapping[str, Any]) -> str:
    """Return the TOML text with top-level keys set to new values; a list of dicts becomes [[key]] tables.

    The result always says exactly what was asked for; where the text is written in a way that we cannot
    edit, its comments are lost. Raises tomllib.TOMLDecodeError if `text` is not TOML.
    """
    wanted = tomllib.loads(text) | dict(changes)
    new = text
    for key, value in changes.items():
        tables = isinstance(value, list) and all(isinstance(item, dict) for item in value)
        inline = re.search(rf"^\s*{re.escape(key)}\s*=", new, re.MULTILINE)
        new = _set_tables(new, key, value) if tables and not inline else _set_value(new, key, value)
    return new if _loads_or_none(new) == wanted else tomli_w.dumps(wanted)


def _set_value(text: str, key: str, value: Any) -> str:
    """Return the TOML text with one top-level key changed in place, or added below the others."""
    assignment = tomli_w.dumps({key: value}).rstrip("\n")
    lines = text.splitlines(keepends=True)
    head = next((i for i, line in enumerate(lines) if line.lstrip().startswith("[")), len(lines))
    for first in range(head):
        if not re.match(rf"""\s*["']?{re.escape(key)}["']?\s*=""", lines[first]):
            continue
        for last in range(first, head):  # a value may go over several lines
            if _loads_or_none("".join(lines[first : last + 1])) is not None:
                comment = _comment("".join(lines[first : last + 1]))
                lines[first : last + 1] = [assignment + comment + "\n"]
                return "".join(lines)
    if head < len(lines):  # above the comment that belongs to the first table, and the empty lines before it
        while head and lines[head - 1].lstrip().startswith("#"):
            head -= 1
        while head and not lines[head - 1].strip():
            head -= 1
    if head and not lines[head - 1].endswith("\n"):
        lines[head - 1] += "\n"
    lines.insert(head, assignment + "\n")
    return "".join(lines)


def _comment(assignment: str) -> str:
    """Return the comment at the end of `key = value  # comment`, with the space before it."""
    for found in re.finditer(r"\s*#", assignment):
        # The first sign that is not within the value: what stands before it is complete.
        if _loads_or_none(assignment[: found.start()]) is not None:
            return assignment[found.start() :].rstrip("\r\n")
    return ""


def _set_tables(text: str, key: str, tables: list[Any]) -> str:
    """Return the TOML text with all [[key]] tables replaced."""
    kept: list[str] = []
    ours = False
    for line in text.splitlines(keepends=True):
        if line.lstrip().startswith("["):
            ours = re.match(rf"\s*\[\[\s*{re.escape(key)}\s*\]\]", line) is not None
        if not ours:
            kept.append(line)
    rest = "".join(kept).rstrip()
    blocks = (f"[[{key}]]\n" + tomli_w.dumps(table) for table in tables)
    return "\n\n".join(part.rstrip() for part in (rest, *blocks) if part) + "\n"


def _loads_or_none(text: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None
