"""What systemd hears from us: log lines, readiness (man 3 sd_notify)."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from functools import partial


def _log(level: str, event: str, /, **fields: object) -> None:
    # No "<3>" before it: to the journal, all that an agent says is of the same priority.
    text = " ".join([f"{level}: {event}", *(f"{name}={_shown(value)}" for name, value in fields.items())])
    print(text, file=sys.stderr, flush=True)


def _shown(value: object) -> str:
    text = " ".join(str(value).split())[:300]
    return repr(text) if " " in text else text


error, warning, info, debug = (partial(_log, level) for level in ("error", "warning", "info", "debug"))


def notify(*lines: str) -> None:
    """Tell systemd, if it listens. Never fails: a unit without readiness is not our reason to stop."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path.startswith(("/", "@")):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto("\n".join(lines).encode(), path.replace("@", "\0", 1) if path[0] == "@" else path)
