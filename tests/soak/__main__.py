"""An hour of mixed traffic through the installed product, with restarts and kills; see tests/soak/run.

Chats of several agents get messages of every kind; meanwhile the router, the gateway, runners and the
adapter are restarted or killed. In the last two thirds the router is left alone, so that its growth can be
seen.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanoclawd import paths
from nanoclawd.errors import Unavailable
from nanoclawd.varlink import call
from nanoclawd.wire import VarlinkError
from tests.bench import host
from tests.bench.adapter import agent, control, deliver, open_channel

AGENTS = 3
CHATS = 4  #: of each agent
UNANSWERED = 6  #: of one chat; then its people wait
SAMPLE_S = 10.0
DISTURB_S = 30.0
DISTURBED = 6  #: times, at least, in a short run
SETTLE_S = 300.0
AGAIN_S = 0.2
WARM = 0.2  #: the first part of a life, which is not looked at for growth
GROWTH_KIB_PER_HOUR = 4096  #: of memory, above which a slope is a leak; see the table for what it is


@dataclass(slots=True)
class Chat:
    """One chat: what was sent, and what came back, in order."""

    agent: str
    name: str
    sent: list[str] = field(default_factory=list)
    kinds: dict[str, str] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)  #: events, by the reply or notice that ended them
    notes: Counter[str] = field(default_factory=Counter)  #: what came in mid-turn
    moved: asyncio.Event = field(default_factory=asyncio.Event)

    async def move(self) -> None:
        """Return when something has come."""
        self.moved.clear()
        await self.moved.wait()


class Person:
    """The adapter, and the people behind it: knows a key that it has shown."""

    def __init__(self, chats: list[Chat]) -> None:
        self.chats = {chat.name: chat for chat in chats}
        self.shown: set[str] = set()
        self.again = 0  #: deliveries that came again, with the key that was known
        self.cut = asyncio.Event()  #: set to break the adapter's connection

    async def run(self) -> None:
        """Attach, again and again, until cancelled."""
        while True:
            with router_away():
                async with AsyncExitStack() as stack:
                    await self._attached(stack)
            await asyncio.sleep(AGAIN_S)

    async def _attached(self, stack: AsyncExitStack) -> None:
        stream = await open_channel(stack)
        reports = await open_channel(stack)
        await stream.write({"method": "io.nanoclaw.Channel.Attach", "parameters": {}, "more": True})
        self.cut.clear()
        while not self.cut.is_set():
            message = await stream.read()
            if message is None or "error" in message:
                return
            delivery = message["parameters"]["delivery"]
            if delivery and delivery["chat"] in self.chats:  # others may have left theirs
                self._show(delivery)
                if self.cut.is_set():
                    return  # shown, and not reported: it comes again
                receipt = {"key": delivery["key"], "receipt": "r"}
                await call(reports, "io.nanoclaw.Channel.ReportSent", receipt)

    def _show(self, delivery: dict[str, Any]) -> None:
        if delivery["key"] in self.shown:
            self.again += 1
            return
        self.shown.add(delivery["key"])
        chat = self.chats[delivery["chat"]]
        if delivery["kind"] == "message":
            chat.notes[delivery["text"]] += 1
        elif ".delay" not in delivery["key"]:
            chat.ended += delivery["events"]
        chat.moved.set()


async def talk(chat: Chat, dice: random.Random, until: float) -> None:
    """Send messages of every kind until `until`."""
    while time.monotonic() < until:
        event = f"{chat.name}/{len(chat.sent)}"
        kind = dice.choices(["plain", "long", "send", "retry", "fail"], [60, 20, 15, 2, 3])[0]
        text = {
            "plain": event,
            "long": f"/sleep {dice.uniform(0.1, 1.5):.1f}\n{event}",
            "send": f"/send note {event}\n{event}",
            "retry": f"/send note {event}\n/fail internal 1",
            "fail": "/fail invalid_request",
        }[kind]
        chat.sent.append(event)
        chat.kinds[event] = kind
        await store(chat, event, text)
        for _ in range(dice.choice([0, 0, 1])):  # the same event again, as platforms do
            await store(chat, event, text)
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, until - time.monotonic())):
                while len(chat.sent) - len(chat.ended) >= UNANSWERED:
                    await chat.move()
        await asyncio.sleep(dice.expovariate(1.0))


async def settle(chat: Chat) -> None:
    """Return when all that was sent has ended."""
    while not set(chat.sent) <= set(chat.ended):
        await chat.move()


async def store(chat: Chat, event: str, text: str) -> None:
    """Deliver, as often as it takes."""
    while True:
        with router_away():
            async with AsyncExitStack() as stack:
                return await deliver(await open_channel(stack), chat.agent, chat.name, event, text)
        await asyncio.sleep(AGAIN_S)


@contextmanager
def router_away() -> Iterator[None]:
    """Go on if the router is away, or going: whoever says the same again is understood."""
    try:
        yield
    except VarlinkError as exc:
        if not exc.name.endswith(".Unavailable"):
            raise
    except (Unavailable, OSError):
        pass


async def disturb(
    person: Person, dice: random.Random, begun: float, until: float, done: Counter[str]
) -> None:
    """Restart and kill, now and then; the router in the first third only."""
    while (now := time.monotonic()) < until:
        pause_s = dice.expovariate(1 / min(DISTURB_S, (until - begun) / DISTURBED))
        await asyncio.sleep(min(pause_s, max(0.0, until - now)))
        kinds = ["runner killed", "adapter cut", "gateway restarted", "gateway killed", "reload"]
        if now < begun + (until - begun) / 3:
            kinds += ["router restarted", "router killed"]
        kind = dice.choice(kinds)
        with suppress(RuntimeError):  # e.g. there is no runner at the moment
            await DISTURBANCES[kind](person, dice)
            done[kind] += 1


async def _kill_runner(person: Person, dice: random.Random) -> None:
    containers = (await host.run("podman", "ps", "--format", "{{.Names}}")).split()
    if containers:
        pid = await host.run("podman", "inspect", "--format", "{{.State.Pid}}", dice.choice(containers))
        await host.run("podman", "unshare", "kill", "-KILL", pid.strip())


async def _cut(person: Person, dice: random.Random) -> None:
    person.cut.set()


def _systemctl(*arguments: str) -> Callable[[Person, random.Random], Any]:
    return lambda person, dice: host.systemctl(*arguments)


DISTURBANCES: dict[str, Callable[[Person, random.Random], Any]] = {
    "runner killed": _kill_runner,
    "adapter cut": _cut,
    "gateway restarted": _systemctl("restart", host.GATEWAY),
    "gateway killed": _systemctl("kill", "--signal=KILL", "--kill-whom=main", host.GATEWAY),
    "reload": _systemctl("reload", host.ROUTER),
    "router restarted": _systemctl("restart", host.ROUTER),
    "router killed": _systemctl("kill", "--signal=KILL", "--kill-whom=main", host.ROUTER),
}


@dataclass(frozen=True, slots=True)
class Sample:
    at: float
    rss_kib: float
    fds: int
    threads: int


async def watch(samples: dict[tuple[str, int], list[Sample]], files: list[tuple[float, int, int]]) -> None:
    """Look at router and gateway now and then, until cancelled; by name and pid."""
    while True:
        for unit in (host.ROUTER, host.GATEWAY):
            with suppress(RuntimeError, OSError):  # it does not run just now
                pid = await host.main_pid(unit)
                process = Path(f"/proc/{pid}")
                samples[unit, pid].append(
                    Sample(
                        time.monotonic(),
                        host.read_memory(pid).rss * 1e6 / 1024,
                        os.stat(process / "fd").st_size,  # the gateway lets nobody list them
                        len(os.listdir(process / "task")),
                    )
                )
        database = paths.state() / "nanoclaw.db"
        sizes = [file.stat().st_size for file in (database, Path(f"{database}-wal")) if file.exists()]
        files.append((time.monotonic(), sizes[0], sum(sizes[1:])))
        await asyncio.sleep(SAMPLE_S)


def judge(chats: list[Chat]) -> Counter[str]:
    """Count what went wrong: nothing may be lost, come twice, or be out of order."""
    faults: Counter[str] = Counter()
    for chat in chats:
        place = {event: number for number, event in enumerate(chat.sent)}
        ended = [place[event] for event in chat.ended]
        faults["lost"] += len(set(place.values()) - set(ended))
        faults["repeated"] += len(ended) - len(set(ended))
        faults["out of order"] += sum(a > b for a, b in itertools.pairwise(ended))
        for event, kind in chat.kinds.items():
            if kind in ("send", "retry"):
                faults["lost"] += chat.notes[f"note {event}"] < 1
                faults["repeated"] += chat.notes[f"note {event}"] > 1
    return faults


def slope_per_hour(samples: list[Sample], what: Callable[[Sample], float]) -> float:
    late = samples[int(len(samples) * WARM) :]
    if len(late) < 3:
        return 0.0
    return statistics.linear_regression([s.at for s in late], [what(s) for s in late]).slope * 3600


@asynccontextmanager
async def agents(count: int) -> AsyncIterator[list[str]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(agent(f"soak_{number}")) for number in range(count)]


async def soak(minutes: float, seed: int) -> int:
    dice = random.Random(seed)
    samples: dict[tuple[str, int], list[Sample]] = defaultdict(list)
    files: list[tuple[float, int, int]] = []
    done: Counter[str] = Counter()
    async with agents(AGENTS) as names, asyncio.TaskGroup() as tasks:
        chats = [Chat(name, f"{name}-{number}") for name in names for number in range(CHATS)]
        person = Person(chats)
        background = [tasks.create_task(person.run()), tasks.create_task(watch(samples, files))]
        before = await waiting()  # of chats that are none of ours
        begun = time.monotonic()
        until = begun + minutes * 60
        people = [talk(chat, random.Random(dice.random()), until) for chat in chats]
        await asyncio.gather(*people, disturb(person, dice, begun, until, done))
        with suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_S):
                await asyncio.gather(*(settle(chat) for chat in chats))
        await asyncio.sleep(1.0)  # for what might come twice
        left = await waiting() - before
        for task in background:
            task.cancel()
    return report(minutes, seed, chats, person, samples, files, done, left)


async def waiting() -> int:
    """Return how many messages and deliveries have not ended."""
    queue = (await control("Status"))["queue"]
    return int(queue["queued"] + queue["leased"] + queue["deliveriesPending"])


def report(
    minutes: float,
    seed: int,
    chats: list[Chat],
    person: Person,
    samples: dict[tuple[str, int], list[Sample]],
    files: list[tuple[float, int, int]],
    done: Counter[str],
    left: int,
) -> int:
    """Print the table; return the exit status."""
    faults = judge(chats)
    faults["left in the queue"] = left
    count = sum(len(chat.sent) for chat in chats)
    kinds = Counter(kind for chat in chats for kind in chat.kinds.values())
    print(f"seed {seed}, {minutes:g} minutes, {len(chats)} chats of {AGENTS} agents, {count} messages:")
    print(", ".join(f"{number} {kind}" for kind, number in kinds.items()))
    print("disturbances: " + ", ".join(f"{number} x {kind}" for kind, number in sorted(done.items())))
    print(f"deliveries that came again with the same key, and were dropped: {person.again}")
    heads = f"{'minutes':>8} {'RSS KiB':>17} {'per hour':>9} {'fds':>9} {'threads':>9}"
    print(f"\n{'longest life of':28} {heads}")
    for unit in (host.ROUTER, host.GATEWAY):
        lives = [life for (name, _), life in samples.items() if name == unit]
        life = max(lives, key=len, default=[])
        if len(life) < 2:
            print(f"{unit:28} too short to tell")
            continue
        warm = life[int(len(life) * WARM) :]
        slope = slope_per_hour(life, lambda s: s.rss_kib)
        fds, threads = ([getattr(s, name) for s in warm] for name in ("fds", "threads"))
        span = (life[-1].at - life[0].at) / 60
        print(
            f"{unit:28} {span:8.1f} {warm[0].rss_kib:8.0f} {warm[-1].rss_kib:8.0f} {slope:+9.0f}"
            f" {min(fds):4}-{max(fds):<4} {min(threads):4}-{max(threads):<4}"
        )
        half = len(warm) // 2
        if half >= 6:
            faults[f"{unit} grows in descriptors"] = int(min(fds[half:]) > max(fds[:half]))
            faults[f"{unit} grows in threads"] = int(min(threads[half:]) > max(threads[:half]))
        if span >= 20:
            faults[f"{unit} grows in memory"] = int(slope > GROWTH_KIB_PER_HOUR)
    first, last = files[0], files[-1]
    largest = max(wal for _, _, wal in files)
    each = (last[1] - first[1]) / max(1, count)
    print(f"\ndatabase {first[1] >> 10} -> {last[1] >> 10} KiB, {each:.0f} bytes a message")
    print(f"largest log {largest >> 10} KiB")
    print(", ".join(f"{number} {fault}" for fault, number in faults.items()))
    return 1 if any(faults.values()) else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tests/soak/run", description="Mixed traffic with restarts and kills."
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    return asyncio.run(soak(options.minutes, options.seed))


if __name__ == "__main__":
    sys.exit(main())
