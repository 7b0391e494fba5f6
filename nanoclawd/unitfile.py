"""Values in unit files: how text arrives unchanged behind systemd's and Quadlet's own syntax."""

from __future__ import annotations

import re

from nanoclawd.errors import Refused

PLAIN = re.compile(r"[A-Za-z0-9_@+=./-]+", re.ASCII)


def escape_specifiers(text: str) -> str:
    """Return `text` so that systemd finds no specifier in it. Source: systemd.unit(5), "Specifiers"."""
    return text.replace("%", "%%")


def quote_argument(text: str) -> str:
    """Return `text` as one word of a command line in a unit, e.g. for PodmanArgs=.

    Quadlet takes the quotes off and puts its own on, systemd takes those off, expands %x and $NAME, and the
    program gets `text`. Sources: systemd.syntax(7), "Quoting"; systemd.service(5), "Command Lines".
    Raises Refused for control characters, which no name or path of ours needs.
    """
    if not text.isprintable():
        raise Refused(f"a control character cannot stand in a unit: {text[:80]!r}")
    inner = text.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{escape_specifiers(inner)}"'
