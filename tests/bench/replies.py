"""Messages to agents whose containers run, and many at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress

from nanoclawd.varlink import Connection
from tests.bench import host, upstream
from tests.bench.adapter import Adapter, agent, attach, deliver, open_channel
from tests.bench.figures import Bound, Figure, distribution, order_faults, single

OVERHEAD = {"p50": Bound(limit=10), "p99": Bound(limit=50)}
SESSIONS = 20
MESSAGES = 25  #: to each session
#: Between two messages of one chat. Without it we would measure how fast the router lets one runner call
#: (CALLS_PER_S), and nobody talks as fast as that.
PAUSE_S = 0.015


async def measure_warm(quick: bool) -> AsyncIterator[Figure]:
    rounds = 200 if quick else 1000
    stored: list[float] = []
    inward: list[float] = []
    outward: list[float] = []
    total: list[float] = []
    async with agent("bench_warm") as name, attach() as adapter, AsyncExitStack() as stack:
        connection = await open_channel(stack)
        await deliver(connection, name, "warm", "first", "hello")
        await adapter.wait_reply("first")
        await adapter.settle()
        for number in range(rounds):
            event = f"warm/{number}"
            began = adapter.now()
            await deliver(connection, name, "warm", event, "hello")
            acknowledged = adapter.now()
            replied = await adapter.wait_reply(event)
            # The router tells the adapter what goes on in the very moments in which it tells the runner
            # ("thinking": here is a turn), or is told by it ("text": a piece of what I am about to reply).
            had, answers = adapter.at(event, "thinking"), adapter.at(event, "text")
            assert had is not None and answers is not None
            stored.append((acknowledged - began) * 1000)
            inward.append((had - began) * 1000)
            outward.append((replied - answers) * 1000)
            total.append((replied - began) * 1000)
            await adapter.settle()
            await asyncio.sleep(PAUSE_S)
    yield distribution("one durable write of 4 KiB, without us", "ms", host.measure_fsync())
    yield distribution(
        "warm: message → echo reply, round trip", "ms", total, bounds=OVERHEAD, upstream=upstream.WARM
    )
    yield distribution("… message in → acknowledged, on disk", "ms", stored)
    yield distribution("… message in → runner has it", "ms", inward, bounds=OVERHEAD)
    yield distribution("… runner's reply → channel has it", "ms", outward, bounds=OVERHEAD)


async def measure_burst(quick: bool) -> AsyncIterator[Figure]:
    async with agent("bench_burst") as name, attach() as adapter:
        for label in ("containers starting", "containers warm"):
            async for figure in _burst(adapter, name, label):
                yield figure
        router = host.read_memory(await host.main_pid(host.ROUTER))
        yield single("router after both bursts, RSS", "MB", router.rss, bounds={"value": Bound(limit=40)})


async def _burst(adapter: Adapter, name: str, label: str) -> AsyncIterator[Figure]:
    sent = {
        f"burst/{chat}": [f"{label}/{chat}/{number}" for number in range(MESSAGES)]
        for chat in range(1, SESSIONS + 1)
    }
    adapter.replies.clear()
    adapter.keys.clear()
    began = adapter.now()
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        senders = [
            tasks.create_task(_send(await open_channel(stack), name, chat, events))
            for chat, events in sent.items()
        ]
        accepted = max(await asyncio.gather(*senders))
        with suppress(TimeoutError):  # lost: counted below
            await adapter.wait_replies([event for events in sent.values() for event in events])
        replied = adapter.now()
    await adapter.settle()
    faults = order_faults(sent, adapter.replies)
    faults["same key twice"] = len(adapter.keys) - len(set(adapter.keys))
    count, wrong = SESSIONS * MESSAGES, sum(faults.values())
    seconds = replied - began
    detail = ", ".join(f"{value} {fault}" for fault, value in faults.items() if value)
    yield single(
        f"burst {SESSIONS} x {MESSAGES}, {label}: all answered", "s", seconds, upstream=upstream.BURST
    )
    yield single("… all accepted, on disk", "s", accepted - began)
    yield single(
        f"… lost, repeated or out of order{': ' + detail if detail else ''}",
        "",
        wrong,
        bounds={"value": Bound(limit=0)},
    )
    yield single("… messages a second", "1/s", count / seconds)
    yield single(
        "… times the throughput of upstream's best run",
        "x",
        upstream.BURST_BEST_S / seconds,
        bounds={"value": Bound(limit=10, at_least=True)},
    )


async def _send(connection: Connection, name: str, chat: str, events: list[str]) -> float:
    """Deliver in order, each as soon as the one before is accepted; return when the last one was."""
    for event in events:
        await deliver(connection, name, chat, event, event)
    return Adapter.now()
