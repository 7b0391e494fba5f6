"""io.nanoclaw.Control: what a person may ask of the router."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoclawd import budget, images, journal, limits, paths, quadlet, queue, retention
from nanoclawd.agents import DEFAULT_IMAGE, KEYS, AgentConfig, Mount, is_image
from nanoclawd.answers import Answers
from nanoclawd.approval_control import ApprovalControl
from nanoclawd.approvals import Approvals
from nanoclawd.audit import Audit
from nanoclawd.audit_control import AuditControl
from nanoclawd.channel_control import ChannelControl
from nanoclawd.channels import Channels
from nanoclawd.db import Database, Transaction, now_ms
from nanoclawd.destination_control import DestinationControl
from nanoclawd.errors import Failed, NanoclawError, NotFound, Refused, Unavailable
from nanoclawd.gateway_link import GatewayLink
from nanoclawd.guard_control import GuardControl
from nanoclawd.idl import read_interface
from nanoclawd.ids import AgentName, parse_agent_name, unit_name
from nanoclawd.message_control import MessageControl
from nanoclawd.messages import SessionRow, session_row
from nanoclawd.outbox import Delivery
from nanoclawd.outlets import Outlets
from nanoclawd.people_control import PeopleControl
from nanoclawd.policy_control import PolicyControl
from nanoclawd.registry import Agent, Registry, config_file
from nanoclawd.sandbox import Check
from nanoclawd.server import Call, Method, Service
from nanoclawd.session import SessionState
from nanoclawd.sessions import Sessions
from nanoclawd.settings import read_settings
from nanoclawd.systemd import Systemd
from nanoclawd.usage import Usage
from nanoclawd.usage_control import UsageControl
from nanoclawd.version import VERSION
from nanoclawd.wire import Json

INTERFACE = "io.nanoclaw.Control"
UNITS = ("nanoclaw.service", "nanoclaw.socket", "nanoclaw-channel.socket", "nanoclaw-gateway.service")
#: Fields of the type QueueCounts.
_COUNTS = (
    *("queued", "deferred", "leased", "answered", "stopped", "dead"),
    *("deliveriesPending", "deliveriesSent", "deliveriesDead"),
)
#: Parameters of AddAgent() and SetAgent() by the key of the agent's file; mounts have a form of their own.
_KEYS = {
    re.sub("_(.)", lambda found: found[1].upper(), key): key
    for key in KEYS
    if key not in ("mounts", "policy", "budget", "guard")
}


@dataclass(kw_only=True, eq=False)
class ControlService:
    db: Database
    systemd: Systemd
    registry: Registry
    sessions: Sessions
    outlets: Outlets
    gateway: GatewayLink
    audit: Audit
    people: PeopleControl
    channel_list: Channels
    usage: Usage
    approvals: Approvals
    answers: Answers
    sandbox: list[Check]

    def __post_init__(self) -> None:
        self.on_reload: Callable[[], None] = lambda: None  #: the settings may have changed
        self._started_at = time.time()
        self._audit_control = AuditControl(self.db, self.audit)
        self._channel_control = ChannelControl(
            db=self.db,
            systemd=self.systemd,
            channels=self.channel_list,
            sessions=self.sessions,
            outlets=self.outlets,
        )
        self._usage_control = UsageControl(self.usage, self.registry, self.gateway)
        methods = {
            "Status": Method(handler=self._status),
            "AddAgent": Method(handler=self._add_agent),
            "SetAgent": Method(handler=self._set_agent),
            "ListAgents": Method(handler=self._list_agents),
            "ShowAgent": Method(handler=self._show_agent),
            "RemoveAgent": Method(handler=self._remove_agent),
            "StartAgent": Method(handler=self._start_agent),
            "StopAgent": Method(handler=self._stop_agent),
            "RestartAgent": Method(handler=self._restart_agent),
            "ListSessions": Method(handler=self._list_sessions),
            "ResetSession": Method(handler=self._reset_session),
            "CloseSession": Method(handler=self._close_session),
            "BuildImage": Method(handler=self._build_image),
            "Reload": Method(handler=self._reload),
            "Backup": Method(handler=self._backup),
            "StopAll": Method(handler=self._stop_all),
            "StartAll": Method(handler=self._start_all),
            **PolicyControl(
                registry=self.registry, policy_of=self.approvals.policy, changed=self._change_policies
            ).methods,
            **ApprovalControl(
                db=self.db, registry=self.registry, approvals=self.approvals, answers=self.answers
            ).methods,
            **MessageControl(self.db, self.registry, self.sessions, self.outlets).methods,
            **self.people.methods,
            **DestinationControl(db=self.db, registry=self.registry).methods,
            **self._channel_control.methods,
            **self._audit_control.methods,
            **self._usage_control.methods,
            **GuardControl(self.registry).methods,
        }
        self.service = Service(
            interface=read_interface(paths.INTERFACES / f"{INTERFACE}.varlink"),
            methods={name: self._audit_control.noted(name, method) for name, method in methods.items()},
        )

    # --- the whole ---------------------------------------------------------------------------------

    async def _status(self, call: Call) -> Json:
        problem, gateway = "", None
        try:
            gateway = await self.gateway.status()
        except NanoclawError as exc:
            problem = exc.message
        counts = Counter({row["state"]: row["number"] for row in await self.db.read("count_states")})
        (approvals,) = await self.db.read("count_approvals", agent="")
        sessions = [session async for session in self._describe_sessions(None)]
        # What goes on comes first, if there is more than a reply can hold.
        active = sorted(
            (s for s in sessions if s["queued"] or s["state"] != SessionState.IDLE),
            key=lambda s: s["state"] in (SessionState.IDLE, SessionState.QUEUED),
        )
        agents = Counter(self.registry.get(name).state for name in self.registry.names())
        return {
            "version": VERSION,
            "pid": os.getpid(),
            "startedAt": self._started_at,
            "held": self.sessions.held,
            "units": await self._units(),
            "agents": agents.total(),
            "agentsHeld": agents["held"],
            "agentsBroken": agents["broken"],
            "sessionCount": len(sessions),
            "sessions": active[: limits.SESSIONS_SHOWN],
            "queue": {name: counts[name] for name in _COUNTS},
            "budgetStops": [stop async for stop in self._usage_control.stops()],
            "approvalsPending": approvals["total"],
            "channels": [channel async for channel in self._channel_control.list()],
            "sandbox": [
                {"name": check.name, "active": check.active, "detail": check.detail}
                for check in self.sandbox
            ],
            "gateway": gateway,
            "gatewayProblem": problem,
        }

    async def _units(self) -> list[Json]:
        units = []
        for unit in sorted(
            await self.systemd.list_units([*UNITS, "nanoclaw-*@*.service"]), key=lambda u: u.name
        ):
            memory = None
            if unit.name.endswith(".service") and unit.active_state == "active":
                memory = await self.systemd.unit_property(unit.name, "Service", "MemoryCurrent")
            units.append(
                {
                    "name": unit.name,
                    "activeState": unit.active_state,
                    "subState": unit.sub_state,
                    # UINT64_MAX: systemd does not know, e.g. without the memory controller.
                    "memoryBytes": memory if memory is not None and memory < 1 << 63 else None,
                }
            )
        return units

    async def _stop_all(self, call: Call) -> Json:
        await self.sessions.hold_all()
        return {}

    async def _start_all(self, call: Call) -> Json:
        await self.sessions.release_all()
        return {}

    async def _backup(self, call: Call) -> Json:
        file = paths.state() / "backups" / f"nanoclaw.db-{now_ms()}"
        file.parent.mkdir(mode=0o700, exist_ok=True)
        await self.db.backup(file)
        return {"file": str(file)}

    async def _reload(self, call: Call) -> Json:
        problems = await self.reload()
        return {"agents": len(self.registry.names()), "problems": problems}

    async def reload(self) -> list[str]:
        """Read all configuration again; returns what is wrong with some of it. Raises ConfigError."""
        # What it takes from agents must not fail for want of room.
        await self._audit_control.note_late("Reload", {})
        self.registry.settings = read_settings()
        self.sessions.resize(self.registry.settings.max_sessions)
        self.on_reload()
        problems = [*await self.registry.load(), *await self.channel_list.load({})]
        await self._refresh_gateway()
        await self.start_waiting()
        return problems

    async def _refresh_gateway(self) -> None:
        """Hand over policies that may have changed. Goes on if the gateway is away: it gets them later."""
        try:
            await self._change_policies()
        except Unavailable as exc:
            journal.warning("policy-not-taken", f"{exc}, going on")

    async def _change_policies(self) -> None:
        """Have policies that may have changed take effect. Raises Unavailable."""
        await self.approvals.end_decided()
        await self.gateway.refresh()

    async def start_waiting(self) -> None:
        """Wake every session that has work and an agent that may run; give up those whose agent is gone."""
        rows = [session_row(row) for row in await self.db.read("find_work")]
        names = self.registry.names()
        gone = {row.agent for row in (*rows, *(s.row for s in self.sessions.live()))}.difference(names)
        for agent in gone:
            journal.warning("agent-gone", "its file is not there any more, giving up its work", agent=agent)
            await self._give_up(agent, f"there is no agent '{agent}' any more")
        for row in rows:
            if row.agent in names:
                self.sessions.wake(row)

    async def _give_up(self, agent: AgentName, reason: str) -> None:
        """Stop all containers of an agent, and tell its chats that nobody will answer."""
        await self.sessions.stop_containers(agent)

        def bury(tx: Transaction) -> list[Delivery]:
            for session in map(session_row, tx.all("list_sessions", agent=agent)):
                queue.bury_session(tx, session, reason)
            return self.outlets.claim(tx)

        self.outlets.publish(await self.db.write(bury))

    # --- agents ------------------------------------------------------------------------------------

    async def _add_agent(self, call: Call) -> Json:
        parameters = call.parameters
        parse_agent_name(parameters["name"])
        await _require_image(DEFAULT_IMAGE if parameters["image"] is None else parameters["image"])
        if self.registry.find(AgentName(parameters["name"])) is None:
            # Of one that had the name, and went with its file.
            await self.approvals.forget(parameters["name"])
        agent = await self.registry.add(parameters["name"], _values(parameters), parameters["instructions"])
        return await self._describe(agent)

    async def _set_agent(self, call: Call) -> Json:
        parameters = call.parameters
        values = _values(parameters)
        if not values and parameters["instructions"] is None:
            raise Refused("nothing to change was given")
        if "image" in values:
            await _require_image(values["image"])
        agent = await self.registry.change(parameters["name"], values, parameters["instructions"])
        await self._refresh_gateway()
        await self.start_waiting()  # what was broken may run now
        return await self._describe(agent)

    async def _list_agents(self, call: Call) -> Json:
        async def describe() -> AsyncIterator[Json]:
            for name in self.registry.names():
                if (agent := self.registry.find(AgentName(name))) is not None:  # not removed meanwhile
                    yield {"name": name, **await self._describe(agent)}

        return await call.send_all(describe(), {"name": None, "configuration": None, "runtime": None})

    async def _show_agent(self, call: Call) -> Json:
        agent = self.registry.get(call.parameters["name"])
        return {
            **await self._describe(agent),
            "budget": budget.to_json(self.registry.budget(agent.name)),
            "instructions": self.registry.instructions(agent.name),
            "file": str(config_file(agent.name)),
            "workspace": str(paths.workspace(agent.name)),
            "unitFile": str(quadlet.unit_file(agent.name, agent.index)),
            "dropInDirectory": str(quadlet.drop_in_directory(agent.name)),
        }

    async def _remove_agent(self, call: Call) -> Json:
        agent = await self.registry.hold(call.parameters["name"], True)
        await self._give_up(agent.name, f"agent '{agent.name}' was removed")
        trash = await self.registry.remove(agent.name)
        await self.approvals.forget(agent.name)
        return {"trash": str(trash) if trash else None}

    async def _start_agent(self, call: Call) -> Json:
        agent = await self.registry.hold(call.parameters["name"], False)
        self.registry.config(agent.name)  # broken: say so, it will not run
        journal.info("agent-started", agent=agent.name)
        await self.start_waiting()
        return {}

    async def _stop_agent(self, call: Call) -> Json:
        agent = await self.registry.hold(call.parameters["name"], True)
        journal.info("agent-stopped", agent=agent.name)
        await self.sessions.stop_containers(agent.name)
        return {}

    async def _restart_agent(self, call: Call) -> Json:
        agent = self.registry.get(call.parameters["name"])
        await self.sessions.stop_containers(agent.name)
        await self.start_waiting()
        return {}

    async def _describe(self, agent: Agent) -> Json:
        rows = await self.db.read("list_sessions", agent=agent.name)
        running = [s for s in self.sessions.live() if s.row.agent == agent.name and _has_container(s.state)]
        return {
            "configuration": None if agent.config is None else _configuration(agent.config),
            "runtime": {
                "state": "held" if agent.state == "ready" and self.sessions.held else agent.state,
                "problem": self.sessions.explain_hold(agent.name),
                "unitTemplate": f"nanoclaw-{agent.name}@.service",
                "hostUid": quadlet.host_uid(agent.index),
                "sessions": len(rows),
                "running": len(running),
                "queued": sum(row["queued"] for row in rows),
            },
        }

    # --- sessions and images -----------------------------------------------------------------------

    async def _list_sessions(self, call: Call) -> Json:
        if call.parameters["agent"] is not None:
            self.registry.get(call.parameters["agent"])
        sessions = self._describe_sessions(call.parameters["agent"])
        return await call.send_all(({"session": session} async for session in sessions), {"session": None})

    async def _reset_session(self, call: Call) -> Json:
        return {"trash": await self._forget(call, self.sessions.begin_anew)}

    async def _close_session(self, call: Call) -> Json:
        return {"trash": await self._forget(call, self.sessions.close)}

    async def _forget(self, call: Call, act: Callable[[SessionRow], Awaitable[Path | None]]) -> str | None:
        """Do `act` to the session that a call names, and return where went what was kept of it."""
        agent, name = call.parameters["agent"], call.parameters["session"]
        self.registry.get(agent)
        rows = await self.db.read("list_sessions", agent=agent)
        session = next((session_row(row) for row in rows if row["name"] == name), None)
        if session is None:
            hint = f"'nanoclawctl session list {agent}' shows all"
            raise NotFound(f"agent '{agent}' has no session '{name[:64]}'", hint=hint)
        try:
            trash = await act(session)
        except TimeoutError:
            hint = f"'systemctl --user status {unit_name(session.agent, session.name)}' says more"
            raise Unavailable(f"the container of session '{name}' does not end", hint=hint) from None
        return None if trash is None else str(trash)

    async def _describe_sessions(self, agent: str | None) -> AsyncIterator[Json]:
        heads = {row["id"]: row for row in await self.db.read("find_work")}
        days = self.registry.settings.session_days
        for row in await self.db.read("list_sessions", agent=agent):
            session = session_row(row)
            live = self.sessions.find(session)
            head = heads.get(session.id)
            if row["closed_at"] is not None and head is None:
                continue
            yield {
                "agent": session.agent,
                "session": session.name,
                "unit": unit_name(session.agent, session.name),
                "channel": session.channel,
                "chat": session.chat,
                "thread": session.thread,
                "state": live.state if live else SessionState.IDLE,
                "detail": self.sessions.explain(head) if head else "",
                "queued": row["queued"],
                "message": row["message"],
                "usedAt": row["used_at"] / 1000,
                "closesAt": row["used_at"] / 1000 + days * retention.DAY_S if days else None,
            }

    async def _build_image(self, call: Call) -> Json:
        parameters = call.parameters

        async def report(line: str) -> None:
            if call.more:
                await call.send({"line": line[: limits.ACTIVITY_BYTES], "imageId": None})

        directory, image = parameters["baseDirectory"], parameters["image"] or DEFAULT_IMAGE
        image_id = await images.build_image(
            image,
            base=parameters["base"],
            base_directory=Path(directory) if directory is not None else None,
            progress=report,
        )
        journal.info("image-built", image=image, image_id=image_id)
        return {"line": None, "imageId": image_id}


async def _require_image(image: str) -> None:
    """Raise Refused if there is no such image: now somebody reads what to do. Goes on if Podman is away."""
    if not is_image(image):
        return  # what parses it will say so better
    try:
        await images.require_image(image)
    except NotFound as exc:
        raise Refused(exc.message, hint=exc.hint) from None
    except (Failed, Unavailable) as exc:
        journal.warning("image-unchecked", f"{exc}, going on", image=image)


def _values(parameters: Json) -> dict[str, Any]:
    """Return the keys of an agent's file that a call sets."""
    values = {key: parameters[name] for name, key in _KEYS.items() if parameters[name] is not None}
    if parameters["mounts"] is not None:
        values["mounts"] = tuple(
            Mount(source=m["source"], target=m["target"], read_only=m["readOnly"])
            for m in parameters["mounts"]
        )
    return values


def _configuration(config: AgentConfig) -> Json:
    return {
        "name": config.name,
        **{name: getattr(config, key) for name, key in _KEYS.items()},
        "mounts": [{"source": m.source, "target": m.target, "readOnly": m.read_only} for m in config.mounts],
    }


def _has_container(state: SessionState) -> bool:
    return state not in (SessionState.IDLE, SessionState.QUEUED)
