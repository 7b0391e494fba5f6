"""The account's own cross-signing keys: who verifies the account once needs not look at its device again.

nio knows nothing of them. Specification: "Cross-signing".
"""

from __future__ import annotations

import base64
import json
import logging
import secrets
from typing import Any

from Crypto.PublicKey import ECC
from Crypto.Signature import eddsa
from nio import Api

from nanoclaw_matrix.homeserver import Homeserver, Refused
from nanoclaw_matrix.settings import Settings, read_credential
from nanoclaw_matrix.store import Store

USAGES = ("master", "self_signing", "user_signing")

Json = dict[str, Any]
log = logging.getLogger("cross-signing")


class CrossSigning:
    """Three keys, of which the master vouches for the others, and one of these for our device."""

    def __init__(self, client: Homeserver, store: Store, settings: Settings) -> None:
        self._client, self._store, self._settings = client, store, settings
        self.master: str | None = None  #: the public key, once the homeserver has it

    async def ensure(self) -> None:
        """Make and upload the keys, unless the account has some. Raises Away."""
        user, device = self._client.user_id, self._client.device_id
        if self._client.should_upload_keys:
            await self._client.keys_upload()
        answer = await self._client.fetch(
            "POST", "/_matrix/client/v3/keys/query", {"device_keys": {user: []}}
        )
        theirs = ((answer.get("master_keys") or {}).get(user) or {}).get("keys") or {}
        saved = self._store.get("cross-signing")
        seeds = json.loads(saved) if saved else {usage: secrets.token_hex(32) for usage in USAGES}
        keys = {usage: _Key(seeds[usage]) for usage in USAGES}
        master = keys["master"]
        if theirs and f"ed25519:{master.public}" not in theirs:
            log.warning("the account was cross-signed by another client, which has to vouch for this device")
            return
        if not theirs:
            self._store.put("cross-signing", json.dumps(seeds))
            if not await self._upload(keys):
                return
        self.master = master.public
        ours = ((answer.get("device_keys") or {}).get(user) or {}).get(device)
        if not isinstance(ours, dict):
            return
        signer = keys["self_signing"]
        if f"ed25519:{signer.public}" in ((ours.get("signatures") or {}).get(user) or {}):
            return
        body = {name: value for name, value in ours.items() if name not in ("signatures", "unsigned")}
        signed = {**body, "signatures": {user: {f"ed25519:{signer.public}": signer.sign(body)}}}
        try:
            await self._client.fetch(
                "POST", "/_matrix/client/v3/keys/signatures/upload", {user: {device: signed}}
            )
        except Refused as exc:
            log.warning("the device could not be signed: %s", exc)

    async def _upload(self, keys: dict[str, _Key]) -> bool:
        user = self._client.user_id
        body: Json = {}
        for usage, key in keys.items():
            described: Json = {
                "user_id": user,
                "usage": [usage],
                "keys": {f"ed25519:{key.public}": key.public},
            }
            if usage != "master":
                signature = keys["master"].sign(described)
                described["signatures"] = {user: {f"ed25519:{keys['master'].public}": signature}}
            body[f"{usage}_key"] = described
        path = "/_matrix/client/v3/keys/device_signing/upload"
        try:
            await self._client.fetch("POST", path, body)
        except Refused as exc:
            session = exc.body.get("session")
            if exc.status != 401 or session is None or self._settings.token:
                log.warning("this homeserver does not let the account be cross-signed: %s", exc)
                return False
            # It wants the password again.
            identifier = {"type": "m.id.user", "user": user}
            auth = {"type": "m.login.password", "identifier": identifier, "password": read_credential()}
            try:
                await self._client.fetch("POST", path, {**body, "auth": {**auth, "session": session}})
            except Refused as again:
                log.warning("the account could not be cross-signed: %s", again)
                return False
        return True


class _Key:
    """An Ed25519 key, from its seed as hex."""

    def __init__(self, seed: str) -> None:
        self._key = ECC.construct(curve="Ed25519", seed=bytes.fromhex(seed))
        raw = self._key.public_key().export_key(format="raw")
        self.public = base64.b64encode(raw).decode().rstrip("=")

    def sign(self, body: Json) -> str:
        """Return the signature of an object, without its signatures."""
        signature = eddsa.new(self._key, "rfc8032").sign(Api.to_canonical_json(body).encode())
        return base64.b64encode(signature).decode().rstrip("=")
