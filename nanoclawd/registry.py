"""The agents that there are: files of the person, units that follow, rows that remember the rest."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanoclawd import agents, files, journal, limits, mounts, paths, quadlet
from nanoclawd.agents import AgentConfig
from nanoclawd.budget import Budget
from nanoclawd.db import Database, Row, Transaction, now_ms
from nanoclawd.errors import ConfigError, Failed, NanoclawError, NotFound, Refused, Unavailable
from nanoclawd.ids import AgentName, no_agent, parse_agent_name
from nanoclawd.policy import Policy, Rule, with_rule
from nanoclawd.privileges import Privileges
from nanoclawd.quadlet import UnitSpec
from nanoclawd.routing import forget_agent
from nanoclawd.settings import Settings
from nanoclawd.systemd import Systemd
from nanoclawd.trash import move_to_trash
from nanoclawd.version import VERSION


@dataclass(frozen=True, kw_only=True, slots=True)
class Agent:
    """One agent as it is at this moment."""

    name: AgentName
    config: AgentConfig | None  #: None if its file is broken
    index: int  #: of its uid; -1 while it has none
    held: bool = False
    problem: NanoclawError | None = None  #: why it cannot run

    @property
    def state(self) -> str:
        return "broken" if self.problem else "held" if self.held else "ready"


class Registry:
    """All agents by name. Changes go one at a time: file, then unit, then one reload; or all as before."""

    def __init__(self, *, db: Database, systemd: Systemd, settings: Settings) -> None:
        self._db = db
        self._systemd = systemd
        self._agents: dict[AgentName, Agent] = {}
        self._changing = asyncio.Lock()
        self.settings = settings

    # --- looking -----------------------------------------------------------------------------------

    def names(self) -> list[str]:
        return sorted(self._agents)

    def summary(self) -> str:
        """Say in a few words what there is, for `systemctl status`."""
        broken = sum(agent.state == "broken" for agent in self._agents.values())
        return f"{len(self._agents)} agents" + (f" ({broken} broken)" if broken else "")

    def get(self, name: str) -> Agent:
        """Return the agent. Raises NotFound."""
        agent = self._agents.get(AgentName(name))
        if agent is None:
            raise no_agent(name, self._agents)
        return agent

    def find(self, name: AgentName) -> Agent | None:
        return self._agents.get(name)

    def config(self, name: str) -> AgentConfig:
        """Return the configuration of an agent that can run. Raises NotFound, ConfigError."""
        agent = self.get(name)
        if agent.problem is not None:
            raise ConfigError(agent.problem.message, hint=agent.problem.hint)
        assert agent.config is not None
        return agent.config

    def policy(self, name: AgentName) -> Policy:
        """Return what the agent may reach; nothing, if its file is broken or gone."""
        agent = self._agents.get(name)
        return Policy() if agent is None or agent.config is None else agent.config.all_policy

    def budget(self, name: AgentName) -> Budget:
        """Return what the agent may spend."""
        agent, default = self._agents.get(name), self.settings.budget
        return agent.config.budget.or_default(default) if agent and agent.config else default

    def privileges(self, name: AgentName) -> Privileges:
        """Return what the agent may have the router do; as by default, if its file is broken."""
        agent, default = self._agents.get(name), self.settings.guard
        return agent.config.guard.or_default(default) if agent and agent.config else default

    def instructions(self, name: AgentName) -> str:
        """Return the text of NAME.md, read anew: a person may have changed it. Raises ConfigError."""
        return agents.read_instructions(config_file(name))

    def may_run(self, name: AgentName) -> bool:
        agent = self._agents.get(name)
        return agent is not None and agent.state == "ready"

    # --- changing ----------------------------------------------------------------------------------

    async def load(self) -> list[str]:
        """Read all files again and make the units follow; returns what is wrong, one line a problem.

        A broken file stops only its own agent, which keeps its unit; a unit without a file goes.
        """
        async with self._changing:
            found, misnamed = await asyncio.to_thread(agents.read_agents, paths.agents())
            rows = await self._db.write(lambda tx: _ensure_rows(tx, found))
            loaded: dict[AgentName, Agent] = {}
            specs: list[UnitSpec] = []
            for name, config in found.items():
                row = rows[name]
                agent = Agent(name=name, config=None, index=row["uid_index"], held=bool(row["held"]))
                try:
                    if isinstance(config, ConfigError):
                        raise config
                    agent = replace(agent, config=config)
                    specs.append(self._spec(agent))
                except NanoclawError as exc:
                    agent = replace(agent, problem=exc)
                loaded[name] = agent
            units = await asyncio.to_thread(quadlet.installed_units)
            failures = await self._follow(specs, [name for name, _ in units if name not in loaded])
            loaded |= {name: replace(loaded[name], problem=failure) for name, failure in failures.items()}
            self._agents = loaded
        problems = {name: str(agent.problem) for name, agent in loaded.items() if agent.problem}
        for name, problem in problems.items():
            journal.error("agent-broken", problem, agent=name)
        for stranger in misnamed:
            journal.warning("agent-misnamed", f"{stranger}, ignoring it")
        return [*problems.values(), *map(str, misnamed)]

    async def _follow(
        self, specs: Sequence[UnitSpec], orphans: Sequence[AgentName] = ()
    ) -> dict[AgentName, NanoclawError]:
        """Install what is stale, remove the units of orphans, reload systemd once if anything changed.

        Returns which agents cannot run, and why.
        """
        stale = await asyncio.to_thread(quadlet.stale_units, specs)
        results = await quadlet.install_units(stale) if stale else {}
        failures = {name: failure for name, failure in results.items() if failure is not None}
        removed = await asyncio.to_thread(quadlet.remove_units, orphans) if orphans else []
        if len(stale) > len(failures) or removed:
            await self._systemd.reload()
            journal.info("units-written", units=len(stale) - len(failures), version=VERSION)
        return failures | await asyncio.to_thread(_ensure_directories, specs)

    async def add(self, name: str, values: Mapping[str, Any], instructions: str | None) -> Agent:
        """Add an agent; on any failure nothing of it stays. Raises Refused, ConfigError, Failed."""
        agent_name = parse_agent_name(name)
        async with self._changing:
            if agent_name in self._agents or config_file(agent_name).exists():
                hint = f"'nanoclawctl agent set {agent_name}' changes it"
                raise Refused(f"there is an agent named '{agent_name}'", hint=hint)
            if len(self._agents) >= limits.AGENTS:
                raise Refused(f"there are {limits.AGENTS} agents already, which is the limit")
            row = (await self._db.write(lambda tx: _ensure_rows(tx, [agent_name])))[agent_name]
            agent = Agent(name=agent_name, config=None, index=row["uid_index"])
            try:
                with _restored_on_failure(agent_name) as path:
                    agents.write_agent(path, AgentConfig(name=agent_name, **values))
                    agent = await self._install(agent, path, instructions)
            except BaseException:
                with suppress(Unavailable):  # a row without a file harms nothing
                    await self._db.write(lambda tx: tx.all("remove_agent", name=agent_name))
                raise
            self._agents[agent_name] = agent
        journal.info("agent-added", agent=agent_name)
        return agent

    async def change(self, name: str, values: Mapping[str, Any], instructions: str | None) -> Agent:
        """Change keys of an agent's file; on any failure file and unit are as before."""
        async with self._changing:
            before = self.get(name)
            with _restored_on_failure(before.name) as path:
                agents.change_agent(path, values)
                agent = await self._install(before, path, instructions)
            self._agents[before.name] = agent
        journal.info("agent-changed", agent=agent.name, keys=",".join(values))
        return agent

    async def add_rule(self, name: str, rule: Rule, *, last: bool = False) -> Agent:
        """Add a rule to an agent's file, as with_rule() does; on any failure it is as before."""
        async with self._changing:
            before = self.get(name)
            path = config_file(before.name)
            rules = with_rule(agents.read_agent(path).policy, rule, last=last)
            config = agents.change_agent(path, {"policy": rules})
            agent = self._agents[before.name] = replace(before, config=config)
        journal.info("policy-changed", str(rule), agent=agent.name)
        return agent

    async def set_table(self, name: str, table: str, changes: Mapping[str, Any]) -> Agent:
        """Change keys of a table in an agent's file (None takes one out), of which no unit has anything; on
        any failure it is as before.
        """
        async with self._changing:
            before = self.get(name)
            config = agents.change_table(config_file(before.name), table, changes)
            agent = self._agents[before.name] = replace(before, config=config)
        journal.info(f"{table}-changed", agent=agent.name, keys=",".join(changes))
        return agent

    async def remove(self, name: str) -> Path | None:
        """Remove an agent whose containers are stopped; returns where its files went."""
        async with self._changing:
            agent = self.get(name)
            path = config_file(agent.name)
            files.remove_file(path)
            files.remove_file(path.with_suffix(".md"))
            await asyncio.to_thread(quadlet.remove_units, [agent.name])
            await self._systemd.reload()
            await self._db.write(lambda tx: _remove_rows(tx, agent.name))
            del self._agents[agent.name]
            trash = await asyncio.to_thread(move_to_trash, paths.agent_state(agent.name), agent.name)
        journal.info("agent-removed", agent=agent.name)
        return trash

    async def hold(self, name: str, held: bool) -> Agent:
        """Note whether the person has stopped the agent; it survives a restart."""
        async with self._changing:
            agent = self.get(name)
            await self._db.write(lambda tx: tx.all("hold_agent", name=agent.name, held=int(held)))
            self._agents[agent.name] = replace(self._agents[agent.name], held=held)
        return self._agents[agent.name]

    async def ensure_unit(self, name: AgentName) -> None:
        """Before each start: mounts are checked again, and a unit that somebody damaged is written again.

        Raises ConfigError if the agent must not start as it is.
        """
        async with self._changing:
            self.config(name)
            self.instructions(name)  # the runner would be told of nothing else, and has nobody to tell
            for failure in (await self._follow([self._spec(self._agents[name])])).values():
                raise failure

    async def _install(self, agent: Agent, path: Path, instructions: str | None) -> Agent:
        """Make the unit follow what is in the agent's file now. Raises what is wrong with it."""
        if instructions is not None:
            agents.write_instructions(path, instructions)
        agent = replace(agent, config=agents.read_agent(path), problem=None)
        for failure in (await self._follow([self._spec(agent)])).values():
            raise failure
        return agent

    def _spec(self, agent: Agent) -> UnitSpec:
        assert agent.config is not None
        return UnitSpec(
            config=agent.config,
            index=agent.index,
            mounts=mounts.resolve_mounts(agent.config.mounts, self.settings.mounts),
        )


