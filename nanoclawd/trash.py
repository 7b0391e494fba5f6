"""The trash: what an agent has written, moved out of its way. Only nanoclawctl can delete it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from nanoclawd import files, paths


def move_to_trash(source: Path, name: str) -> Path | None:
    """Move a directory there and return where it is now, None if there was none; nothing in it is opened.

    A name may be used again later. Raises Failed.
    """
    if not source.exists():
        return None
    trash = paths.state() / "trash"
    target = trash / f"{name}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.urandom(2).hex()}"
    try:
        trash.mkdir(mode=0o700, parents=True, exist_ok=True)
        source.rename(target)
    except OSError as exc:
        raise files.failed(source, f"cannot be moved to '{trash}'", exc) from None
    return target
