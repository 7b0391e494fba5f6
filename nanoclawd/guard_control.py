"""The part of io.nanoclaw.Control that is about the guard's table."""

from __future__ import annotations

from typing import Any

from nanoclawd.errors import Refused
from nanoclawd.privileges import TABLE, Action
from nanoclawd.registry import Registry
from nanoclawd.server import Call, Method
from nanoclawd.wire import Json


class GuardControl:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.methods = {
            "ShowGuard": Method(handler=self._show),
            "SetGuard": Method(handler=self._set),
            "SetGuardApprovals": Method(handler=self._set_approvals),
        }

    async def _show(self, call: Call) -> Json:
        installation, own = self._registry.settings.guard, None
        counts = installation
        if (name := call.parameters["name"]) is not None:
            agent = self._registry.get(name)
            own = agent.config and agent.config.guard
            counts = self._registry.privileges(agent.name)
        rows = [
            {
                "action": action,
                "what": row.what,
                "agent": getattr(own, action, None),
                "installation": getattr(installation, action),
                "counts": counts.say(action),
            }
            for action, row in TABLE.items()
        ]
        return {"rows": rows, "approvals": counts.needed}

    async def _set(self, call: Call) -> Json:
        action = call.parameters["action"]
        if action not in set(Action):
            raise Refused(f"there is no action '{action[:32]}'", hint=f"there are {', '.join(Action)}")
        return await self._change(call, action, call.parameters["answer"])

    async def _set_approvals(self, call: Call) -> Json:
        return await self._change(call, "approvals", call.parameters["approvals"])

    async def _change(self, call: Call, key: str, value: Any) -> Json:
        await self._registry.set_table(call.parameters["name"], "guard", {key: value})
        return {}
