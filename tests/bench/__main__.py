"""Measures the installed product in the session of whoever runs it, and prints a table; see tests/bench/run.

Timing never makes it fail: it exits with 1 only if something could not be measured, or a message was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path

from tests.bench import gateway, host, model, replies, router, starts
from tests.bench.figures import Figure, render

BENCHMARKS: dict[str, Callable[[bool], AsyncIterator[Figure]]] = {
    "starts": starts.measure,
    "warm": replies.measure_warm,
    "burst": replies.measure_burst,
    "model": model.measure,
    "gateway": gateway.measure,
    "idle": router.measure_idle,
    "ready": router.measure_ready,
    "many": router.measure_many,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tests/bench/run", description="Measures the product; see ARCHITECTURE.md."
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer samples, a shorter idle time: below 90 s"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    parser.add_argument(
        "--only",
        action="append",
        choices=BENCHMARKS,
        metavar="NAME",
        help="of these alone: " + ", ".join(BENCHMARKS),
    )
    parser.add_argument("--no-many", action="store_true", help="without 1,000 agents on disk")
    options = parser.parse_args()
    wanted = [name for name in options.only or BENCHMARKS if name != "many" or not options.no_many]
    return asyncio.run(_measure(wanted, options.quick, options.json))


async def _measure(wanted: list[str], quick: bool, file: Path | None) -> int:
    about = await host.describe()
    figures: list[Figure] = []
    problems: list[str] = []
    for name in wanted:
        began = time.monotonic()
        try:
            async for figure in BENCHMARKS[name](quick):
                figures.append(figure)
        except Exception:
            problems.append(name)
            traceback.print_exc()
        print(f"bench: {name} took {time.monotonic() - began:.0f} s", file=sys.stderr)
    print("\n".join([*about, "", *render(figures)]))
    missed = [figure.name for figure in figures if figure.verdict == "missed"]
    judged = sum(bool(figure.verdict) for figure in figures)
    print(f"\n{judged - len(missed)} of {judged} budgets met.")
    for name in problems:
        print(f"could not be measured: {name}")
    if file is not None:
        document = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "quick": quick,
            "machine": about,
            "figures": [figure.as_json() for figure in figures],
            "problems": problems,
        }
        file.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    lost = any(
        figure.unit == "" and "lost" in figure.name and figure.verdict == "missed" for figure in figures
    )
    return 1 if problems or lost else 0


if __name__ == "__main__":
    sys.exit(main())
