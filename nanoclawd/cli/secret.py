"""What `nanoclawctl secret` does: set, list and remove credentials.

Works on files and systemd's credential service alone: no secret passes the router.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import UTC, datetime

from nanoclawd import credentials
from nanoclawd.errors import Refused
from nanoclawd.ids import parse_credential_name


@dataclass(frozen=True, kw_only=True, slots=True)
class SecretEntry:
    """One line of `nanoclawctl secret list`; never the value."""

    name: str
    encrypted: bool
    path: str
    modified_at: datetime  #: UTC
    warning: str  #: "" or what is wrong with how it is stored


def set_secret(name: str, value: bytes) -> None:
    """Store `value` under `name`; one line end after it is dropped, as `echo` and editors add one.

    Says on stderr if it cannot be encrypted here. Raises Refused, Failed, Unavailable.
    """
    parsed = parse_credential_name(name)
    value = value.removesuffix(b"\n").removesuffix(b"\r")
    if not value.strip():
        raise Refused("the value is empty", hint="give it on stdin, or type it when asked")
    entry = credentials.write(parsed, value)
    if not entry.encrypted:
        print(
            f"warning: '{name}' is {credentials.UNENCRYPTED}: '{entry.path}' (mode 0600) is as safe as "
            "your home directory and its backups",
            file=sys.stderr,
        )


def list_secrets() -> list[SecretEntry]:
    """Return what is stored, by name. Raises Failed."""
    return [
        SecretEntry(
            name=entry.name,
            encrypted=entry.encrypted,
            path=str(entry.path),
            modified_at=datetime.fromtimestamp(entry.modified_at, UTC),
            warning="" if entry.encrypted else credentials.UNENCRYPTED,
        )
        for entry in credentials.list_entries()
    ]


def remove_secret(name: str) -> None:
    """Delete the credential `name`. Raises Refused, NotFound, Failed."""
    credentials.remove(parse_credential_name(name))
