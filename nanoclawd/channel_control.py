"""The part of io.nanoclaw.Control that is about channels and their adapters."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass

from nanoclawd import limits, messages, paths
from nanoclawd.channelfile import credential_of, find_program, write_channel
from nanoclawd.channels import Channel, Channels
from nanoclawd.db import Database, Transaction, now_ms
from nanoclawd.errors import ConfigError, Refused
from nanoclawd.ids import parse_channel_name
from nanoclawd.outlets import Outlets
from nanoclawd.questions import end_answered
from nanoclawd.routing import block_chat
from nanoclawd.server import Call, Method
from nanoclawd.sessions import Sessions
from nanoclawd.systemd import LoadedUnit, Systemd
from nanoclawd.wire import Json

UNITS = "nanoclaw-channel@*.service"


@dataclass(kw_only=True, eq=False)
class ChannelControl:
    db: Database
    systemd: Systemd
    channels: Channels
    sessions: Sessions
    outlets: Outlets

    def __post_init__(self) -> None:
        self.methods = {
            "AddChannel": Method(handler=self._add),
            "ListChannels": Method(handler=self._list),
            "ShowChannel": Method(handler=self._show),
            "RestartChannel": Method(handler=self._restart),
            "RemoveChannel": Method(handler=self._remove),
        }

    async def list(self) -> AsyncIterator[Json]:
        """Yield the type Channel of each."""
        units = {unit.name: unit for unit in await self.systemd.list_units([UNITS])}
        for name in self.channels.names():
            channel = self.channels.get(name)
            yield await self._describe(channel, units.get(channel.unit))

    async def _list(self, call: Call) -> Json:
        return await call.send_all(({"channel": each} async for each in self.list()), {"channel": None})

    async def _describe(self, channel: Channel, unit: LoadedUnit | None) -> Json:
        (counted,) = await self.db.read("count_waiting", channel=channel.name)
        said, health = channel.announced, channel.health
        return {
            "name": channel.name,
            "kind": "" if channel.config is None else channel.config.kind,
            "problem": "" if channel.problem is None else str(channel.problem),
            "unit": channel.unit,
            "activeState": "inactive" if unit is None else unit.active_state,
            "subState": "dead" if unit is None else unit.sub_state,
            "attached": self.outlets.is_attached(channel.name),
            "adapter": "" if said is None else said.adapter,
            "accounts": [] if said is None else sorted(said.accounts),
            "capabilities": None if said is None else said.capabilities.shown,
            "health": health.state,
            "healthText": health.text,
            "healthAge": time.monotonic() - health.at if health.state else 0.0,
            "waiting": counted["waiting"],
            "lastError": channel.last_error,
            "sandbox": [asdict(check) for check in channel.sandbox],
        }

    async def _one(self, channel: Channel) -> Json:
        units = await self.systemd.list_units([channel.unit])
        return await self._describe(channel, units[0] if units else None)

    async def _add(self, call: Call) -> Json:
        name, kind = parse_channel_name(call.parameters["name"]), call.parameters["kind"]
        path = Channel(name=name).file
        if name in self.channels.names() or path.exists():
            hint = f"edit '{path}', then 'nanoclawctl reload'"
            raise Refused(f"there is a channel named '{name}'", hint=hint)
        if len(self.channels.names()) >= limits.CHANNELS:
            raise Refused(f"there are {limits.CHANNELS} channels already, which is the limit")
        try:
            find_program(kind)
        except ConfigError as exc:
            raise Refused(exc.message, hint=exc.hint) from None
        write_channel(path, kind, call.parameters["settings"] or {})
        await self.channels.load({})
        return {"channel": await self._one(self.channels.get(name))}

    async def _show(self, call: Call) -> Json:
        channel = self.channels.get(call.parameters["name"])
        return {
            "channel": await self._one(channel),
            "file": str(channel.file),
            "directory": str(paths.channel_state(channel.name)),
            "socket": str(paths.channel_socket(channel.name)),
            "credential": credential_of(channel.name),
        }

    async def _restart(self, call: Call) -> Json:
        channel = self.channels.get(call.parameters["name"])
        if channel.problem is not None:
            raise ConfigError(channel.problem.message, hint=channel.problem.hint)
        await self.channels.restart(channel)
        return {}

    async def _remove(self, call: Call) -> Json:
        channel = self.channels.get(call.parameters["name"])
        trash = await self.channels.remove(channel)
        for row in await self.db.read("open_places", channel=channel.name):
            place = (channel.name, row["chat"], row["thread"])
            where = dict(zip(("channel", "chat", "thread"), place, strict=True))
            for session in await self.db.read("busy_sessions", **where):
                await self.sessions.turns.stop_turn(messages.session_row(session), place)

        def close(tx: Transaction) -> None:
            """Another platform of this name inherits nothing."""
            reason = f"the channel '{channel.name}' was removed"
            tx.all("bury_deliveries", channel=channel.name, reason=reason, now=now_ms())
            for chat in tx.all("chats_of_channel", channel=channel.name):
                block_chat(tx, chat["id"])
            tx.all("unlink_channel", channel=channel.name)
            end_answered(tx)
            tx.all("forget_channel", name=channel.name)

        await self.db.write(close)
        return {"trash": None if trash is None else str(trash)}
