"""Verification by emoji (SAS): a person begins it in their client, and confirms it on this machine too.

nio 0.26 has an older version of the protocol, which clients of today do not take: without request, ready and
done, not in rooms, and with hashes in another encoding. Specification: "Short Authentication String (SAS)
verification".
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nio
import vodozemac
from nio.crypto import Sas as Emoji

from nanoclaw_matrix.crosssigning import CrossSigning
from nanoclaw_matrix.health import Health
from nanoclaw_matrix.homeserver import Away, Homeserver, Refused
from nanoclaw_matrix.settings import Settings

PREFIX = "m.key.verification."
METHOD = "m.sas.v1"
AGREEMENT = "curve25519-hkdf-sha256"
MACS = ("hkdf-hmac-sha256.v2", "hkdf-hmac-sha256")  #: best first
LIFE_S = 600  #: the specification's limit for all of it
AT_ONCE = 4
LOOK_S = 0.5  #: how often the person's answer is looked for while one is waited for
#: As the specification calls what nio calls otherwise: both sides must read the same.
NAMES = {"Wrench": "Spanner", "Thumbs up": "Thumbs Up", "Airplane": "Aeroplane"}
QUESTION, ANSWER = "verification.json", "verification.answer"  #: files in the adapter's state

Json = dict[str, Any]
log = logging.getLogger("verification")


def describe(index: int) -> str:
    """Return an emoji of the specification's table, with its name."""
    sign, name = Emoji.emoji[index]
    return f"{sign} {NAMES.get(name, name)}"


