"""Log lines on standard error: the unit's journal stream takes the priority (man 3 sd-daemon)."""

from __future__ import annotations

import sys


def _log(priority: int, event: str, fields: dict[str, object]) -> None:
    text = " ".join([event, *(f"{name}={_shown(value)}" for name, value in fields.items())])
    print(f"<{priority}>{text}", file=sys.stderr, flush=True)


def _shown(value: object) -> str:
    text = " ".join(str(value).split())[:300]
    return repr(text) if " " in text else text


def error(event: str, **fields: object) -> None:
    _log(3, event, fields)


def warning(event: str, **fields: object) -> None:
    _log(4, event, fields)


def info(event: str, **fields: object) -> None:
    _log(6, event, fields)


def debug(event: str, **fields: object) -> None:
    _log(7, event, fields)
