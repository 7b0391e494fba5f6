"""The secret commands: the value is typed without echo, or comes from a pipe; it is never an argument.

They work on files and systemd's credential service: no secret passes the router, which is told the name.
"""

from __future__ import annotations

import re
import sys
from argparse import Namespace

from nanoclawd import credentials
from nanoclawd.cli import control, output
from nanoclawd.cli.doctor import ask, first_line
from nanoclawd.errors import NanoclawError, Refused, Unavailable
from nanoclawd.ids import parse_credential_name

VALUE_BYTES = 64 << 10  #: read at most; what may be stored is less
_COLUMNS: output.Fields = {
    "SECRET": "name",
    "STORED": lambda secret: secret["warning"] or "encrypted",
    "CHANGED": "modifiedAt",
}


def secret_set(options: Namespace) -> None:
    credentials.never_dump_core()
    set_secret(options.NAME, read_value(f"Value of '{options.NAME}' (not shown): "))
    note(options.NAME, "secret_set")
    output.done(options, {"name": options.NAME}, f"Stored '{options.NAME}'.")


def read_value(prompt: str) -> bytes:
    """Return what is typed without echo, or comes from a pipe."""
    if sys.stdin.isatty():
        from getpass import getpass

        return getpass(prompt).encode()
    return sys.stdin.buffer.read(VALUE_BYTES)


def set_secret(name: str, value: bytes) -> None:
    """Store `value` under `name`; one line end after it is dropped, as `echo` and editors add one.

    Says on stderr if it cannot be encrypted here. Raises Refused, Failed, Unavailable.
    """
    parsed = parse_credential_name(name)
    _require_encryption()
    value = value.removesuffix(b"\n").removesuffix(b"\r")
    if not value.strip():
        raise Refused("the value is empty", hint="give it on stdin, or type it when asked")
    entry = credentials.write(parsed, value)
    if not entry.encrypted:
        output.talk(
            f"warning: '{name}' is {credentials.UNENCRYPTED}: '{entry.path}' (mode 0600) is as safe as "
            "your home directory and its backups"
        )


def _require_encryption() -> None:
    """Raise Unavailable where systemd is new enough to encrypt: nobody asked for a plain file there."""
    if credentials.SERVICE.is_socket():
        return
    _, said = ask("systemctl", "--version")
    found = re.match(r"systemd (\d+)", said)
    if found is None or int(found[1]) >= credentials.SINCE:
        message = f"systemd's credential service, which should encrypt it, is away ({first_line(said)})"
        raise Unavailable(message, hint="as root: systemctl enable --now systemd-creds.socket")


def secret_list(options: Namespace) -> None:
    secrets = [
        {
            "name": entry.name,
            "encrypted": entry.encrypted,
            "path": str(entry.path),
            "modifiedAt": entry.modified_at,
            "warning": "" if entry.encrypted else credentials.UNENCRYPTED,
        }
        for entry in credentials.list_entries()
    ]
    empty = "There are no secrets. Store one: 'nanoclawctl secret set anthropic'."
    output.say_list(options, "secrets", secrets, _COLUMNS, empty)


def secret_remove(options: Namespace) -> None:
    if not options.yes:
        output.confirm(f"Remove the secret '{options.NAME}'?")
    credentials.remove(parse_credential_name(options.NAME))
    note(options.NAME, "secret_removed")
    output.done(options, {"removed": options.NAME}, f"Removed '{options.NAME}'.")


def note(name: str, event: str) -> None:
    """Have the audit trail know; a router that is away is no reason to fail."""
    try:
        control.call("NoteSecret", {"secret": name, "event": event})
    except NanoclawError as exc:
        output.talk(f"warning: the audit trail has no row of this: {exc.message}")
