"""The errors that we expect: one small tree, each with a stable code.

    NanoclawError
    ├─ ConfigError   bad-config    somebody must edit a file
    ├─ NotFound      not-found
    ├─ Refused       refused       policy or a limit said no; do not retry as it is
    ├─ Unavailable   unavailable   systemd, Podman or the daemon is away; retry later
    └─ Failed        failed        it was tried and did not work

The code is also the `--json` field and the journal field; the class's name is the Varlink error.
Anything that is not in this tree is a bug: it stops the program, and systemd restarts it.
"""

from __future__ import annotations


class NanoclawError(Exception):
    """Something expected went wrong: what happened and where, and in `hint` what to do."""

    code = "error"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(NanoclawError):
    """A file that a person wrote is wrong; the message names file, line or key."""

    code = "bad-config"


class NotFound(NanoclawError):
    """There is no such thing."""

    code = "not-found"


class Refused(NanoclawError):
    """Policy or a limit said no."""

    code = "refused"


class Unavailable(NanoclawError):
    """Something that we need is away at this moment."""

    code = "unavailable"


class Failed(NanoclawError):
    """It was tried, and it did not work."""

    code = "failed"
