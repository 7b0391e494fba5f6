"""Readiness for systemd (man 3 sd_notify)."""

from __future__ import annotations

import os
import socket


def notify(*lines: str) -> None:
    """Tell systemd, if it listens. Never fails: a unit without readiness is not our reason to stop."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    if path.startswith("@"):
        path = "\0" + path[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto("\n".join(lines).encode(), path)
    except OSError:
        pass
