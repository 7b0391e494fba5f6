"""Tries a channel's adapter: does it do what io.nanoclaw.Channel asks of each?

    python3 tests/channel-kit --adapter COMMAND --driver COMMAND [--only WORDS] [--list]

The driver is the author's: it plays the people on the adapter's platform. docs/channels.md says what it is
asked.
Prints a table, and fails if a check does.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from checks import CHECKS
from world import Failed, NotApplicable, World

CHECK_S = 180.0
LOG_LINES = 15


async def run(options: argparse.Namespace, directory: Path) -> int:
    """Run the checks, and return how many failed."""
    world = World(options.adapter, options.driver, directory)
    failures = applicable = 0
    try:
        try:
            await world.start()
        except Failed as exc:
            raise Failed("; ".join([str(exc), *dict.fromkeys(world.router.violations)])) from exc
        for name, check in CHECKS.items():
            if not any(words in name for words in options.only or [""]):
                continue
            began = time.monotonic()
            try:
                async with asyncio.timeout(CHECK_S):
                    await check(world)
                outcome, why = "passed", ""
            except NotApplicable as exc:
                outcome, why = "-", f"not applicable: {exc}"
            except (Failed, TimeoutError) as exc:
                outcome, why = "FAILED", str(exc) or "it took too long"
                await world.kill_adapter()
                await world.run_adapter()
            failures += outcome == "FAILED"
            applicable += outcome != "-"
            print(
                f"{outcome:<7} {name}{f': {why}' if why else ''} ({time.monotonic() - began:.1f} s)",
                flush=True,
            )
    finally:
        await world.stop()
    print(f"\n{applicable - failures} of {applicable} passed, {len(CHECKS)} checks in all.")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/channel-kit", description=__doc__.partition("\n")[0])
    parser.add_argument("--adapter", help="command that runs the adapter")
    parser.add_argument("--driver", help="command that plays the people on its platform")
    parser.add_argument(
        "--only", action="append", metavar="WORDS", help="checks whose name has these words; may be repeated"
    )
    parser.add_argument("--list", action="store_true", help="only list them")
    options = parser.parse_args()
    if options.list:
        print(*CHECKS, sep="\n")
        return 0
    if not (options.adapter and options.driver):
        parser.error("--adapter and --driver are needed")
    with tempfile.TemporaryDirectory(prefix="kit-") as name:
        directory = Path(name)
        try:
            failures = asyncio.run(run(options, directory))
        except Failed as exc:
            print(f"FAILED {exc}")
            failures = 1
        log = directory / "adapter.log"
        if failures and log.exists():
            print(
                "The adapter's last lines:",
                *log.read_text(errors="replace").splitlines()[-LOG_LINES:],
                sep="\n  ",
            )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
