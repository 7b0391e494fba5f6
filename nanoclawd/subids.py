"""Subordinate uids: which uid of this host an agent's processes have."""

from __future__ import annotations

import getpass
import os
from pathlib import Path

UNKNOWN = -1


def host_uid(container_uid: int) -> int:
    """Return the host's uid for `container_uid` under UserNS=keep-id, or -1 if /etc/subuid does not tell.

    keep-id maps the person's own uid onto itself, and the first subordinate uids onto the others in order:
    podman-run(1), subuid(5).
    """
    person = os.getuid()
    if container_uid == person:
        return person
    offset = container_uid if container_uid < person else container_uid - 1
    for start, count in _ranges():
        if offset < count:
            return start + offset
        offset -= count
    return UNKNOWN


def _ranges() -> list[tuple[int, int]]:
    try:
        text = Path("/etc/subuid").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    names = {getpass.getuser(), str(os.getuid())}
    rows = (line.split(":") for line in text.splitlines())
    return [
        (int(row[1]), int(row[2]))
        for row in rows
        if len(row) == 3 and row[0] in names and row[1].isdigit() and row[2].isdigit()
    ]
