"""The part of io.nanoclaw.Control that is about what agents may reach."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from nanoclawd import policy
from nanoclawd.errors import NotFound, Refused
from nanoclawd.ids import AgentName
from nanoclawd.policy import Denied, Policy
from nanoclawd.registry import Registry
from nanoclawd.server import Call, Method
from nanoclawd.wire import Json


class PolicyControl:
    def __init__(
        self,
        *,
        registry: Registry,
        policy_of: Callable[[AgentName], Policy],
        changed: Callable[[], Awaitable[None]],
    ) -> None:
        """`policy_of` tells all that decides about an agent; `changed` has it take effect."""
        self._registry = registry
        self._policy_of = policy_of
        self._changed = changed
        self.methods = {
            "ShowPolicy": Method(handler=self._show),
            "AddRule": Method(handler=self._add_rule),
            "TestPolicy": Method(handler=self._test),
        }

    async def _show(self, call: Call) -> Json:
        agent = self._registry.get(call.parameters["name"])
        found = self._policy_of(agent.name)
        return {"unknown": found.unknown, "rules": [*map(policy.to_json, found.rules)]}

    async def _add_rule(self, call: Call) -> Json:
        agent = await self._registry.add_rule(
            call.parameters["name"], policy.from_json(call.parameters["rule"])
        )
        await self._changed()
        return {"rules": [*map(policy.to_json, self._policy_of(agent.name).rules)]}

    async def _test(self, call: Call) -> Json:
        agent = self._registry.get(call.parameters["name"])
        try:
            ask = policy.parse_url(call.parameters["method"], call.parameters["url"])
        except Denied as exc:
            raise Refused(f"the gateway would not understand this: {exc}") from None
        found = self._policy_of(agent.name)
        decision = policy.decide(found.rules, ask, found.unknown)
        allowed, reason, message = decision.allowed, decision.reason, decision.message
        if agent.config is None:
            message = f"The agent's file cannot be read, and so it may reach nothing: {agent.problem}"
        if allowed and ask.route:
            route = self._registry.settings.routes.get(ask.route)
            if route is None:
                raise NotFound(
                    f"there is no route '{ask.route}'", hint="add it to [[routes]] in nanoclaw.toml"
                )
            try:
                route.check(ask)
            except Denied as exc:
                allowed, reason, message = False, exc.reason, f"{message} But: {exc}"
        return {
            "allowed": allowed,
            "way": ask.way,
            "rule": decision.number or None,
            "reason": reason,
            "message": message,
        }
