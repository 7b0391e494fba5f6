"""Requests to the homeserver, which is not trusted: answers are bounded, and no wait is without end.

nio brings the protocol's state (rooms, devices, keys). It would read answers of any length, and try again
for ever by itself; so its requests go through fetch() instead.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import aiohttp
import nio
from nio.store import SqliteStore
from peewee import SqliteDatabase

Json = dict[str, Any]

ANSWER_BYTES = 32 * 1024 * 1024  #: the longest answer; a first sync is the longest that we ask for
CHUNK_BYTES = 64 * 1024
CONNECT_S = 20
REQUEST_S = 60
TRANSFER_S = 600  #: of a file


class Away(Exception):
    """The homeserver does not answer as it should; try again, not before `retry_after_s`."""

    def __init__(self, text: str, retry_after_s: float = 0.0) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s


class TooLong(Away):
    """An answer is longer than ANSWER_BYTES."""


class Refused(Exception):
    """The homeserver refuses this request, and would again."""

    def __init__(self, status: int, code: str, text: str, body: Json | None = None) -> None:
        super().__init__(f"the homeserver refuses it: {text or code or status}"[:300])
        self.status, self.code, self.body = status, code, body or {}


class LoggedOut(Refused):
    """The access token is none, any more."""


class _DurableStore(SqliteStore):  # type: ignore[misc]  # nio is partly untyped
    """The keys of encryption, written as carefully as the router writes its queue."""

    def _create_database(self) -> SqliteDatabase:
        pragmas = {"foreign_keys": 1, "secure_delete": 1, "journal_mode": "wal", "synchronous": "full"}
        return SqliteDatabase(self.database_path, pragmas=pragmas)


class Homeserver(nio.AsyncClient):  # type: ignore[misc]
    """One account at its homeserver, with its rooms and keys."""

    client_session: aiohttp.ClientSession | None

    def __init__(self, url: str, user: str, directory: Path) -> None:
        config = nio.AsyncClientConfig(
            encryption_enabled=True, store=_DurableStore, store_name="crypto.db", store_sync_tokens=False
        )
        super().__init__(url, user, store_path=str(directory), config=config)

    async def fetch(
        self, method: str, path: str, body: Json | None = None, *, timeout_s: float = REQUEST_S
    ) -> Json:
        """Return what the homeserver answers. Raises Away, Refused."""
        data = None if body is None else json.dumps(body, ensure_ascii=False).encode()
        async with self.exchange(method, path, data, timeout_s=timeout_s) as answer:
            return await _read_json(answer)

    @asynccontextmanager
    async def exchange(
        self,
        method: str,
        path: str,
        data: Any = None,
        *,
        timeout_s: float = REQUEST_S,
        headers: dict[str, str] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request and hand out the answer, if it is one of success. Raises Away, Refused."""
        if self.client_session is None:
            self.client_session = aiohttp.ClientSession()
        headers = {"Content-Type": "application/json", **(headers or {})}
        if self.access_token:
            headers["Authorization"] = f"Bearer {self.access_token}"
        timeout = aiohttp.ClientTimeout(total=timeout_s, connect=CONNECT_S)
        try:
            # A redirection could lead the token elsewhere.
            async with self.client_session.request(
                method,
                self.homeserver + path,
                data=data,
                headers=headers,
                timeout=timeout,
                allow_redirects=False,
            ) as answer:
                if answer.status != 200:
                    raise await _failure(answer)
                yield answer
        except TimeoutError as exc:
            raise Away("the homeserver does not answer in time") from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise Away(f"the homeserver cannot be reached: {exc or type(exc).__name__}"[:300]) from exc

    async def put_event(self, room: str, kind: str, content: Json, txn: str) -> str:
        """Send an event, encrypted where its room is; returns its id. Raises Away, Refused."""
        if kind != "m.reaction" and self.is_encrypted(room):
            kind, content = await self._encrypted(room, kind, content)
        answer = await self.fetch("PUT", f"{room_path(room)}/send/{kind}/{quote(txn, safe='')}", content)
        return required_text(answer, "event_id")

    async def redact(self, room: str, event: str, txn: str) -> str:
        """Take an event back; returns the id of the redaction. Raises Away, Refused."""
        path = f"{room_path(room)}/redact/{quote(event, safe='')}/{quote(txn, safe='')}"
        return required_text(await self.fetch("PUT", path, {}), "event_id")

    def is_encrypted(self, room: str) -> bool:
        """Say whether a room is: once it was, it is for ever, whatever the homeserver says of it now."""
        known = self.rooms.get(room)
        return room in self.encrypted_rooms or (known is not None and known.encrypted)

    async def _encrypted(self, room: str, kind: str, content: Json) -> tuple[str, Json]:
        if room not in self.rooms:
            raise Refused(403, "M_FORBIDDEN", "this account is not in the room")
        self.rooms[room].encrypted = True
        if not self.rooms[room].members_synced:
            await self.joined_members(room)
        if self.should_query_keys:
            await self.keys_query()
        if self.olm.should_share_group_session(room):
            await self._share_key(room)
        kind, content = self.encrypt(room, kind, content)
        return kind, content

    async def _share_key(self, room: str) -> None:
        """Send the key of what comes next to all devices of the room.

        nio's own share_group_session() counts a device as served even if the request failed.
        """
        missing = self.get_missing_sessions(room)
        if missing:
            await self.keys_claim(missing)
        users = list(self.rooms[room].users)
        for devices, message in self.olm.share_group_session_parallel(
            room, users, ignore_unverified_devices=True
        ):
            method, path, data = nio.Api.to_device(
                self.access_token, "m.room.encrypted", message, secrets.token_hex(16)
            )
            await self._send(nio.ShareGroupSessionResponse, method, path, data, (room, devices))
        self.olm.outbound_group_sessions[room].shared = True

    async def _send(
        self,
        response_class: Any,
        method: str,
        path: str,
        data: Any = None,
        response_data: tuple[Any, ...] | None = None,
        **_: Any,
    ) -> Any:
        """Make nio's requests, in the place of its own method."""
        url = urlsplit(path)
        query = "&".join(part for part in url.query.split("&") if not part.startswith("access_token="))
        body = json.loads(data) if data else None
        answer = await self.fetch(method, f"{url.path}?{query}" if query else url.path, body)
        response = response_class.from_dict(answer, *(response_data or ()))
        if isinstance(response, nio.ErrorResponse):
            raise Away(f"the homeserver's answer cannot be read: {response.message}"[:300])
        await self.receive_response(response)
        return response


