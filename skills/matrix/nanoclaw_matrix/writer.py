"""What agents say: deliveries of the router on their way to rooms, each sent once and reported."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from typing import Any
from urllib.parse import quote

from nanoclaw_matrix.homeserver import Away, Homeserver, LoggedOut, Refused, room_path
from nanoclaw_matrix.media import TooLarge, upload
from nanoclaw_matrix.outbound import Step, choice_steps, plan, transaction
from nanoclaw_matrix.rooms import Rooms
from nanoclaw_matrix.router import Line, Router, pauses
from nanoclaw_matrix.settings import Devices, Names, Settings
from nanoclaw_matrix.store import Store
from nanoclaw_matrix.varlink import CallError, RouterAway

AT_ONCE = 16  #: deliveries on their way, each to another chat
WAIT_S = 20.0  #: a pause that the homeserver asks for is waited for here if it is not longer
TYPING_S = 30  #: "is typing" is shown for so long, unless it is said again
NO_REACTION = "M_DUPLICATE_ANNOTATION"  #: the same reaction is there already

Json = dict[str, Any]
log = logging.getLogger("writer")


class Writer:
    """The router's stream of deliveries."""

    def __init__(
        self, client: Homeserver, store: Store, router: Router, line: Line, rooms: Rooms, settings: Settings
    ) -> None:
        self._client, self._store, self._router, self._line = client, store, router, line
        self._rooms, self._settings = rooms, settings
        self._typing: dict[str, float] = {}  # room -> until when it is shown
        self._locks: dict[str, asyncio.Lock] = {}  # of each room in which something is being sent

    async def run(self) -> None:
        """Deliver for ever. Raises LoggedOut."""
        slots = asyncio.Semaphore(AT_ONCE)
        retries = pauses()
        while True:
            try:
                async with asyncio.TaskGroup() as tasks:
                    # Whoever was told of a chat while we were away: ask again.
                    tasks.create_task(self._ask_again(), name="invitations")
                    async for item in self._router.attach():
                        retries = pauses()
                        if item.get("delivery"):
                            await slots.acquire()
                            task = tasks.create_task(self._deliver(item["delivery"]))
                            task.add_done_callback(lambda _: slots.release())
                        elif item.get("activity"):
                            await self._show_activity(item["activity"])
                        elif item.get("chat"):
                            await self._decide(item["chat"]["chat"], item["chat"]["state"])
            except* (RouterAway, CallError) as group:
                log.info("%s, attaching again", group.exceptions[0])
            await asyncio.sleep(next(retries))

    async def _ask_again(self) -> None:
        try:
            await self._rooms.ask_again()
        except Away as exc:
            log.warning("could not join a room: %s", exc)

    async def _decide(self, room: str, state: str) -> None:
        try:
            await self._rooms.decide(room, state)
        except Away as exc:
            log.warning("could not join or leave a room: %s", exc)

    async def _deliver(self, delivery: Json) -> None:
        room, key = delivery["chat"], delivery["key"]
        lock = self._locks.setdefault(room, asyncio.Lock())
        try:
            async with lock:  # threads of a room are chats of their own, but share its keys
                receipt = await self._send(delivery)
        except LoggedOut:
            raise
        except (Refused, TooLarge) as exc:
            await self._report(
                "ReportFailed", key, reason=str(exc) or "the file is too large", retryable=False
            )
        except (Away, RouterAway, CallError, OSError) as exc:
            wait_s = getattr(exc, "retry_after_s", 0.0)
            failed = {"reason": str(exc), "retryable": True, "retryAfterSeconds": wait_s}
            await self._report("ReportFailed", key, **failed)
        else:
            await self._report("ReportSent", key, receipt=receipt)
        finally:
            if not lock.locked():
                self._locks.pop(room, None)

    async def _report(self, method: str, key: str, **parameters: Any) -> None:
        try:
            await self._line.call(method, {"key": key, **parameters})
        except CallError as exc:
            log.warning("%s: the router refuses it: %s", method, exc)

    async def _send(self, delivery: Json) -> str:
        """Send all parts that the homeserver does not have; returns the id of the last."""
        room, agent = delivery["chat"], delivery["agent"]
        steps = plan(
            delivery,
            prefix=self._prefixes(room, agent),
            avatar=self._settings.avatars.get(agent, ""),
            answer=not self._rooms.is_direct(room),
        )
        if self._settings.devices is Devices.VERIFIED:
            self._shut_out_unverified(room)
        receipt = ""
        for number, step in enumerate(steps):
            if number < delivery["partsSent"]:
                continue
            receipt = await self._send_step(delivery, step)
            if number + 1 < len(steps):
                await self._report("ReportPart", delivery["key"], parts=number + 1, receipt=receipt)
        for step in choice_steps(delivery, receipt) if receipt else []:
            try:
                await self._send_step(delivery, step)
            except Refused as exc:  # they only save typing
                log.info("no reaction to click: %s", exc)
        if not receipt:
            raise Refused(400, "", "there is nothing in it that could be sent")
        return receipt

    async def _send_step(self, delivery: Json, step: Step) -> str:
        """Send one event, unless it is known to be there; returns its id."""
        known = self._store.sent(step.txn)
        if known is not None:
            return known
        room, content = delivery["chat"], step.content
        if step.file is not None:
            content = {**await self._upload(delivery, step.file), **content}
        while True:
            try:
                if step.kind:
                    event = await self._client.put_event(room, step.kind, content, step.txn)
                else:
                    event = await self._client.redact(room, step.target, step.txn)
                break
            except Away as exc:
                if not 0 < exc.retry_after_s <= WAIT_S:
                    raise
                await asyncio.sleep(exc.retry_after_s)
            except Refused as exc:
                if exc.code == NO_REACTION:
                    return step.txn
                raise
        self._store.put_own(event, room, delivery["agent"], step.txn, delivery["thread"])
        self._typing.pop(room, None)  # what comes ends it
        return event

    async def _upload(self, delivery: Json, number: int) -> Json:
        """Return what an event says of a file, which is uploaded once however often it is tried."""
        room = delivery["chat"]
        encrypted = self._client.is_encrypted(room)
        txn = transaction(delivery["key"], f"upload-{number}-{'e' if encrypted else 'p'}")
        saved = self._store.upload(txn)
        if saved is not None:
            content: Json = json.loads(saved)
            return content
        fd = await self._line.call_for_fd("OpenFile", {"key": delivery["key"], "number": number})
        try:
            limit = self._settings.max_file_bytes
            file = delivery["files"][number]
            content = await upload(self._client, fd, file, encrypted=encrypted, max_bytes=limit)
        finally:
            os.close(fd)
        self._store.put_upload(txn, json.dumps(content))
        return content

    def _prefixes(self, room: str, agent: str) -> bool:
        names = self._settings.names
        return names is Names.ALWAYS or (names is Names.AUTO and self._store.agents_in(room, agent) > 1)

    def _shut_out_unverified(self, room: str) -> None:
        """Keep the keys of what is sent from devices that nobody has verified."""
        known = self._client.rooms.get(room)
        for user in [] if known is None else known.users:
            for device in self._client.device_store.active_user_devices(user):
                if not device.verified and not device.blacklisted:
                    self._client.blacklist_device(device)

    async def _show_activity(self, activity: Json) -> None:
        """Show that an agent is at work, as long as it is."""
        room, now = activity["chat"], asyncio.get_running_loop().time()
        until = self._typing.get(room, 0.0)
        typing = activity["kind"] != "idle"
        if typing == (until > now + TYPING_S / 3):
            return
        if not typing and not until:
            return
        path = f"{room_path(room)}/typing/{quote(self._client.user_id, safe='')}"
        body = {"typing": typing, "timeout": TYPING_S * 1000} if typing else {"typing": False}
        if typing:
            self._typing[room] = now + TYPING_S
        else:
            self._typing.pop(room, None)
        try:
            await self._client.fetch("PUT", path, body, timeout_s=5)
        except (Away, Refused) as exc:
            log.info("cannot show that an agent is typing: %s", exc)
