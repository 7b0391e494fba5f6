"""The part of io.nanoclaw.Control that is about messages, deliveries and dead letters."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass

from nanoclawd import journal, limits, queue
from nanoclawd.db import Database, Transaction, now_ms
from nanoclawd.errors import NotFound, Refused
from nanoclawd.ids import unit_name
from nanoclawd.messages import session_row
from nanoclawd.outlets import Outlets
from nanoclawd.registry import Registry
from nanoclawd.server import Call, Method
from nanoclawd.sessions import Sessions
from nanoclawd.wire import Json

_CANDIDATES = 4  #: ids shown of those that begin alike


@dataclass(eq=False)
class MessageControl:
    db: Database
    registry: Registry
    sessions: Sessions
    outlets: Outlets

    def __post_init__(self) -> None:
        self.methods = {
            "ListMessages": Method(handler=self._list_messages),
            "ShowMessage": Method(handler=self._show_message),
            "ListDeadLetters": Method(handler=self._list_dead_letters),
            "RetryDeadLetter": Method(handler=self._retry),
            "DropDeadLetter": Method(handler=self._drop),
        }

    async def _list_messages(self, call: Call) -> Json:
        agent, limit = call.parameters["agent"], call.parameters["limit"]
        if not 1 <= limit <= limits.MESSAGES_LISTED:
            raise Refused(f"limit: must be from 1 to {limits.MESSAGES_LISTED}")
        rows = await self.db.read("list_messages", **call.parameters)
        if not rows and agent is not None:
            self.registry.get(agent)  # an agent that was removed may have left some
        ids = [("message", row["id"]) for row in reversed(rows)]
        return await call.send_all(self._describe(ids, limits.EXCERPT_CHARACTERS), {"message": None})

    async def _show_message(self, call: Call) -> Json:
        kind, shown = await self._find(call.parameters["id"])
        if kind == "message":
            keys = await self.db.read("deliveries_of", message=shown["id"], turn=shown["turn"])
            ids = [("message", shown["id"]), *(("delivery", row["id"]) for row in keys)]
        else:
            cause = [("message", shown["message"])] if shown["message"] else []
            ids = [*cause, ("delivery", shown["key"])]
        return await call.send_all(self._describe(ids, limits.TEXT_BYTES), {})

    async def _list_dead_letters(self, call: Call) -> Json:
        rows = await self.db.read("list_dead_letters", limit=limits.MESSAGES_LISTED)
        ids = [(row["kind"], row["id"]) for row in rows]
        return await call.send_all(self._describe(ids, limits.EXCERPT_CHARACTERS), {})

    async def _retry(self, call: Call) -> Json:
        kind, letter = await self._find(call.parameters["id"])
        if kind == "message" and letter["agent"] not in self.registry.names():
            hint = f"add an agent of that name, or 'nanoclawctl deadletter drop {letter['id']}'"
            raise Refused(f"there is no agent '{letter['agent']}' any more", hint=hint)
        id = await self._change(kind, letter, queue.retry_dead_letter, "retried")
        if kind == "message":
            (row,) = await self.db.read("find_session_of", message=id)
            self.sessions.wake(session_row(row))
        else:
            self.outlets.retry_at(letter["channel"], now_ms())
        return {"id": id}

    async def _drop(self, call: Call) -> Json:
        kind, letter = await self._find(call.parameters["id"])
        return {"id": await self._change(kind, letter, queue.drop_dead_letter, "dropped")}

    async def _change(
        self, kind: str, letter: Json, operation: Callable[[Transaction, str], bool], event: str
    ) -> str:
        """Do `operation` to a dead letter and return its id. Raises Refused if it is none."""
        id: str = letter["id" if kind == "message" else "key"]
        if not await self.db.write(lambda tx: operation(tx, id)):
            state = "dropped" if letter["dropped"] else letter["state"]
            hint = "'nanoclawctl deadletter list' shows those that there are"
            raise Refused(f"{kind} {id} is {state}: it is no dead letter", hint=hint)
        message, key = (id, None) if kind == "message" else (letter["message"], id)
        journal.info(f"{kind}-{event}", message=message, key=key, agent=letter["agent"])
        return id

    async def _find(self, id: str) -> tuple[str, Json]:
        """Return "message" or "delivery", and the one that `id` means. Raises NotFound, Refused."""
        rows = await self.db.read("find_ids", id=id, limit=_CANDIDATES) if id else []
        # The key of a delivery begins with its message's id, which alone means the message.
        found = [row for row in rows if row["id"] == id] or [row for row in rows if row["kind"] == "message"]
        found = found or rows
        if not found:
            hint = "'nanoclawctl message list' and 'nanoclawctl deadletter list' show ids"
            raise NotFound(f"no message or delivery {id[:80]!r}", hint=hint)
        if len(found) > 1:
            raise Refused(f"several begin with '{id}'", hint=f"e.g. {', '.join(row['id'] for row in found)}")
        (shown,) = [reply async for reply in self._describe([tuple(found[0])], 0)]
        return found[0]["kind"], shown[found[0]["kind"]]

    async def _describe(self, ids: Iterable[tuple[str, str]], characters: int) -> AsyncIterator[Json]:
        """Yield each of `ids` with so much of its text; one at a time, since texts may be long."""
        for kind, id in ids:
            for row in await self.db.read(f"show_{kind}", id=id, characters=characters):
                shown = {**dict(row), "dropped": bool(row["dropped"])}
                if kind == "message":
                    shown["unit"] = unit_name(shown["agent"], shown["session"])
                yield {kind: shown}
