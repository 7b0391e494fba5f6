"""From no container to a reply, and what systemd and Podman alone need for a container."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from nanoclawd import paths
from nanoclawd.ids import AgentName
from tests.bench import host, upstream
from tests.bench.adapter import Adapter, agent, attach, deliver, open_channel, stop_containers
from tests.bench.figures import Bound, Figure, distribution, ratio, single

AGENT = "bench_cold"
SESSION = "bench"
TOGETHER = 20  #: as many as the burst starts
# In place of the runner. As PID 1 sleep(1) ignores SIGTERM; how it stops is not measured, nor a failure.
TRIVIAL = f"""\
[Unit]
StartLimitIntervalSec=0
[Service]
SuccessExitStatus=SIGKILL 137
[Container]
Entrypoint=/usr/bin/sleep
Exec=infinity
PodmanArgs=--stop-signal=SIGKILL
Image={host.IMAGE}
"""
BARE = f"""\
{TRIVIAL}Network=none
Pull=never
[Quadlet]
DefaultDependencies=false
"""


async def measure(quick: bool) -> AsyncIterator[Figure]:
    rounds = 5 if quick else 20
    bare: list[float] = []
    hardened: list[float] = []
    cold: list[float] = []
    had: list[float] = []
    async with agent(AGENT), _trivial_units() as (bare_unit, hardened_unit), attach() as adapter:
        # In turns, so that a load that comes and goes meets all of them; the first of each does not count.
        for number in range(rounds + 1):
            instances = (bare_unit.replace("@.", "@one."), hardened_unit.replace("@.", f"@{SESSION}."))
            for unit, samples in zip(instances, (bare, hardened), strict=True):
                samples.append(await host.timed("systemctl", "--user", "start", unit))
                await host.systemctl("stop", unit)
            total, until_runner = await _reply(adapter, f"cold/{number}")
            cold.append(total)
            had.append(until_runner)
            await stop_containers(AGENT)
        many = [bare_unit.replace("@.", f"@{number}.") for number in range(TOGETHER)]
        together = await host.timed("systemctl", "--user", "start", *many)
        await host.systemctl("stop", *many)
    base = distribution("bare Quadlet container: systemctl start", "ms", bare[1:])
    yield base
    hard = distribution("… with the hardening of our units", "ms", hardened[1:])
    yield hard
    yield single(f"{TOGETHER} bare ones at once: the floor of a burst", "ms", together)
    reply = distribution("cold: no container → echo reply", "ms", cold[1:], upstream=upstream.COLD)
    yield reply
    yield distribution("… of it: until the runner has the message", "ms", had[1:])
    yield ratio("… ratio to the bare start", reply, base, bounds={"value": Bound(limit=2.5)})
    yield ratio("… ratio to the hardened start", reply, hard)


async def _reply(adapter: Adapter, chat: str) -> tuple[float, float]:
    """Send one message to a new chat; return the ms until its runner has it, and until the reply."""
    async with AsyncExitStack() as stack:
        connection = await open_channel(stack)
        began = adapter.now()
        await deliver(connection, AGENT, chat, chat, "hello")
        replied = await adapter.wait_reply(chat)
    had = adapter.at(chat, "thinking") or replied
    return (replied - began) * 1000, (had - began) * 1000


@asynccontextmanager
async def _trivial_units() -> AsyncIterator[tuple[str, str]]:
    """Install two units that run sleep(1), a bare one and one made of the agent's; yield their templates."""
    (generated,) = paths.quadlets().glob(f"nanoclaw/*/nanoclaw-{AGENT}@.container")
    # conmon says READY=1, as for the bare one.
    hardened = generated.read_text().replace("Notify=true\n", "") + TRIVIAL
    directory = paths.quadlets() / "bench"
    name = AgentName(AGENT)
    mounted = [paths.agent_state(name) / "sessions" / SESSION, paths.runtime() / "agents" / name / SESSION]
    for path in mounted:
        path.mkdir(parents=True, exist_ok=True)
    directory.mkdir()
    files = [directory / "bench-bare@.container", directory / "bench-hardened@.container"]
    try:
        for path, text in zip(files, (BARE, hardened), strict=True):
            path.write_text(text)
        await host.systemctl("daemon-reload")
        yield "bench-bare@.service", "bench-hardened@.service"
    finally:
        _remove(files, directory, mounted)
        await host.systemctl("daemon-reload")


def _remove(files: list[Path], directory: Path, mounted: list[Path]) -> None:
    for path in files:
        path.unlink(missing_ok=True)
    directory.rmdir()
    for path in mounted:
        path.rmdir()
