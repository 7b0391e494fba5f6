"""The API keys in use: decrypted off the event loop, kept until their file changes."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass

from nanoclawd import credentials
from nanoclawd.credentials import Secret
from nanoclawd.errors import ConfigError, NanoclawError, NotFound
from nanoclawd.ids import CredentialName

_HEADER_VALUE = re.compile(rb"[\x21-\x7e]+")


@dataclass(frozen=True, slots=True)
class _Kept:
    stamp: tuple[int, ...] | None
    outcome: Secret | NanoclawError


class Keys:
    """Looks at a key's file at each use, so that a new one counts from the next request on."""

    def __init__(self) -> None:
        self._kept: dict[CredentialName, _Kept] = {}
        self._reading = asyncio.Lock()  # one decryption at a time: who waited finds the result

    async def get(self, name: CredentialName) -> Secret:
        """Return the key `name`. Raises NotFound, ConfigError, Unavailable."""
        kept = self._kept.get(name)
        if kept is None or kept.stamp != credentials.stamp(name):
            async with self._reading:
                kept = await self._read(name)
        if isinstance(kept.outcome, NanoclawError):
            failure = kept.outcome  # a fresh copy: one that is raised again and again grows its traceback
            raise type(failure)(failure.message, hint=failure.hint)
        return kept.outcome

    async def describe(self, name: CredentialName) -> str:
        """Return "ok", or what is wrong with the key, for a person."""
        try:
            await self.get(name)
        except NanoclawError as exc:
            return str(exc)
        return (
            "ok" if credentials.encrypted_path(name).exists() else f"usable, but {credentials.UNENCRYPTED}"
        )

    async def _read(self, name: CredentialName) -> _Kept:
        # The stamp first: a file that is replaced while it is read is read again at the next use.
        stamp = credentials.stamp(name)
        kept = self._kept.get(name)
        if kept is not None and kept.stamp == stamp:
            return kept
        outcome: Secret | NanoclawError
        try:
            secret = await asyncio.to_thread(credentials.read, name)
            if not _HEADER_VALUE.fullmatch(secret.reveal()):
                raise ConfigError(
                    f"the credential '{name}' holds blanks, line ends or other characters that no key has",
                    hint=f"run 'nanoclawctl secret set {name}'",
                )
            outcome = secret
        except (NotFound, ConfigError) as exc:
            outcome = exc  # stays true until the file changes, and costs an agent's next request nothing
        kept = self._kept[name] = _Kept(stamp, outcome)
        return kept
