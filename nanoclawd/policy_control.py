"""The part of io.nanoclaw.Control that is about what agents may reach."""

from __future__ import annotations

from nanoclawd import policy
from nanoclawd.errors import NotFound, Refused
from nanoclawd.gateway_link import GatewayLink
from nanoclawd.policy import Denied
from nanoclawd.registry import Registry
from nanoclawd.server import Call, Method
from nanoclawd.wire import Json


class PolicyControl:
    def __init__(self, *, registry: Registry, gateway: GatewayLink) -> None:
        self._registry = registry
        self._gateway = gateway
        self.methods = {
            "ShowPolicy": Method(handler=self._show),
            "AddRule": Method(handler=self._add_rule),
            "TestPolicy": Method(handler=self._test),
        }

    async def _show(self, call: Call) -> Json:
        agent = self._registry.get(call.parameters["name"])
        rules = self._registry.policy(agent.name)
        return {"rules": [*map(policy.to_json, rules)]}

    async def _add_rule(self, call: Call) -> Json:
        agent = await self._registry.add_rule(
            call.parameters["name"], policy.from_json(call.parameters["rule"])
        )
        await self._gateway.refresh()
        return {"rules": [*map(policy.to_json, self._registry.policy(agent.name))]}

    async def _test(self, call: Call) -> Json:
        agent = self._registry.get(call.parameters["name"])
        try:
            ask = policy.parse_url(call.parameters["method"], call.parameters["url"])
        except Denied as exc:
            raise Refused(f"the gateway would not understand this: {exc}") from None
        decision = policy.decide(self._registry.policy(agent.name), ask)
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
                allowed, reason, message = False, exc.reason, str(exc)
        return {
            "allowed": allowed,
            "way": ask.way,
            "rule": decision.number or None,
            "reason": reason,
            "message": message,
        }
