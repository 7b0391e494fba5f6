"""Structured lines in the journal: an event name and fields, never content.

Fields begin with NANOCLAWD_ (systemd.journal-fields(7) keeps names without prefix for itself). USER_UNIT=
makes `journalctl --user-unit` show our line among those of the agent's unit. A list is a field with several
values, each of which finds the line.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from systemd import journal as sd_journal

from nanoclawd.wire import printable

ERR, WARNING, INFO, DEBUG = 3, 4, 6, 7  # man 3 syslog
_to_journal = "JOURNAL_STREAM" in os.environ


def error(event: str, text: str = "", **fields: Any) -> None:
    """Somebody must act."""
    _send(ERR, event, text, fields)


def warning(event: str, text: str = "", **fields: Any) -> None:
    """We went on; the text says how."""
    _send(WARNING, event, text, fields)


def info(event: str, text: str = "", **fields: Any) -> None:
    """A life began or ended."""
    _send(INFO, event, text, fields)


def debug(event: str, text: str = "", **fields: Any) -> None:
    _send(DEBUG, event, text, fields)


def _send(priority: int, event: str, text: str, fields: dict[str, Any]) -> None:
    unit = fields.pop("unit", None)
    # What an agent said must look like no line of ours, nor move the cursor.
    text = printable(text)
    values = {
        name: [printable(str(one)) for one in (value if isinstance(value, list) else [value])]
        for name, value in fields.items()
        if value is not None
    }
    shown = " ".join(f"{name}={','.join(several)}" for name, several in values.items())
    line = " ".join(part for part in (f"{event}:" if text or shown else event, text, shown) if part)
    if not _to_journal:  # started by hand: stderr is where a person looks
        print(f"<{priority}>{line}" if not sys.stderr.isatty() else line, file=sys.stderr, flush=True)
        return
    caller = sys._getframe(2)
    # Not send(): that would walk and read the stack, for each line, and cannot repeat a field.
    sd_journal.sendv(
        f"MESSAGE={line}",
        f"CODE_FILE={caller.f_code.co_filename}",
        f"CODE_LINE={caller.f_lineno}",
        f"CODE_FUNC={caller.f_code.co_name}",
        f"PRIORITY={priority}",
        f"SYSLOG_IDENTIFIER={os.path.basename(sys.argv[0])}",
        f"NANOCLAWD_EVENT={event}",
        *([f"USER_UNIT={unit}"] if unit is not None else []),
        *(f"NANOCLAWD_{name.upper()}={one}" for name, several in values.items() for one in several),
    )
