"""The API keys in use: decrypted off the event loop, kept until their file changes."""

from __future__ import annotations

import asyncio
import re

from nanoclawd import credentials
from nanoclawd.credentials import Secret
from nanoclawd.errors import ConfigError, NanoclawError, NotFound
from nanoclawd.ids import CredentialName

_HEADER_VALUE = re.compile(rb"[\x21-\x7e]+")


class Keys:
    """Looks at a key's file at each use, so that a new one counts from the next request on."""

    def __init__(self) -> None:
        #: For each key the stamp of its file, and what came of reading it.
        self._kept: dict[CredentialName, tuple[object, Secret | NotFound | ConfigError]] = {}
        self._reading = asyncio.Lock()  # one decryption at a time: who waited finds the result

    async def get(self, name: CredentialName) -> Secret:
        """Return the key `name`. Raises NotFound, ConfigError, Unavailable."""
        if not self._is_kept(name):
            async with self._reading:
                # The stamp first: a file that is replaced while it is read is read again at the next use.
                stamp = credentials.stamp(name)
                if not self._is_kept(name):
                    self._kept[name] = stamp, await self._read(name)
        outcome = self._kept[name][1]
        if isinstance(outcome, NanoclawError):
            # A fresh copy: one that is raised again and again grows its traceback.
            raise type(outcome)(outcome.message, hint=outcome.hint)
        return outcome

    async def describe(self, name: CredentialName) -> str:
        """Return "ok", or what is wrong with the key, for a person."""
        try:
            await self.get(name)
        except NanoclawError as exc:
            return str(exc)
        encrypted = credentials.encrypted_path(name).exists()
        return "ok" if encrypted else f"usable, but {credentials.UNENCRYPTED}"

    def _is_kept(self, name: CredentialName) -> bool:
        return name in self._kept and self._kept[name][0] == credentials.stamp(name)

    async def _read(self, name: CredentialName) -> Secret | NotFound | ConfigError:
        try:
            secret = await asyncio.to_thread(credentials.read, name)
        except (NotFound, ConfigError) as exc:
            return exc  # stays true until the file changes, and costs an agent's next request nothing
        if _HEADER_VALUE.fullmatch(secret.reveal()):
            return secret
        return ConfigError(
            f"the credential '{name}' holds blanks, line ends or other characters that no key has",
            hint=f"run 'nanoclawctl secret set {name}'",
        )