def config_file(name: AgentName) -> Path:
    return paths.agents() / f"{name}.toml"


def _ensure_directories(specs: Iterable[UnitSpec]) -> dict[AgentName, NanoclawError]:
    """Make the agents' workspaces: their processes have uids of their own, and the person's group.

    Returns for which it failed, and why.
    """
    failures: dict[AgentName, NanoclawError] = {}
    for name in (spec.agent for spec in specs):
        try:
            _make_directory(paths.workspace(name))
            paths.workspace(name).chmod(0o770)  # whatever the umask; the state directory keeps others out
            _make_directory(paths.agent_state(name) / "sessions")
        except Failed as exc:
            failures[name] = exc
    return failures


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:  # full, or a file is in its place
        raise files.failed(path, "cannot be made", exc) from None


@contextmanager
def _restored_on_failure(name: AgentName) -> Iterator[Path]:
    """Give the path of the agent's file; it and NAME.md are as before if the block fails."""
    path = config_file(name)
    old = {file: _read_or_none(file) for file in (path, path.with_suffix(".md"))}
    try:
        yield path
    except BaseException:
        for file, text in old.items():
            try:
                if text is None:
                    files.remove_file(file)
                elif _read_or_none(file) != text:
                    files.write_text(file, text)
            except NanoclawError as exc:
                journal.error("not-restored", f"{exc}; it has the change, the unit does not")
        raise


def _read_or_none(path: Path) -> str | None:
    try:
        return files.read_text(path, limits.INSTRUCTIONS_BYTES)
    except NotFound:
        return None


def _ensure_rows(tx: Transaction, names: Iterable[AgentName]) -> dict[AgentName, Row]:
    rows = {AgentName(row["name"]): row for row in tx.all("list_agents")}
    for name in names:
        if name not in rows:
            (rows[name],) = tx.all("add_agent", name=name, now=now_ms())
    return rows


def _remove_rows(tx: Transaction, name: AgentName) -> None:
    tx.all("remove_agent", name=name)
    tx.all("remove_sessions", agent=name)
    forget_agent(tx, name)
