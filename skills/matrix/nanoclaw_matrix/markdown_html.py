"""HTML of a message as Markdown; pure. What is no known tag is left out, its text stays."""

from __future__ import annotations

import re
from html.parser import HTMLParser

DEPTH = 32  #: lists and quotations in each other; deeper ones are not told apart
MARKS = {"strong": "**", "b": "**", "em": "*", "i": "*", "del": "~~", "s": "~~", "strike": "~~"}
BLOCKS = {"p", "div", "table", "ul", "ol", "blockquote", "pre", "hr", "h1", "h2", "h3", "h4", "h5", "h6"}
#: Links to accounts and rooms, which clients show as a name in a frame.
PILL = re.compile(r"https://matrix\.to/#/([@!#][^?/]+)")


def markdown_of(html: str) -> str:
    """Return the HTML of a message as Markdown, without the quotation of what it answers."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    return reader.text()


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._out: list[str] = []
        self._lists: list[int] = []  # of each list that is open: the number of its next item; 0: no numbers
        self._links: list[str] = []
        self._quoted: list[int] = []  # where in _out each quotation began
        self._pre = False
        self._skip = 0  # inside the quotation of what is answered

    def text(self) -> str:
        """Return what was read."""
        while self._quoted:
            self.handle_endtag("blockquote")
        return re.sub(r"\n{3,}", "\n\n", "".join(self._out)).strip("\n")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "mx-reply":
            self._skip += 1
        if self._skip:
            return
        values = {name: value or "" for name, value in attrs}
        if tag in BLOCKS and not (self._lists and tag in ("ul", "ol", "p")):
            self._out.append("\n\n")
        if tag in MARKS:
            self._out.append(MARKS[tag])
        elif tag == "br":
            self._out.append("\n")
        elif tag == "hr":
            self._out.append("---\n\n")
        elif tag[0] == "h" and tag[1:].isdigit():
            self._out.append("#" * min(int(tag[1:]), 6) + " ")
        elif tag in ("ul", "ol") and len(self._lists) < DEPTH:
            start = values.get("start", "1")
            self._lists.append((int(start) if start[:9].isdigit() else 1) if tag == "ol" else 0)
        elif tag == "li":
            self._out.append("\n" + "   " * max(0, len(self._lists) - 1) + self._bullet())
        elif tag == "blockquote" and len(self._quoted) < DEPTH:
            self._quoted.append(len(self._out))
        elif tag == "pre":
            self._pre = True
            self._out.append("```")
        elif tag == "code":
            language = values.get("class", "").removeprefix("language-")
            known = re.fullmatch(r"[\w+#.-]{0,40}", language) is not None
            self._out.append((language if known else "") + "\n" if self._pre else "`")
        elif tag == "a":
            self._links.append(values.get("href", ""))
            if not PILL.match(self._links[-1]):
                self._out.append("[")
        elif tag == "img":
            self._out.append(values.get("alt", ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "mx-reply":
            self._skip = max(0, self._skip - 1)
            return
        if self._skip:
            return
        if tag in MARKS:
            self._out.append(MARKS[tag])
        elif tag in ("ul", "ol") and self._lists:
            self._lists.pop()
        elif tag == "blockquote" and self._quoted:
            began = self._quoted.pop()
            inner = re.sub(r"\n{3,}", "\n\n", "".join(self._out[began:])).strip("\n")
            self._out[began:] = ["\n".join(f"> {line}".rstrip() for line in inner.split("\n"))]
        elif tag == "pre":
            self._pre = False
            if self._out and not "".join(self._out[-2:]).endswith("\n"):
                self._out.append("\n")
            self._out.append("```")
        elif tag == "code" and not self._pre:
            self._out.append("`")
        elif tag == "a" and self._links:
            href = self._links.pop()
            if not PILL.match(href):
                self._out.append(f"]({href})")
        if tag in BLOCKS and not (self._lists and tag == "p"):
            self._out.append("\n\n")

    def handle_data(self, data: str) -> None:
        if self._skip:
            return
        if not self._pre:
            data = re.sub(r"[ \t\r\n]+", " ", data)
            if not self._out or self._out[-1].endswith("\n"):
                data = data.lstrip(" ")
        elif self._out and self._out[-1] == "```":
            self._out.append("\n")  # <pre> without <code>
        self._out.append(data)

    def _bullet(self) -> str:
        if not self._lists or not self._lists[-1]:
            return "- "
        self._lists[-1] += 1
        return f"{self._lists[-1] - 1}. "
