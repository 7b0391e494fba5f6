"""Deleting what RemoveAgent moved to the trash."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from nanoclawd import paths
from nanoclawd.cli import programs
from nanoclawd.errors import Failed, Refused, Unavailable

DELETE_S = 600.0


def purge(directory: Path) -> None:
    """Delete `directory`, which must lie directly in the trash.

    Its files belong to the agent's uid, one of the person's subordinate uids: only podman-unshare(1), where
    that uid is mapped, may remove them. rm(1) follows no symbolic link that an agent left there.
    """
    trash = paths.state() / "trash"
    inside = directory.parent == trash and directory.name not in ("", ".", "..")
    if not inside or trash.is_symlink() or directory.is_symlink():
        raise Refused(f"'{directory}' is not in '{trash}': not deleting it")
    if not os.path.lexists(directory):
        return
    command = ["podman", "unshare", "rm", "-rf", "--", str(directory)]
    try:
        result = programs.run(command, timeout_s=DELETE_S)
        problem = result.stderr.strip() if result.returncode else ""
    except Unavailable as exc:
        problem = exc.message
    if problem or os.path.lexists(directory):
        raise Failed(
            f"the agent is removed, but '{directory}' cannot be deleted: {problem or 'it is still there'}",
            hint=f"try: {shlex.join(command)}",
        )
