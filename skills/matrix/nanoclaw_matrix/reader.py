"""What people write: events on their way to the router, in order, each until it is answered.

The position in the homeserver's stream is stored only when the router has answered all that came before it.
So whatever is killed in between, the same events come again, and the router knows which of them it has.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import nio

from nanoclaw_matrix.health import Health, State
from nanoclaw_matrix.homeserver import Away, Homeserver, LoggedOut, Refused, TooLong, room_path
from nanoclaw_matrix.inbound import (
    Attachment,
    Malformed,
    Reacted,
    Said,
    TookBack,
    names_account,
    parse_event,
)
from nanoclaw_matrix.media import TooLarge, download
from nanoclaw_matrix.outbound import transaction
from nanoclaw_matrix.rooms import Rooms
from nanoclaw_matrix.router import Line, pauses
from nanoclaw_matrix.settings import Devices, Settings
from nanoclaw_matrix.store import Store
from nanoclaw_matrix.varlink import CallError
from nanoclaw_matrix.verification import PREFIX as VERIFICATION
from nanoclaw_matrix.verification import Verifications

Json = dict[str, Any]

WAIT_S = 30  #: the homeserver answers a sync after this, if nothing happens
TIMELINE = 30  #: events of a room that come with a sync; what is missing is fetched in pages
PAGE = 100
GAP_PAGES = 100  #: of a room, so 10,000 events; what is older is left out

log = logging.getLogger("reader")


class Reader:
    """The account's stream of events."""

    def __init__(
        self,
        client: Homeserver,
        store: Store,
        line: Line,
        rooms: Rooms,
        verifications: Verifications,
        health: Health,
        settings: Settings,
        directory: Path,
    ) -> None:
        self._client, self._store, self._line, self._rooms = client, store, line, rooms
        self._verifications, self._health, self._settings = verifications, health, settings
        self._directory = directory
        self._timeline = TIMELINE
        self.caught_up = asyncio.Event()  #: what was sent before has come back, so the writer knows of it

    async def run(self) -> None:
        """Read for ever. Raises LoggedOut."""
        first = True
        retries = pauses()
        while True:
            try:
                await self._read(first=first)
                await self._keep_keys()
            except LoggedOut:
                raise
            except TooLong as exc:
                self._timeline = 1  # the rest is fetched in pages
                await self._pause(exc, 5.0)
            except (Away, Refused) as exc:
                await self._pause(exc, next(retries))
            else:
                first = False
                retries = pauses()
                self._health.set(State.CONNECTED)
                self.caught_up.set()

    async def _pause(self, exc: Exception, pause_s: float) -> None:
        log.warning("%s, retrying in %.0f s", exc, max(pause_s, getattr(exc, "retry_after_s", 0.0)))
        self._health.set(State.CONNECTING, str(exc))
        await asyncio.sleep(max(pause_s, getattr(exc, "retry_after_s", 0.0)))

    async def _read(self, *, first: bool) -> None:
        """Read what has happened since the position, and move it."""
        position = self._store.get("position")
        query = {"filter": json.dumps(self._filter(0 if position is None else self._timeline))}
        if position is not None:
            query["since"] = position
        if first:
            # nio forgets rooms with the process. A state as a whole comes at once, without waiting.
            query["full_state"] = "true"
        else:
            query["timeout"] = str(WAIT_S * 1000)
        body = await self._client.fetch(
            "GET", f"/_matrix/client/v3/sync?{urlencode(query)}", timeout_s=WAIT_S + 60
        )
        verifying = self._take_verification(body)
        invited = {
            room: copy.deepcopy(_list(info, "invite_state", "events"))  # nio takes them apart
            for room, info in _table(body, "rooms", "invite").items()
        }
        try:
            response = nio.SyncResponse.from_dict(body)
        except (AttributeError, KeyError, TypeError, ValueError) as exc:
            raise Away(f"the homeserver's sync cannot be read: {exc!r}"[:300]) from exc
        if not isinstance(response, nio.SyncResponse):
            raise Away(f"the homeserver's sync cannot be read: {response.message}"[:300])
        keys = {event.get("sender") for event in _list(body, "to_device", "events")}
        with self._client.store.database.atomic():
            await self._client.receive_response(response)
        for event in verifying:
            await self._verifications.receive(event)
        await self._rooms.follow(response, invited)
        if position is not None:
            for room, info in response.rooms.join.items():
                await self._read_room(room, info.timeline, position)
        else:
            for room in response.rooms.join:
                self._store.put_joined(room)
        if keys:
            await self._retry_undecrypted()
        self._store.put("position", response.next_batch)

    def _filter(self, timeline: int) -> Json:
        return {
            "room": {
                "timeline": {"limit": timeline, "lazy_load_members": True},
                "state": {"lazy_load_members": True},
                "ephemeral": {"types": []},
                "account_data": {"types": []},
            },
            "presence": {"types": []},
            "account_data": {"types": []},
        }

    def _take_verification(self, body: Json) -> list[Json]:
        """Take the events of verification out of a sync: nio's answers are not as specified."""
        events = _list(body, "to_device", "events")
        ours = [event for event in events if str(event.get("type", "")).startswith(VERIFICATION)]
        if ours:
            body["to_device"] = {"events": [event for event in events if event not in ours]}
        return ours

    async def _read_room(self, room: str, timeline: Any, position: str) -> None:
        events: list[Any] = list(timeline.events)
        if self._store.room_state(room) != "joined":
            # Just joined: what was said before we were invited is not for us.
            events = _since_invitation(events, self._client.user_id)
            self._store.put_joined(room)
        elif timeline.limited and timeline.prev_batch:
            events = await self._fetch_gap(room, timeline.prev_batch, position) + events
        last = None
        for event in events:
            if await self._take_if_sound(room, event):
                last = event.source
        if last is not None:
            await self._acknowledge(room, last)

    async def _fetch_gap(self, room: str, begin: str, end: str) -> list[Any]:
        """Return what happened between two positions, oldest first."""
        events: list[Any] = []
        for _ in range(GAP_PAGES):
            query = urlencode({"dir": "b", "from": begin, "to": end, "limit": PAGE})
            try:
                body = await self._client.fetch("GET", f"{room_path(room)}/messages?{query}")
            except Refused as exc:  # e.g. what was said before is hidden from us by now
                log.warning("what happened in a room cannot be read: %s", exc)
                break
            page = nio.RoomMessagesResponse.from_dict(body, room)
            if not isinstance(page, nio.RoomMessagesResponse):
                raise Away(f"the homeserver's page of events cannot be read: {page.message}"[:300])
            for event in page.chunk:
                events.append(self._decrypted(room, event))
            if not page.chunk or not isinstance(page.end, str) or page.end in (begin, end):
                break
            begin = page.end
        events.reverse()
        return events

    def _decrypted(self, room: str, event: Any) -> Any:
        if not isinstance(event, nio.MegolmEvent):
            return event
        event.room_id = room
        return self._client.olm._decrypt_megolm_no_error(event) or event

    # One event

    async def _take_if_sound(self, room: str, event: Any) -> bool:
        """Do the same as _take(), but for an event that is wrong in a way that nobody has thought of.

        Else it would come again after the crash, for ever.
        """
        try:
            return await self._take(room, event)
        except (AttributeError, KeyError, TypeError, ValueError):
            self._health.skipped()
            log.exception("skipping an event that cannot be understood")
            return False

    async def _take(self, room: str, event: Any) -> bool:
        """Hand over an event; returns whether an agent gets it."""
        source = event.source
        if isinstance(event, nio.MegolmEvent):
            if event.sender != self._client.user_id:
                self._store.put_undecrypted(event.event_id, room, event.session_id, json.dumps(source))
                self._health.decrypted(False)
                log.warning("a message of %s could not be decrypted: its key is missing", event.sender)
            self._note_own(room, source)
            return False
        try:
            said = parse_event(source)
        except Malformed as exc:
            self._health.skipped()
            log.info("skipping an event of %s: %s", source.get("sender"), exc)
            return False
        if getattr(event, "decrypted", False):
            self._health.decrypted(True)
            if self._settings.devices is Devices.VERIFIED and not event.verified:
                log.warning("skipping a message of %s: nobody has verified its device", event.sender)
                return False
        elif self._client.is_encrypted(room) and isinstance(said, Said):
            # Whoever has a homeserver could have written it.
            self._health.skipped()
            log.warning("skipping a message of %s: it is not encrypted, and the room is", said.sender)
            return False
        if said is None:
            await self._verifications.receive_in_room(room, source)
            return False
        if said.sender == self._client.user_id:
            self._note_own(room, source)
            return False
        if isinstance(said, Reacted):
            return await self._react(room, said)
        if isinstance(said, TookBack):
            await self._take_back(room, said)
            return False
        return await self._deliver(room, said)

    def _note_own(self, room: str, source: Json) -> None:
        """Note what we sent: it comes back with its transaction id, also if we were killed meanwhile."""
        txn = (source.get("unsigned") or {}).get("transaction_id")
        if source.get("sender") == self._client.user_id and isinstance(txn, str) and txn.startswith("nc-"):
            self._store.put_own(source["event_id"], room, "", txn)

    async def _deliver(self, room: str, said: Said) -> bool:
        event, revision, thread, mentioned, agent = said.event, 0, said.thread, False, None
        if said.edits is not None:
            original = self._store.event(said.edits)
            if original is None or original["detail"] != said.sender or original["room"] != room:
                return False  # of what we never had, or of somebody else
            known = self._store.event(said.event)
            event, thread = said.edits, original["thread"]
            revision = self._store.revision(said.edits) if known is None else known["revision"]
            self._store.put_event(said.event, room, "edit", target=said.edits, revision=revision)
        if said.answers is not None:
            answered = self._store.event(said.answers)
            if answered is not None and answered["kind"] == "own":
                mentioned, agent = True, answered["detail"] or None
        account = self._client.user_id
        if said.mentions is None:
            mentioned |= names_account(said.text, account, self._settings.display_name)
        else:
            mentioned |= account in said.mentions
        parameters = {
            **await self._rooms.describe(room, said.sender),
            "thread": thread,
            "event": event,
            "revision": revision,
            "text": said.text,
            "agent": agent,
            "mentioned": mentioned,
            "writer": "program" if said.notice else "person",
            "inReplyTo": said.answers,
        }
        answer = await self._hand_over(room, said, parameters)
        if answer is None:
            return False
        if said.edits is None:
            self._store.put_event(said.event, room, "message", thread=thread, detail=said.sender)
        return answer["outcome"] in ("queued", "answered")

    async def _hand_over(self, room: str, said: Said, parameters: Json) -> Json | None:
        """Call Deliver(), with the file if there is one; returns None if the router refuses it."""
        fd = None
        if said.attachment is not None:
            fd = await self._fetch_file(said.attachment, parameters)
        if not parameters["text"].strip() and fd is None:
            return None
        try:
            return await self._line.call(
                "Deliver", parameters, lambda: () if fd is None else (_rewound(fd),)
            )
        except CallError as exc:
            await self._explain(room, said, str(exc))
            return None
        finally:
            if fd is not None:
                os.close(fd)

    async def _fetch_file(self, attachment: Attachment, parameters: Json) -> int | None:
        """Return the file that came with a message, or say in its text why there is none. Raises Away."""
        try:
            fd = await download(self._client, attachment, self._directory, self._settings.max_file_bytes)
        except TooLarge:
            reason = f"it is larger than {self._settings.max_file_bytes} bytes"
        except (Malformed, Refused) as exc:
            reason = str(exc)
        else:
            kind = attachment.media_type or "application/octet-stream"
            size = os.fstat(fd).st_size
            parameters["files"] = [{"name": attachment.name, "mediaType": kind, "bytes": size}]
            return fd
        note = f"(A file '{attachment.name}' came with this, and could not be fetched: {reason})"
        parameters["text"] = f"{parameters['text']}\n\n{note}".strip()
        return None

    async def _explain(self, room: str, said: Said, reason: str) -> None:
        """Tell whoever wrote it that the router did not take a message."""
        content: Json = {"msgtype": "m.notice", "body": reason, "m.mentions": {}}
        content["m.relates_to"] = {"m.in_reply_to": {"event_id": said.event}}
        if said.thread:
            content["m.relates_to"] |= {"rel_type": "m.thread", "event_id": said.thread}
        try:
            await self._client.put_event(room, "m.room.message", content, transaction(said.event, "refused"))
        except Refused as exc:
            log.warning("could not say in a room why a message was refused: %s", exc)

    async def _react(self, room: str, said: Reacted) -> bool:
        target = self._store.event(said.target)
        if target is None or target["room"] != room:
            return False
        self._store.put_event(
            said.event,
            room,
            "reaction",
            thread=target["thread"],
            target=said.target,
            detail=json.dumps([said.sender, said.reaction]),
        )
        return await self._hand_over_reaction(room, said.event, removed=False)

    async def _take_back(self, room: str, said: TookBack) -> None:
        target = self._store.event(said.target)
        if target is None or target["room"] != room:
            return
        if target["kind"] == "reaction":
            await self._hand_over_reaction(room, said.target, removed=True)
        elif target["kind"] == "message":
            place = {"chat": room, "thread": target["thread"], "event": said.target}
            await self._call("Retract", place)

    async def _hand_over_reaction(self, room: str, event: str, *, removed: bool) -> bool:
        row = self._store.event(event)
        if row is None:
            return False
        sender, reaction = json.loads(row["detail"])
        described = await self._rooms.describe(room, sender)
        parameters = {
            **{name: described[name] for name in ("chat", "sender", "senderName")},
            "thread": row["thread"],
            "event": event,
            "target": row["target"],
            "reaction": reaction,
            "removed": removed,
        }
        answer = await self._call("React", parameters)
        return answer is not None and answer["outcome"] == "answered"

    async def _call(self, method: str, parameters: Json) -> Json | None:
        try:
            return await self._line.call(method, parameters)
        except CallError as exc:
            log.warning("%s: the router refuses it: %s", method, exc)
            return None

    async def _acknowledge(self, room: str, source: Json) -> None:
        """Show that what an agent gets has been read. Only then: to others the account says nothing."""
        thread = ((source.get("content") or {}).get("m.relates_to") or {}).get("event_id")
        known = self._store.event(source["event_id"])
        thread = known["thread"] if known is not None else thread
        path = f"{room_path(room)}/receipt/m.read/{quote(source['event_id'], safe='')}"
        try:
            await self._client.fetch("POST", path, {"thread_id": thread or "main"})
        except (Away, Refused) as exc:
            log.info("no read receipt: %s", exc)

    # Keys

    async def _keep_keys(self) -> None:
        """Do what encryption asks for: new one-time keys, devices of others, answers to requests."""
        client = self._client
        if client.should_upload_keys:
            await client.keys_upload()
        if client.should_query_keys:
            await client.keys_query()
            self._trust_named()
        if client.should_claim_keys:
            await client.keys_claim(client.get_users_for_key_claiming())
        for message in list(client.outgoing_to_device_messages):
            await client.to_device(message)

    def _trust_named(self) -> None:
        """Take those devices for verified whose fingerprint the person has written down."""
        for device in self._client.device_store:
            if device.ed25519.rstrip("=") in self._settings.trusted and not device.verified:
                self._client.verify_device(device)

    async def _retry_undecrypted(self) -> None:
        for row in self._store.undecrypted():
            event = nio.MegolmEvent.from_dict(json.loads(row["source"]))
            event.room_id = row["room"]
            decrypted = self._client.olm._decrypt_megolm_no_error(event)
            if decrypted is not None:
                await self._take(row["room"], decrypted)
                self._store.drop_undecrypted(row["event"])


def _since_invitation(events: list[Any], account: str) -> list[Any]:
    """Return the events after the account was last invited, or else after it joined."""
    for membership in ("invite", "join"):
        for index in range(len(events) - 1, -1, -1):
            event = events[index]
            if isinstance(event, nio.RoomMemberEvent) and (event.state_key, event.membership) == (
                account,
                membership,
            ):
                return events[index + 1 :]
    return []


def _at(body: Json, *path: str) -> Any:
    value: Any = body
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _list(body: Json, *path: str) -> list[Json]:
    """Return the objects in a list at a place of a JSON document; empty if there is none."""
    value = _at(body, *path)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _table(body: Json, *path: str) -> Json:
    """Return the object at a place of a JSON document; empty if there is none."""
    value = _at(body, *path)
    return value if isinstance(value, dict) else {}


def _rewound(fd: int) -> int:
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
