"""The secret commands: the value is typed without echo, or comes from a pipe; it is never an argument."""

from __future__ import annotations

import sys
from argparse import Namespace

from nanoclawd.cli import output
from nanoclawd.cli.parser import UsageError
from nanoclawd.errors import Refused

VALUE_BYTES = 64 << 10  #: read at most; what may be stored is less


def set_(options: Namespace) -> None:
    from nanoclawd.cli import secret

    if sys.stdin.isatty():
        from getpass import getpass

        value = getpass(f"Value of '{options.NAME}' (not shown): ").encode()
    else:
        value = sys.stdin.buffer.read(VALUE_BYTES)
    secret.set_secret(options.NAME, value)
    if options.json:
        output.say_json({"name": options.NAME})
    else:
        output.talk(f"Stored '{options.NAME}'.")


def list_(options: Namespace) -> None:
    from nanoclawd.cli import secret

    entries = secret.list_secrets()
    if options.json:
        secrets = [
            {
                "name": entry.name,
                "encrypted": entry.encrypted,
                "path": entry.path,
                "modifiedAt": entry.modified_at.timestamp(),
                "warning": entry.warning,
            }
            for entry in entries
        ]
        return output.say_json({"secrets": secrets})
    if not entries:
        return output.talk("There are no secrets. Store one: 'nanoclawctl secret set anthropic'.")
    output.say_table(
        ("SECRET", "STORED", "CHANGED"),
        (
            (
                entry.name,
                "encrypted" if entry.encrypted else entry.warning,
                f"{entry.modified_at.astimezone():%Y-%m-%d %H:%M}",
            )
            for entry in entries
        ),
    )


def remove(options: Namespace) -> None:
    from nanoclawd.cli import secret

    if not options.yes:
        if not output.is_interactive():
            raise UsageError("nobody can be asked here", hint="say --yes if you are sure")
        if not output.ask(f"Remove the secret '{options.NAME}'?"):
            raise Refused("nothing was removed")
    secret.remove_secret(options.NAME)
    if options.json:
        output.say_json({"removed": options.NAME})
    else:
        output.talk(f"Removed '{options.NAME}'.")
