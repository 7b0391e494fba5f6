"""What the host programs cost: memory, idle CPU, time until ready, and many agents on disk."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing

from nanoclawd import paths
from tests.bench import host, upstream
from tests.bench.adapter import agent, attach, control, deliver, open_channel
from tests.bench.figures import Bound, Figure, distribution, single

READY = {"p50": Bound(limit=250)}
MEMORY = {"value": Bound(limit=40)}
# The watchdog asks the database and the bus every 10 s, which wakes some threads; more would be too much.
WAKEUPS = {"value": Bound(limit=60)}
AGENTS = 1000  #: the limit of the product; one of them is added while they are timed
SESSIONS = 10_000


async def measure_idle(quick: bool) -> AsyncIterator[Figure]:
    period_s = 10 if quick else 60
    async with agent("bench_idle") as name, attach() as adapter, AsyncExitStack() as stack:
        await deliver(await open_channel(stack), name, "idle", "idle/1", "hello")
        await adapter.wait_reply("idle/1")
        await adapter.settle()
        session = (await control("ListSessions", agent=name))["session"]["session"]
        pids = {
            "router": await host.main_pid(host.ROUTER),
            "gateway": await host.main_pid(host.GATEWAY),
            "runner": await host.runner_pid(name, session),
        }
        for program, pid in pids.items():
            memory = host.read_memory(pid)
            yield single(
                f"{program}: RSS",
                "MB",
                memory.rss,
                bounds=MEMORY if program == "router" else {},
                upstream=upstream.ROUTER_MEMORY if program == "router" else "",
            )
            yield single("… PSS", "MB", memory.pss)
        before = {program: host.read_work(pid) for program, pid in pids.items()}
        began = time.monotonic()
        await asyncio.sleep(period_s)  # the measurement itself: nothing happens for so long
        a_minute = 60 / (time.monotonic() - began)
        after = {program: host.read_work(pid) for program, pid in pids.items()}
    spent = {program: (after[program].cpu_s - before[program].cpu_s) * 1000 * a_minute for program in pids}
    yield single(
        "idle with one agent: CPU a minute, all three",
        "ms",
        sum(spent.values()),
        upstream=upstream.IDLE_CPU,
    )
    for program in pids:
        woken = (after[program].wakeups - before[program].wakeups) * a_minute
        yield single(f"… {program}: CPU a minute", "ms", spent[program])
        yield single(
            f"… {program}: wake-ups a minute, watchdog included",
            "",
            woken,
            bounds=WAKEUPS if program == "router" else {},
        )


async def measure_ready(quick: bool) -> AsyncIterator[Figure]:
    times = [await host.restart_router() for _ in range(5 if quick else 15)]
    yield distribution("router: exec → ready", "ms", times, bounds=READY)
    memory = host.read_memory(await host.main_pid(host.ROUTER))
    yield single("… RSS, just started", "MB", memory.rss, bounds=MEMORY)


async def measure_many(quick: bool) -> AsyncIterator[Figure]:
    directory = paths.agents()
    count = AGENTS - len(list(directory.glob("*.toml"))) - 1
    files = [directory / f"bench_many{number}.toml" for number in range(count)]
    await host.systemctl("stop", host.ROUTER)
    try:
        for path in files:
            path.write_text('provider = "echo"\n')
        _add_sessions([path.stem for path in files])
        first = await host.restart_router()
        yield single(f"{count} agents, {SESSIONS} sessions: first start, units made", "ms", first)
        again = [await host.restart_router() for _ in range(1 if quick else 5)]
        yield distribution("… later starts: exec → ready", "ms", again, bounds={"p50": Bound(limit=1000)})
        memory = host.read_memory(await host.main_pid(host.ROUTER))
        yield single("… router: RSS", "MB", memory.rss)
        began = time.monotonic()
        async with agent("bench_more"):
            added = (time.monotonic() - began) * 1000
        yield single("… one agent added", "ms", added, bounds={"value": Bound(limit=1000)})
        began = time.monotonic()
        await host.systemctl("reload", host.ROUTER)
        yield single("… reload, nothing changed", "ms", (time.monotonic() - began) * 1000)
    finally:
        await host.systemctl("stop", host.ROUTER)
        for path in files:
            path.unlink(missing_ok=True)
        _remove_sessions()
        await host.systemctl("start", host.ROUTER)  # removes the units, too


def _add_sessions(agents: list[str]) -> None:
    """Put rows of sessions into the database while nobody has it, as 10,000 chats would have."""
    with closing(sqlite3.connect(paths.state() / "nanoclaw.db")) as database, database:
        database.executemany(
            "INSERT INTO session (agent, name, channel, chat, thread, created_at)"
            " VALUES (?1, 'many_' || ?2, 'bench_many', ?2, '', 0)",
            [(agents[number % len(agents)], number) for number in range(SESSIONS)],
        )


def _remove_sessions() -> None:
    with closing(sqlite3.connect(paths.state() / "nanoclaw.db")) as database, database:
        database.execute("DELETE FROM session WHERE channel = 'bench_many'")
