"""Kills the router, or everything, at many points of scripted conversations, and checks what came of it.

See tests/crash/run.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import count
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event
from pathlib import Path

from tests.crash.life import start_fork_server
from tests.crash.points import Kind
from tests.crash.script import make_plan
from tests.crash.table import Table
from tests.crash.world import Outcome, converse


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/crash/run", description=__doc__)
    parser.add_argument("--points", type=int, default=300, metavar="N", help="how many deaths (300)")
    parser.add_argument("--seed", type=int, metavar="S", help="of what is said and who dies (a random one)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="J", help="worlds at once")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="one conversation, with all its deaths")
    parser.add_argument("--repeat", type=int, default=1, metavar="TIMES", help="--only, again and again")
    parser.add_argument("--log", type=Path, metavar="DIR", help="where the router's log of a failure goes")
    options = parser.parse_args()
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    if options.only is not None:
        numbers, jobs, points = [options.only] * options.repeat, 1, sys.maxsize
    else:
        numbers, jobs, points = None, options.jobs, options.points
        print(f"seed {seed}, {points} points", flush=True)
    table = Table(Kind)
    began = time.monotonic()
    for outcome in run(seed, points, jobs=jobs, numbers=numbers):
        table.add([death.kind for death in outcome.deaths], [fault for fault, _ in outcome.faults])
        if outcome.faults or options.only is not None:
            print(describe(outcome, options.log), flush=True)
    print(table.render())
    print(f"seed {seed}, {table.points} points, {table.faults} faults, {time.monotonic() - began:.0f} s")
    return 1 if table.faults else 0


def run(seed: int, points: int, *, jobs: int, numbers: list[int] | None = None) -> Iterator[Outcome]:
    """Run conversations until `points` routers have died, or those that are given by their `numbers`."""
    context = multiprocessing.get_context("fork")
    outcomes: SimpleQueue[Outcome | None] = context.SimpleQueue()
    enough = context.Event()
    with tempfile.TemporaryDirectory(prefix="nanoclaw-crash-", ignore_cleanup_errors=True) as base:
        workers = []
        for job in range(jobs):
            mine = count(job + 1, jobs) if numbers is None else numbers
            workers.append(context.Process(target=_work, args=(seed, mine, Path(base), outcomes, enough)))
            workers[-1].start()
        died, working = 0, jobs
        while working:
            if (outcome := outcomes.get()) is None:
                working -= 1
                continue
            yield outcome
            died += len(outcome.deaths)
            if died >= points:
                enough.set()
        for worker in workers:
            worker.join()


def _work(
    seed: int, numbers: Iterable[int], base: Path, outcomes: SimpleQueue[Outcome | None], enough: Event
) -> None:
    fork_server, pid = start_fork_server()
    for number in numbers:
        if enough.is_set():
            break
        outcomes.put(asyncio.run(converse(make_plan(seed, number), fork_server, base)))
    fork_server.close()
    os.waitpid(pid, 0)
    outcomes.put(None)


def describe(outcome: Outcome, logs: Path | None) -> str:
    """Return what is needed to look at one conversation, and to see it again."""
    plan = outcome.plan
    lines = [f"conversation {plan.number}, tests/crash/run --seed {plan.seed} --only {plan.number}"]
    lines += [f"    died {death}" for death in outcome.deaths]
    lines += [f"    {fault}: {what}" for fault, what in outcome.faults]
    if logs is not None and outcome.log:
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"{plan.seed}-{plan.number}.log"
        log.write_text(outcome.log)
        lines.append(f"    the router's log: {log}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
