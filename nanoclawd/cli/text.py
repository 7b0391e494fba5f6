"""Text from agents and chats made safe for a terminal.

An agent must not drive the person's terminal: what a terminal would obey, or what would show something other
than what is there, becomes a visible stand-in.
"""

from __future__ import annotations

import re

# C0 but line feed and tab; DEL; C1, which some terminals obey in UTF-8 too; line separators; what turns the
# reading direction (CVE-2021-42574); tags and others that show nothing; halves of surrogate pairs, which no
# output encoding takes. Joiners (U+200C, U+200D) stay: Persian and emoji need them.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f\x80-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e0fff]"
)
_UNSAFE_JSON = re.compile(_UNSAFE.pattern.replace("\x00-\x08\x0b-\x1f", ""))


def visible(text: str) -> str:
    """Return `text` with every character that a terminal would obey replaced by one that it shows."""
    return _UNSAFE.sub(_stand_in, text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """Return `text` as visible() does, in one line."""
    return visible(" ".join(text.split()))


def visible_json(text: str) -> str:
    """Return the JSON document `text` with the same characters as escapes: it still holds the exact text."""
    return _UNSAFE_JSON.sub(_json_escape, text)


def width(text: str) -> int:
    """Return how many cells of a terminal `text`, one visible() line, takes."""
    if text.isascii():
        return len(text)
    from unicodedata import category, east_asian_width

    return sum(
        0 if category(char) in ("Mn", "Me", "Cf") else 2 if east_asian_width(char) in ("W", "F") else 1
        for char in text
    )


def cut(text: str, cells: int) -> str:
    """Return `text` shortened to at most `cells` cells, with an ellipsis if something is missing."""
    if width(text) <= cells:
        return text
    while text and width(text) > cells - 1:
        text = text[: min(len(text) - 1, cells)]
    return text + "…"


def _stand_in(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x20:
        return chr(0x2400 + code)  # the control pictures: ESC shows as ␛
    return "␡" if code == 0x7F else f"<U+{code:04X}>"


def _json_escape(found: re.Match[str]) -> str:
    units = found[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))
