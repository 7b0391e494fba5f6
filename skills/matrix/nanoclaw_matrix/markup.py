"""Text of agents as messages of Matrix: Markdown as HTML, long texts in parts; pure."""

from __future__ import annotations

import re

from markdown_it import MarkdownIt

#: The longest part of a text. An event is 65,536 bytes at most, of which its text is there twice, as HTML
#: too, in JSON, and a third longer where it is encrypted.
PART_BYTES = 12_000

# Raw HTML is shown as it is written, and no picture is loaded from anywhere.
_MARKDOWN = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
_MARKDOWN.disable(["image"])
#: Where a text may be cut, best place first.
_PLACES = (
    re.compile(r"\n\s*\n"),
    re.compile(r"\n"),
    re.compile("(?<=[.!?…])\\s+|(?<=[\u3002\uff01\uff1f])"),  # Chinese and Japanese need no blank
    re.compile(r"\s+"),
)
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})([^\n]*)$", re.MULTILINE)


def html_of(markdown: str) -> str | None:
    """Return a text as HTML; None if it has no markup, so that there is nothing to say with it."""
    html: str = _MARKDOWN.render(markdown).strip()
    plain = html.removeprefix("<p>").removesuffix("</p>")
    return None if "<" not in plain.replace("<br />", "") else html


def clean(text: str) -> str:
    """Return a text without control characters, which clients show in different ways or not at all."""
    return "".join(c for c in text if c in "\n\t" or c >= " ").encode(errors="replace").decode()


def split(text: str, limit: int = PART_BYTES) -> list[str]:
    """Return a text in parts of at most `limit` bytes, cut between paragraphs, else lines, sentences, words.

    A block of code that is cut is closed, and opened again in the next part. The same text is always cut
    alike.
    """
    parts: list[str] = []
    rest = text.strip("\n")
    while len(rest.encode()) > limit:
        room = limit - 64  # for closing a block of code
        end, skip = _cut(rest, room)
        part, rest = rest[:end], rest[skip:]
        fence = _open_fence(part)
        if fence is not None:
            mark, info = fence
            part = f"{part.rstrip()}\n{mark}"
            rest = f"{mark}{info}\n{rest}"
        parts.append(part.rstrip("\n"))
    return [*parts, rest] if rest or not parts else parts


def _cut(text: str, limit: int) -> tuple[int, int]:
    """Return where the first part ends, and where the next begins."""
    window = text.encode()[:limit].decode(errors="ignore")
    for place in _PLACES:
        found = [match for match in place.finditer(window) if match.start() > len(window) // 3]
        if found:
            last = found[-1]
            # A place that ends at the window's end may go on behind it, e.g. more blanks.
            return last.start(), last.end()
    return len(window), len(window)


def _open_fence(part: str) -> tuple[str, str] | None:
    """Return the mark and the language of the block of code that is open at the end of `part`."""
    fence: tuple[str, str] | None = None
    for match in _FENCE.finditer(part):
        mark, info = match[1], match[2].strip()[:30]
        if fence is None:
            fence = (mark[:30], info) if "`" not in info else None
        elif mark[0] == fence[0][0] and len(mark) >= len(fence[0]) and not info:
            fence = None
    return fence
