"""Backups: made by the router while it runs, put back while it does not."""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from pathlib import Path

from nanoclawd import files, paths
from nanoclawd.cli import control, output
from nanoclawd.cli.doctor import ask
from nanoclawd.errors import Refused

_UNITS = ("nanoclaw.service", "nanoclaw.socket", "nanoclaw-channel.socket")


def backup(options: Namespace) -> None:
    target = Path(options.FILE)
    # The router may write into its own directory only.
    made = Path(control.call("Backup")["file"])
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with made.open("rb") as source, open(descriptor, "wb") as copy:
                shutil.copyfileobj(source, copy)
                copy.flush()
                os.fsync(descriptor)
            files.sync_directory(target.parent)
        except OSError:
            target.unlink()
            raise
    except FileExistsError:
        raise Refused(f"there is a file '{target}' already", hint="choose another name") from None
    except OSError as exc:
        raise files.failed(target, "cannot be written", exc) from None
    finally:
        made.unlink(missing_ok=True)
    output.done(options, {"file": str(target)}, f"The database is in '{target}'.")


def restore(options: Namespace) -> None:
    from nanoclawd import recovery  # and with it what only the router needs

    start = f"systemctl --user start {' '.join(reversed(_UNITS))}"
    if ask("systemctl", "--user", "is-active", "--quiet", *_UNITS)[0] == 0:
        # A socket counts: a call would start the router in the midst of it.
        raise Refused(
            "the router runs, or its sockets wait", hint=f"first: systemctl --user stop {' '.join(_UNITS)}"
        )
    found = recovery.restore(Path(options.FILE), paths.state() / "nanoclaw.db")
    output.done(options, {"restored": found}, f"Restored: {found}. Now: {start}")