def room_path(room: str) -> str:
    """Return the beginning of a room's paths."""
    return f"/_matrix/client/v3/rooms/{quote(room, safe='')}"


def required_text(answer: Json, name: str) -> str:
    """Return a text of an answer. Raises Away: it is not there."""
    value = answer.get(name)
    if not isinstance(value, str):
        raise Away(f"the homeserver's answer has no {name}")
    return value


async def _failure(answer: aiohttp.ClientResponse) -> Exception:
    try:
        body = await _read_json(answer)
    except Away:
        body = {}
    code, text = str(body.get("errcode", "")), str(body.get("error", ""))
    if answer.status == 429:
        wait_ms = body.get("retry_after_ms")
        header = answer.headers.get("Retry-After", "")
        wait_s = wait_ms / 1000 if isinstance(wait_ms, int) else float(header) if header.isdigit() else 5.0
        return Away("the homeserver wants fewer requests", max(0.1, min(wait_s, 3600.0)))
    if answer.status == 401 and code in ("M_UNKNOWN_TOKEN", "M_MISSING_TOKEN"):
        return LoggedOut(answer.status, code, text)
    if 400 <= answer.status < 500 and answer.status != 408:
        return Refused(answer.status, code, text, body)
    return Away(f"the homeserver answers {answer.status} {text or answer.reason or ''}"[:300])


async def _read_json(answer: aiohttp.ClientResponse) -> Json:
    parts, size = [], 0
    async for part in answer.content.iter_chunked(CHUNK_BYTES):
        size += len(part)
        if size > ANSWER_BYTES:
            raise TooLong(f"the homeserver's answer is longer than {ANSWER_BYTES} bytes")
        parts.append(part)
    try:
        body = json.loads(b"".join(parts))
    except (ValueError, RecursionError) as exc:
        raise Away("the homeserver's answer is no JSON") from exc
    if not isinstance(body, dict):
        raise Away("the homeserver's answer is no object")
    return body
