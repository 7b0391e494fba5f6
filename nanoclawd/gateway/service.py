"""io.nanoclaw.Gateway: what the router may ask of the gateway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from nanoclawd import asking, budget, journal, paths
from nanoclawd.budget import Spent
from nanoclawd.errors import ConfigError, Refused
from nanoclawd.gateway.sessions import Gateway, check_listener
from nanoclawd.idl import read_interface
from nanoclawd.ids import AgentName, SessionName, parse_agent_name, parse_session_name, unit_name
from nanoclawd.policy import Policy, Unknown, from_json
from nanoclawd.routes import Route
from nanoclawd.sandbox import Check
from nanoclawd.server import Call, Method, Service
from nanoclawd.version import VERSION
from nanoclawd.wire import Json


class GatewayService:
    """The handlers, and the service that they make."""

    def __init__(self, gateway: Gateway, sandbox: Sequence[Check]) -> None:
        self._gateway = gateway
        self._sandbox = sandbox
        self.service = Service(
            interface=read_interface(paths.INTERFACES / "io.nanoclaw.Gateway.varlink"),
            methods={
                "SetPolicy": Method(handler=self._set_policy),
                "Attach": Method(handler=self._attach),
                "Detach": Method(handler=self._detach),
                "Status": Method(handler=self._status),
                # With "more" a reader that hangs up is noticed, though there is nothing to tell it.
                "ReadRecords": Method(handler=self._read_records, more=True),
                "ReadUsage": Method(handler=self._read_usage, more=True),
                "GetLife": Method(handler=self._get_life),
                "SetBudget": Method(handler=self._set_budget),
                "ReadHolds": Method(handler=self._read_holds, more=True),
                "AnswerHold": Method(handler=self._answer_hold),
            },
        )

    async def _attach(self, call: Call) -> Json:
        descriptor = call.connection.take_fd()
        if descriptor is None:
            raise Refused("no descriptor came with the call", hint="send the session's listening socket")
        listener = check_listener(descriptor)
        try:
            agent, session = _session(call)
            self._gateway.attach(agent, session, listener)
        except Refused:
            listener.close()
            raise
        journal.info("attached", agent=agent, session=session, unit=unit_name(agent, session))
        return {}

    async def _set_policy(self, call: Call) -> Json:
        agent = parse_agent_name(call.parameters["agent"])
        rules = tuple(map(from_json, call.parameters["rules"]))
        policy = Policy(rules=rules, unknown=Unknown(call.parameters["unknown"]))
        self._gateway.set_policy(agent, policy)
        journal.info("policy-set", agent=agent, rules=len(rules))
        return {}

    async def _detach(self, call: Call) -> Json:
        agent, session = _session(call)
        self._gateway.detach(agent, session)
        journal.info("detached", agent=agent, session=session, unit=unit_name(agent, session))
        return {}

    async def _read_records(self, call: Call) -> Json:
        trail = self._gateway.trail
        return {"life": trail.life, "records": await trail.read(call.parameters["after"])}

    async def _read_usage(self, call: Call) -> Json:
        ledger = self._gateway.ledger
        return {"life": ledger.life, "sums": await ledger.read(call.parameters["after"])}

    async def _get_life(self, call: Call) -> Json:
        return {"life": self._gateway.ledger.life}

    async def _set_budget(self, call: Call) -> Json:
        told = call.parameters
        agent, limit = parse_agent_name(told["agent"]), budget.from_json(told["budget"])
        sessions = {
            parse_session_name(each["session"]): Spent(each["tokens"], each["microdollars"])
            for each in told["sessions"]
        }
        before = Spent(told["tokens"], told["microdollars"])
        self._gateway.ledger.set_budget(agent, limit, told["day"], before, sessions)
        return {}

    async def _read_holds(self, call: Call) -> Json:
        new, gone = await self._gateway.holds.read(call.parameters["known"])
        holds = [
            {"id": hold.id, "sha256": hold.sha256, "request": asking.to_json(hold.request)} for hold in new
        ]
        return {"holds": holds, "gone": gone}

    async def _answer_hold(self, call: Call) -> Json:
        parameters, holds = call.parameters, self._gateway.holds
        hold, message = (parameters["id"], parameters["sha256"]), parameters["message"]
        if parameters["answer"] == "pending":
            return {"taken": holds.note_pending(*hold, message)}
        return {"taken": holds.answer(*hold, allowed=parameters["answer"] == "allowed", message=message)}

    async def _status(self, call: Call) -> Json:
        settings = self._gateway.settings
        if isinstance(settings, ConfigError):
            routes = [{"name": "", "endpoint": "", "credential": "", "credentialState": str(settings)}]
        else:
            routes = [
                {
                    "name": route.name,
                    "endpoint": str(route.endpoint),
                    "credential": route.credential or "",
                    "credentialState": await self._describe(route),
                }
                for route in settings.routes.values()
            ]
        return {
            "version": VERSION,
            "sessions": [f"{agent}/{session}" for agent, session in sorted(self._gateway.sessions)],
            "routes": routes,
            "sandbox": [asdict(check) for check in self._sandbox],
        }

    async def _describe(self, route: Route) -> str:
        return await self._gateway.keys.describe(route.credential) if route.credential else "ok"


def _session(call: Call) -> tuple[AgentName, SessionName]:
    return parse_agent_name(call.parameters["agent"]), parse_session_name(call.parameters["session"])