class _Failed(Exception):
    """It cannot go on; the code is told to the other side."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(slots=True)
class _Verification:
    """One verification, from its request on."""

    id: str  #: the transaction; in a room, the event of the request
    account: str
    device: str
    room: str | None  #: None: by messages between the devices
    began: float
    sas: vodozemac.Sas | None = None
    established: vodozemac.EstablishedSas | None = None
    start: Json | None = None
    mac_method: str = ""
    their_key: str = ""
    emoji: str = ""
    confirmed: bool = False  #: the person said here that the emoji are the same
    mac_sent: bool = False
    checked: bool = False  #: the other side's MAC came and is right


class Verifications:
    """All verifications that run; several, since clients begin again when one fails."""

    def __init__(
        self,
        client: Homeserver,
        signing: CrossSigning,
        settings: Settings,
        health: Health,
        directory: Path,
    ) -> None:
        self._client, self._signing, self._settings, self._health = client, signing, settings, health
        self._directory = directory
        self._running: dict[str, _Verification] = {}
        self._asking = asyncio.Event()
        self._show()

    async def receive(self, event: Json) -> None:
        """Take a message from another device. Raises Away."""
        content = event.get("content")
        if isinstance(content, dict) and isinstance(event.get("sender"), str):
            kind = str(event.get("type", "")).removeprefix(PREFIX)
            await self._receive(kind, event["sender"], str(content.get("transaction_id", "")), content, None)

    async def receive_in_room(self, room: str, source: Json) -> None:
        """Take an event of a room, if it is one of a verification. Raises Away."""
        content = source.get("content")
        if not isinstance(content, dict) or source.get("sender") == self._client.user_id:
            return
        if content.get("msgtype") == f"{PREFIX}request":
            if content.get("to") == self._client.user_id:
                # It has no time of its own, the event has.
                content = {**content, "timestamp": source.get("origin_server_ts")}
                await self._receive("request", source["sender"], source["event_id"], content, room)
        elif str(source.get("type", "")).startswith(PREFIX):
            relation = content.get("m.relates_to")
            id = relation.get("event_id") if isinstance(relation, Mapping) else None
            kind = source["type"].removeprefix(PREFIX)
            await self._receive(kind, source["sender"], str(id), content, room)

    async def _receive(self, kind: str, account: str, id: str, content: Json, room: str | None) -> None:
        self._forget_old()
        if kind == "request":
            await self._begin(account, id, content, room)
            return
        running = self._running.get(id)
        if running is None or running.account != account or running.room != room:
            return
        step = {"start": self._started, "key": self._key_came, "mac": self._mac_came}.get(kind)
        try:
            if step is not None:
                await step(running, content)
            elif kind in ("cancel", "done"):
                # Without its MAC "done" is an empty word.
                if kind == "cancel" or not running.checked:
                    log.info("verification with %s was ended by the other side", account)
                if kind == "cancel":
                    self._end(running)
        except _Failed as exc:
            await self._cancel(running, exc.code, str(exc))
        except Refused as exc:
            log.warning("a verification cannot go on: %s", exc)
            self._end(running)
        except (KeyError, TypeError, ValueError) as exc:
            await self._cancel(running, "m.invalid_message", f"cannot be understood: {exc}")

    async def _begin(self, account: str, id: str, content: Json, room: str | None) -> None:
        device, age_s = content.get("from_device"), time.time() - _number(content.get("timestamp")) / 1000
        if account not in self._settings.verifiers:
            log.warning("%s asked to be verified, and is not named by verifiers=, ignoring", account)
            return
        if not isinstance(device, str) or METHOD not in (content.get("methods") or ()):
            return
        if not -300 < age_s < LIFE_S or len(self._running) >= AT_ONCE or id in self._running:
            return
        self._client.olm.users_for_key_query.add(account)
        await self._client.keys_query()
        if device not in self._client.device_store[account]:
            log.warning("%s asked to be verified from a device that is unknown, ignoring", account)
            return
        running = _Verification(id=id, account=account, device=device, room=room, began=time.monotonic())
        self._running[id] = running
        try:
            await self._send(running, "ready", {"from_device": self._client.device_id, "methods": [METHOD]})
        except Refused as exc:  # e.g. we may not write in that room
            log.warning("a verification cannot begin: %s", exc)
            self._end(running)

    async def _started(self, running: _Verification, content: Json) -> None:
        if running.sas is not None:
            raise _Failed("m.unexpected_message", "it has started already")
        methods = [mac for mac in MACS if mac in content["message_authentication_codes"]]
        if (
            content["method"] != METHOD
            or not methods
            or AGREEMENT not in content["key_agreement_protocols"]
            or "sha256" not in content["hashes"]
            or "emoji" not in content["short_authentication_string"]
        ):
            raise _Failed("m.unknown_method", "no method that both know")
        if content["from_device"] != running.device:
            raise _Failed("m.key_mismatch", "another device has started it")
        running.sas, running.start, running.mac_method = vodozemac.Sas(), content, methods[0]
        committed = running.sas.public_key.to_base64() + nio.Api.to_canonical_json(content)
        await self._send(
            running,
            "accept",
            {
                "method": METHOD,
                "key_agreement_protocol": AGREEMENT,
                "hash": "sha256",
                "message_authentication_code": running.mac_method,
                "short_authentication_string": ["decimal", "emoji"],
                "commitment": base64.b64encode(hashlib.sha256(committed.encode()).digest())
                .decode()
                .rstrip("="),
            },
        )

    async def _key_came(self, running: _Verification, content: Json) -> None:
        if running.sas is None or running.established is not None:
            raise _Failed("m.unexpected_message", "a key was not expected")
        ours = running.sas.public_key.to_base64()
        running.their_key = str(content["key"])
        try:
            theirs = vodozemac.Curve25519PublicKey.from_base64(running.their_key)
            running.established = running.sas.diffie_hellman(theirs)
        except Exception as exc:  # vodozemac has a class of its own for each way to be no key
            raise _Failed("m.invalid_message", "the key is none") from exc
        await self._send(running, "key", {"key": ours})
        sides = (running.account, running.device, running.their_key, *self._us, ours, running.id)
        indices = running.established.bytes("|".join(("MATRIX_KEY_VERIFICATION_SAS", *sides))).emoji_indices
        running.emoji = "  ".join(map(describe, indices))
        log.warning(
            "%s wants to verify this account from device %s and sees: %s",
            running.account,
            running.device,
            running.emoji,
        )
        self._show()

    async def _mac_came(self, running: _Verification, content: Json) -> None:
        if running.established is None or running.checked:
            raise _Failed("m.unexpected_message", "a MAC was not expected")
        macs = content["mac"]
        info = self._mac_info((running.account, running.device), self._us, running.id)
        if content["keys"] != self._mac(running, ",".join(sorted(macs)), info + "KEY_IDS"):
            raise _Failed("m.key_mismatch", "the MAC of the keys' names is wrong")
        known = self._client.device_store[running.account][running.device]
        name = f"ed25519:{running.device}"
        if macs.get(name) != self._mac(running, known.ed25519, info + name):
            raise _Failed("m.key_mismatch", "the MAC of the device's key is wrong")
        running.checked = True
        await self._finish(running)

    async def _finish(self, running: _Verification) -> None:
        """Go on if the person has confirmed: our MAC goes out, and once theirs is here, it is done."""
        if not running.confirmed:
            return
        if not running.mac_sent:
            keys = {f"ed25519:{self._client.device_id}": self._client.olm.account.identity_keys["ed25519"]}
            if self._signing.master is not None:
                keys[f"ed25519:{self._signing.master}"] = self._signing.master
            info = self._mac_info(self._us, (running.account, running.device), running.id)
            macs = {name: self._mac(running, key, info + name) for name, key in keys.items()}
            names = self._mac(running, ",".join(sorted(macs)), info + "KEY_IDS")
            await self._send(running, "mac", {"mac": macs, "keys": names})
            running.mac_sent = True
        if running.checked:
            self._client.verify_device(self._client.device_store[running.account][running.device])
            log.warning("device %s of %s is verified", running.device, running.account)
            await self._send(running, "done", {})
            self._end(running)

    # The person's answer

    async def run(self) -> None:
        """Look for answers while there are questions, for ever."""
        while True:
            await self._asking.wait()
            await asyncio.sleep(LOOK_S)
            self._forget_old()
            try:
                answer = json.loads((self._directory / ANSWER).read_text())
                (self._directory / ANSWER).unlink()
                running = self._running.get(answer["id"])
                if running is None or not running.emoji:
                    continue
                if answer["same"] is True:
                    running.confirmed = True
                    await self._finish(running)
                else:
                    await self._cancel(running, "m.mismatched_sas", "the emoji are not the same")
            except FileNotFoundError:
                continue
            except (ValueError, KeyError, TypeError) as exc:
                log.warning("the answer about a verification cannot be read: %s", exc)
            except (Away, Refused) as exc:
                log.warning("a verification cannot go on: %s", exc)
            self._show()

    def _show(self) -> None:
        """Show what waits for the person."""
        asked = [running for running in self._running.values() if running.emoji and not running.confirmed]
        questions = [
            {"id": running.id, "account": running.account, "device": running.device, "emoji": running.emoji}
            for running in asked
        ]
        path = self._directory / QUESTION
        if not questions:
            path.unlink(missing_ok=True)
            self._asking.clear()
            self._health.tell("")
            return
        path.with_suffix(".new").write_text(json.dumps(questions))
        os.replace(path.with_suffix(".new"), path)
        self._asking.set()
        first = questions[0]
        self._health.tell(f"{first['account']} verifies this account and must see: {first['emoji']}")

    # What both need

    @property
    def _us(self) -> tuple[str, str]:
        return self._client.user_id, self._client.device_id

    def _mac_info(self, sender: tuple[str, str], receiver: tuple[str, str], id: str) -> str:
        return "".join(("MATRIX_KEY_VERIFICATION_MAC", *sender, *receiver, id))

    def _mac(self, running: _Verification, text: str, info: str) -> str:
        established = running.established
        assert established is not None
        if running.mac_method == MACS[0]:
            return str(established.calculate_mac(text, info))
        return str(established.calculate_mac_invalid_base64(text, info))

    async def _send(self, running: _Verification, kind: str, content: Json) -> None:
        if running.room is not None:
            relation = {"rel_type": "m.reference", "event_id": running.id}
            txn = f"verify-{secrets.token_hex(16)}"
            await self._client.put_event(
                running.room, PREFIX + kind, {**content, "m.relates_to": relation}, txn
            )
            return
        messages = {running.account: {running.device: {**content, "transaction_id": running.id}}}
        path = f"/_matrix/client/v3/sendToDevice/{quote(PREFIX + kind)}/{secrets.token_hex(16)}"
        await self._client.fetch("PUT", path, {"messages": messages})

    async def _cancel(self, running: _Verification, code: str, reason: str) -> None:
        log.warning("verification with %s failed: %s", running.account, reason)
        self._end(running)
        try:
            await self._send(running, "cancel", {"code": code, "reason": reason})
        except Refused as exc:
            log.warning("could not say so: %s", exc)

    def _end(self, running: _Verification) -> None:
        self._running.pop(running.id, None)
        self._show()

    def _forget_old(self) -> None:
        for running in list(self._running.values()):
            if time.monotonic() - running.began > LIFE_S:
                self._end(running)


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0
