"""Agents added and changed: what stays when it does not work."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

import pytest

from nanoclawd import agents, paths, quadlet, quadlet_check
from nanoclawd.db import Database
from nanoclawd.errors import ConfigError, NanoclawError
from nanoclawd.ids import AgentName
from nanoclawd.registry import Registry
from nanoclawd.settings import parse_settings
from nanoclawd.systemd import Systemd

BERTA = AgentName("berta")


class Host:
    """Stands in for systemd and the check of units; the rest is real."""

    def __init__(self) -> None:
        self.problems: dict[AgentName, NanoclawError] = {}
        self.reloads = 0

    async def reload(self) -> None:
        self.reloads += 1

    async def check_units(self, texts: dict[AgentName, str]) -> dict[AgentName, NanoclawError]:
        return self.problems


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(quadlet_check, "check_units", host.check_units)
    paths.agents().mkdir(parents=True)
    paths.state().mkdir(parents=True)
    return host


def with_registry(host: Host, work: Callable[[Registry], Awaitable[None]]) -> None:
    async def run() -> None:
        db = await Database.open(paths.state() / "nanoclaw.db", create=True)
        running = asyncio.ensure_future(db.run())
        try:
            registry = Registry(db=db, systemd=cast(Systemd, host), settings=parse_settings(""))
            await work(registry)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await db.close()

    asyncio.run(run())


def test_an_agent_that_cannot_be_added_leaves_what_was_there(host: Host) -> None:
    notes = paths.agents() / "berta.md"
    notes.write_text("written before\n")
    host.problems[BERTA] = ConfigError("no")

    async def work(registry: Registry) -> None:
        with pytest.raises(ConfigError, match="no"):
            await registry.add("berta", {"provider": "echo"}, "Be kind.\n")
        assert registry.names() == []

    with_registry(host, work)

    assert [path.name for path in paths.agents().iterdir()] == ["berta.md"]
    assert notes.read_text() == "written before\n"
    assert (quadlet.installed_units(), host.reloads) == ([], 0)


def test_a_change_that_does_not_work_is_taken_back(host: Host) -> None:
    long = "Be kind.\n" * 20_000

    async def work(registry: Registry) -> None:
        await registry.add("berta", {"provider": "echo"}, long)
        await registry.change("berta", {"memory_max": "512M"}, None)
        host.problems[BERTA] = ConfigError("no")
        with pytest.raises(ConfigError, match="no"):
            await registry.change("berta", {"memory_max": "2G"}, "Be quick.\n")
        assert registry.config("berta").memory_max == "512M"

    with_registry(host, work)

    file = paths.agents() / "berta.toml"
    assert agents.read_agent(file).memory_max == "512M"
    assert agents.read_instructions(file) == long
    assert paths.workspace(BERTA).stat().st_mode & 0o777 == 0o770


def test_units_follow_the_files_with_one_reload(host: Host) -> None:
    for name in ("berta", "anna", "broken", "Misnamed-2"):
        (paths.agents() / f"{name}.toml").write_text('provider = "echo"' if name != "broken" else "x = 1")

    async def work(registry: Registry) -> None:
        problems = await registry.load()
        assert [registry.get(name).state for name in registry.names()] == ["ready", "ready", "broken"]
        assert ["broken.toml:1" in problems[0], "Misnamed-2" in problems[1]] == [True, True]
        (paths.agents() / "anna.toml").unlink()
        await registry.load()
        await registry.load()
        await registry.ensure_unit(BERTA)

    with_registry(host, work)

    assert [agent for agent, _ in quadlet.installed_units()] == ["berta"]
    assert host.reloads == 2
