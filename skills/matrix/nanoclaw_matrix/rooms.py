"""Rooms: invitations, which the router decides about, and what is told of a room with each message."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import quote

from nanoclaw_matrix.homeserver import Homeserver, Refused, room_path
from nanoclaw_matrix.router import Line
from nanoclaw_matrix.store import Store
from nanoclaw_matrix.varlink import CallError

NAME_CHARACTERS = 100
INVITATIONS = 200  #: that wait for an answer; further ones are not looked at

Json = dict[str, Any]
log = logging.getLogger("rooms")


class Rooms:
    """The account's rooms, and those that it was invited to."""

    def __init__(self, client: Homeserver, store: Store, line: Line) -> None:
        self._client, self._store, self._line = client, store, line

    async def follow(self, response: Any, invited: Mapping[str, list[Json]]) -> None:
        """Take note of invitations, and of rooms that were left. Raises Away.

        invited: room -> what its invitation tells of its state.
        """
        for room in response.rooms.leave:
            self._store.drop_room(room)
        for room in response.rooms.invite:
            invitation = _invitation(invited[room], self._client.user_id)
            waiting = len(self._store.invitations())
            if invitation is None or waiting >= INVITATIONS or self._store.room_state(room) == "invited":
                continue
            self._store.put_invitation(room, **invitation)
            await self.ask(room)

    async def ask_again(self) -> None:
        """Ask the router about all invitations that nobody has decided about. Raises Away."""
        for row in self._store.invitations():
            await self.ask(row["room"])

    async def ask(self, room: str) -> None:
        """Ask the router whether to join. Raises Away."""
        row = next(row for row in self._store.invitations() if row["room"] == room)
        parameters = {
            "chat": room,
            "sender": row["inviter"],
            "senderName": row["inviter_name"],
            "kind": "direct" if row["direct"] else "group",
            "title": row["title"],
        }
        try:
            answer = await self._line.call("Invite", parameters)
        except CallError as exc:
            log.warning("the router refuses an invitation: %s", exc)
            return
        await self.decide(room, answer["state"])

    async def decide(self, room: str, state: str) -> None:
        """Do what was said about a room: "open", "blocked", or "new" for nothing yet. Raises Away."""
        known = self._store.room_state(room)
        try:
            if state == "open" and known == "invited":
                await self._client.fetch("POST", f"/_matrix/client/v3/join/{quote(room, safe='')}", {})
            elif state == "blocked" and known is not None:
                await self._client.fetch("POST", f"{room_path(room)}/leave", {})
                self._store.drop_room(room)
        except Refused as exc:  # e.g. the invitation was taken back
            log.warning("could not join or leave a room: %s", exc)
            self._store.drop_room(room)

    def is_direct(self, room: str) -> bool:
        """Say whether only one other account is in a room, or invited; nobody's word is taken for it."""
        known = self._client.rooms.get(room)
        return known is not None and known.member_count == 2

    async def describe(self, room: str, sender: str) -> Json:
        """Return what Deliver() tells of chat and sender. Raises Away."""
        known = self._client.rooms.get(room)
        if known is not None and not known.members_synced and not _is_counted(known):
            # After a start the homeserver tells of members only what has changed.
            with suppress(Refused):  # we are in there no more
                await self._client.joined_members(room)
        return {
            "chat": room,
            "sender": sender,
            "senderName": None if known is None else _shown(known.user_name(sender)),
            "kind": "direct" if self.is_direct(room) else "group",
            "title": None if known is None else _shown(known.named_room_name()),
        }


def _invitation(state: list[Json], account: str) -> Json | None:
    """Return who invites to which room; None if it cannot be told."""
    found: Json | None = None
    title: Any = ""
    names: dict[object, object] = {}
    for event in state:
        content = event.get("content")
        if not isinstance(content, dict):
            continue
        if event.get("type") == "m.room.name":
            title = content.get("name")
        elif event.get("type") == "m.room.member":
            names[event.get("state_key")] = content.get("displayname")
            if event.get("state_key") == account and content.get("membership") == "invite":
                found = event
    if found is None or not isinstance(found.get("sender"), str):
        return None
    sender = found["sender"]
    return {
        "inviter": sender,
        "inviter_name": _shown(names.get(sender)) or "",
        "direct": found["content"].get("is_direct") is True,
        "title": _shown(title) or "",
    }


def _is_counted(room: Any) -> bool:
    return room.summary is not None and room.summary.joined_member_count is not None


def _shown(name: object) -> str | None:
    return name[:NAME_CHARACTERS] if isinstance(name, str) else None
