"""A credential that an endpoint sends back is covered before an agent sees it. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable


class Redactor:
    """Covers secrets in a stream with asterisks, as many as it has bytes, also where two pieces meet."""

    def __init__(self, secrets: Iterable[bytes]) -> None:
        # The longest first: a secret may be the beginning of another.
        found = sorted({secret.lower() for secret in secrets if secret}, key=len, reverse=True)
        self._secrets = found
        self._pattern = re.compile(b"|".join(map(re.escape, found)), re.IGNORECASE)
        self._held = b""

    @property
    def has_secrets(self) -> bool:
        return bool(self._secrets)

    def holds(self, data: bytes) -> bool:
        """Say whether there is a secret in `data`, in whatever case."""
        lower = data.lower()
        return any(secret in lower for secret in self._secrets)

    def feed(self, data: bytes) -> bytes:
        """Return what can be passed on; what may be the beginning of a secret waits for more."""
        if not self._secrets:
            return data
        data = self._held + data
        if self.holds(data):  # many times as fast as the pattern, which seldom finds anything
            data = self._pattern.sub(lambda found: b"*" * len(found[0]), data)
        tail = data[1 - len(self._secrets[0]) :].lower() if len(self._secrets[0]) > 1 else b""
        begins = (n for n in range(len(tail)) if any(s.startswith(tail[n:]) for s in self._secrets))
        keep = len(tail) - next(begins, len(tail))
        data, self._held = data[: len(data) - keep], data[len(data) - keep :]
        return data

    def end(self) -> bytes:
        """Return what waited."""
        held, self._held = self._held, b""
        return held
