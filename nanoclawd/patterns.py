"""Patterns of messages that an agent listens for: the part of regular expressions that is matched in linear
time.

A pattern is alternatives between `|`. Each is a row of pieces with `.*` between some of them, which stands
for any text. A piece is made of characters, classes as in `[a-z]`, `\\d`, `\\w`, `\\s` or `.`, each of
which takes one character, and of `^`, `$`, `\\b`, `\\B`. There is nothing else: no groups, no counts, no
`+`. So a piece has one length, the first place where it fits is the best, and nothing is ever tried again:
what matching costs is bounded by the length of the text times that of the pattern, whoever wrote either.
"""

from __future__ import annotations

import re
from functools import lru_cache

from nanoclawd import limits
from nanoclawd.errors import Refused

_TOKEN = re.compile(r"\\.|\[\^?(?:\\.|[^\\\]])+\]|\.\*|.", re.DOTALL)
_HINT = r"use characters, [a-z], \d, \w, \s, ., \b, ^, $, .* for any text, and | between alternatives"
#: Messages that have nothing in common: what fits all of them fits any.
_PROBES = ("a " * 200, "7," * 200, "Ж?" * 200, "日本" * 200)


def check_pattern(pattern: str) -> str:
    """Return `pattern` if it is one that means something. Raises Refused."""
    if not 0 < len(pattern) <= limits.PATTERN_CHARACTERS:
        raise Refused(f"the pattern must have 1 to {limits.PATTERN_CHARACTERS} characters", hint=_HINT)
    if all(matches(pattern, probe) for probe in _PROBES):
        hint = "name something in each alternative, or have the agent hear every message"
        raise Refused(f"the pattern '{pattern[:80]}' fits any message", hint=hint)
    return pattern


def matches(pattern: str, text: str) -> bool:
    """Return whether a pattern fits somewhere into the beginning of `text`, in any case. Raises Refused."""
    return _compile(pattern).match(text, 0, limits.PATTERN_TEXT_CHARACTERS) is not None


@lru_cache(maxsize=256)
def _compile(pattern: str) -> re.Pattern[str]:
    """Return an equivalent that never goes back: each piece is looked for once, behind the one before.

    Atomic groups, which Python has from 3.11 on, do it: `(?>.*?piece)` gives nothing back of what it took.
    """
    alternatives = [[""]]
    for token in _TOKEN.findall(pattern):
        if token == "|":
            alternatives.append([""])
        elif token == ".*":
            alternatives[-1].append("")
        else:
            alternatives[-1][-1] += _checked(token, pattern)
    rows = (map(r"(?>(?s:.*?){})".format, filter(None, pieces)) for pieces in alternatives)
    try:
        return re.compile("|".join(map("".join, rows)), re.IGNORECASE)
    except re.error as exc:  # a class that is none, e.g. [z-a]
        raise Refused(f"the pattern '{pattern[:80]}' is wrong: {exc.msg}", hint=_HINT) from None


def _checked(token: str, pattern: str) -> str:
    """Return the expression for one character, class or assertion. Raises Refused."""
    escapes = re.findall(r"\\(.)", token, re.DOTALL)
    if token in ("^", "$", "."):
        return token
    if token[0] == "[" and len(token) > 1:
        # Set operations may come to Python's classes: it warns of what would change.
        inside = re.sub(r"\\.", "", token[1:-1], flags=re.DOTALL)
        known = "[" not in inside and not re.search(r"--|&&|~~|\|\|", inside)
        if known and all(letter in "dDwWsS" or not letter.isalnum() for letter in escapes):
            return token
    elif escapes:
        if escapes[0] in "dDwWsSbB" or not escapes[0].isalnum():
            return token
    elif token not in r"*+?{}()[]\\":
        return re.escape(token)
    hint = f"write \\{token}" if len(token) == 1 and token != "\\" else ""
    raise Refused(
        f"the pattern '{pattern[:80]}' has '{token}', which patterns here do not know",
        hint=f"{_HINT}; {hint} for the character itself" if hint else _HINT,
    )
