"""The part of io.nanoclaw.Control that is about destinations: chats that the owner has named for agents."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from nanoclawd import journal, limits
from nanoclawd.db import Database, Transaction
from nanoclawd.errors import NotFound, Refused
from nanoclawd.ids import TERMINAL, parse_destination_name
from nanoclawd.registry import Registry
from nanoclawd.server import Call, Method
from nanoclawd.wire import Json


@dataclass(kw_only=True, eq=False)
class DestinationControl:
    db: Database
    registry: Registry

    def __post_init__(self) -> None:
        self.methods = {
            "ListDestinations": Method(handler=self._list),
            "AddDestination": Method(handler=self._add),
            "RemoveDestination": Method(handler=self._remove),
        }

    async def _list(self, call: Call) -> Json:
        async def destinations() -> AsyncIterator[Json]:
            for row in await self.db.read("list_destinations", agent=call.parameters["agent"]):
                names = ("agent", "name", "channel", "chat")
                yield {"destination": {**{n: row[n] for n in names}, "title": row["title"] or ""}}

        return await call.send_all(destinations(), {"destination": None})

    async def _add(self, call: Call) -> Json:
        agent = self.registry.get(call.parameters["agent"]).name
        name, number = parse_destination_name(call.parameters["destination"]), call.parameters["chat"]

        def add(tx: Transaction) -> None:
            channel, chat = TERMINAL, str(agent)
            if number is not None:
                row = tx.one("get_chat", id=number)
                if row is None:
                    raise NotFound(f"no chat {number}", hint="'nanoclawctl chat list' shows all")
                channel, chat = row["channel"], row["chat"]
            known = {row["name"] for row in tx.all("list_destinations", agent=agent)}
            if name not in known and len(known) >= limits.DESTINATIONS:
                raise Refused(f"'{agent}' has {limits.DESTINATIONS} destinations, which is the limit")
            tx.all("set_destination", agent=agent, name=name, channel=channel, chat=chat)

        await self.db.write(add)
        journal.info("destination-added", agent=agent, name=name)
        return {}

    async def _remove(self, call: Call) -> Json:
        agent, name = call.parameters["agent"], call.parameters["destination"]
        if not await self.db.write(lambda tx: tx.all("remove_destinations", agent=agent, name=name)):
            hint = "'nanoclawctl destination list' shows all"
            raise NotFound(f"'{agent[:64]}' has no destination '{name[:64]}'", hint=hint)
        return {}
