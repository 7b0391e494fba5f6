"""The part of io.nanoclaw.Control that is about what models have cost."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from nanoclawd import budget
from nanoclawd.errors import Refused
from nanoclawd.gateway_link import GatewayLink
from nanoclawd.ids import AgentName
from nanoclawd.registry import Registry
from nanoclawd.server import Call, Method
from nanoclawd.usage import Usage
from nanoclawd.wire import Json


class UsageControl:
    def __init__(self, usage: Usage, registry: Registry, gateway: GatewayLink) -> None:
        self._usage = usage
        self._registry = registry
        self._gateway = gateway
        self.methods = {
            "ListUsage": Method(handler=self._list),
            "SetBudget": Method(handler=self._set_budget),
        }

    async def _set_budget(self, call: Call) -> Json:
        changes = budget.changes_from_json(call.parameters["budget"])
        if not changes:
            raise Refused("nothing to change was given")
        plain = {key: budget.plain(key, value) for key, value in changes.items()}
        agent = await self._registry.set_table(call.parameters["name"], "budget", plain)
        await self._gateway.refresh()
        return {"budget": budget.to_json(self._registry.budget(agent.name))}

    async def _list(self, call: Call) -> Json:
        since = call.parameters["since"]
        first = "" if since is None else time.strftime("%Y-%m-%d", time.localtime(since))
        rows = self._usage.list(call.parameters["by"], call.parameters["agent"], first)
        return await call.send_all(({"usage": row} async for row in rows), {"usage": None})

    async def stops(self) -> AsyncIterator[Json]:
        """Yield what Status() has of budgets that are used up."""
        async for agent, session, stop in self._usage.stops(map(AgentName, self._registry.names())):
            yield {"agent": agent, "session": session, "limit": stop.name, "message": str(stop)}
