"""A credential that an endpoint sends back is covered before an agent sees it. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable


class Redactor:
    """Covers secrets in a stream with asterisks, as many as it has bytes, also where two pieces meet."""

    def __init__(self, secrets: Iterable[bytes]) -> None:
        # The longest first: a secret may be the beginning of another.
        self._secrets = sorted(set(filter(None, secrets)), key=len, reverse=True)
        self._pattern = re.compile(b"|".join(map(re.escape, self._secrets)), re.IGNORECASE)
        self._held = b""

    @property
    def has_secrets(self) -> bool:
        return bool(self._secrets)

    def holds(self, data: bytes) -> bool:
        """Say whether there is a secret in `data`, in whatever case."""
        return bool(self._secrets and self._pattern.search(data))

    def feed(self, data: bytes) -> bytes:
        """Return what can be passed on; what may be the beginning of a secret waits for more."""
        if not self._secrets:
            return data
        data = self._cover(self._held + data)
        longest = min(len(self._secrets[0]) - 1, len(data))
        keep = next((n for n in range(longest, 0, -1) if self._is_beginning(data[-n:])), 0)
        data, self._held = data[: len(data) - keep], data[len(data) - keep :]
        return data

    def end(self) -> bytes:
        """Return what waited."""
        held, self._held = self._held, b""
        return held

    def _cover(self, data: bytes) -> bytes:
        return self._pattern.sub(lambda found: b"*" * len(found[0]), data)

    def _is_beginning(self, data: bytes) -> bool:
        return any(secret[: len(data)].lower() == data.lower() for secret in self._secrets)
