"""Kills a channel's adapter at each of its points, and checks what came of it at both ends.

The adapter is the kit's example, the router the real one in this process, the platform the kit's. In each
conversation people write while the adapter is away; it dies at the next point, is started again, and in the
end the router must have each event once, and the chat each reply, and each part of a long one, once and in
order. See tests/crash/run --adapter.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from nanoclawd import paths
from nanoclawd.ids import ChannelName
from tests.crash.adapter_life import Kind
from tests.crash.record import Fault
from tests.crash.table import Table
from tests.support.router import Place, Router

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "channel-kit"))

from example_driver import BOT, Driver

CHANNEL = ChannelName("toy")
TEXTS = ("one", "two", "\n".join(f"line {n} of a long message" for n in range(200)))
SETTLE_S = 30.0
POLL_S = 0.002


class Lives:
    """The process of adapter_life.py."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._pid = 0
        self.last_words = ""

    @classmethod
    async def start(cls, state: Path, settings: str, login: str) -> Lives:
        for name, text in (("credentials/login", login), ("channel.toml", settings), ("state/x", "")):
            (state / name).parent.mkdir(exist_ok=True)
            (state / name).write_text(text)
        environment = {
            "NANOCLAW_CHANNEL_SOCKET": str(paths.channel_socket(CHANNEL)),
            "NANOCLAW_CHANNEL_CONFIG": str(state / "channel.toml"),
            "STATE_DIRECTORY": str(state / "state"),
            "CREDENTIALS_DIRECTORY": str(state / "credentials"),
        }
        pipe = asyncio.subprocess.PIPE
        return cls(
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.crash.adapter_life"),
                stdin=pipe,
                stdout=pipe,
                cwd=Path(__file__).resolve().parents[2],
                env={**os.environ, **environment},
            )
        )

    async def begin(self, kill_at: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{kill_at}\n".encode())
        self.last_words = ""
        while not (line := await self._line()).startswith("pid "):
            self.last_words = line  # it did not live long
        self._pid = int(line.removeprefix("pid "))

    async def wait(self) -> None:
        """Return when this life has ended; what it was about is in `last_words`."""
        while (line := await self._line()) != "end":
            self.last_words = line

    def kill(self) -> None:
        """End this life, unless it has ended; wait() is to follow."""
        with suppress(ProcessLookupError):
            os.kill(self._pid, 9)

    async def _line(self) -> str:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        assert line, "the adapter's process has ended"
        return line.decode().rstrip("\n")

    async def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


class Trial:
    """Conversations with one router and one platform."""

    def __init__(self, router: Router, driver: Driver, lives: Lives) -> None:
        self._router, self._driver, self._lives = router, driver, lives

    async def converse(self, kill_at: int) -> tuple[str, list[tuple[Fault, str]]]:
        """Hold one conversation; return what the adapter died of ("": it did not), and faults."""
        chat = (await self._driver.chat())["chat"]
        await self._router.wire(chat, "berta", "@ada", channel=CHANNEL, engagement="every")
        events = [(await self._driver.say(chat, text))["event"] for text in TEXTS]
        await self._lives.begin(kill_at)
        dying = asyncio.create_task(self._lives.wait())
        try:
            async with asyncio.timeout(SETTLE_S):
                while not dying.done() and not await self._is_settled(chat, events):  # noqa: ASYNC110
                    await asyncio.sleep(POLL_S)
                self._lives.kill()
                await dying
                words = self._lives.last_words
                if not await self._is_settled(chat, events):
                    await self._lives.begin(0)
                    while not await self._is_settled(chat, events):  # noqa: ASYNC110
                        await asyncio.sleep(POLL_S)
                    self._lives.kill()
                    await self._lives.wait()
                    words = words or "ended by itself"
        except TimeoutError:
            return "never ended", [(Fault.LOST, f"chat {chat}, point {kill_at}: {await self._shown(chat)}")]
        return words, await self._faults(chat, events, kill_at)

    async def _is_settled(self, chat: str, events: list[str]) -> bool:
        """Say whether all is answered, and each answer's receipt is there."""
        rows = [row for row in await self._router.outbox() if row["chat"] == chat]
        return len(rows) == len(events) and all(row["state"] == "sent" for row in rows)

    async def _shown(self, chat: str) -> list[str]:
        messages = (await self._driver.messages(chat))["messages"]
        return [message["text"] for message in messages if message["sender"] == BOT]

    async def _faults(self, chat: str, events: list[str], kill_at: int) -> list[tuple[Fault, str]]:
        faults = []
        stored = Counter(row["event"] for row in await self._router.inbox() if row["chat"] == chat)
        shown = await self._shown(chat)
        where = f"chat {chat}, point {kill_at}"
        if stored != Counter(events):
            fault = Fault.LOST if stored.keys() != set(events) else Fault.REPEATED
            faults.append((fault, f"{where}: the router has {dict(stored)}"))
        wanted = "".join(f"echo: {text}" for text in TEXTS)
        if "".join(shown) != wanted:
            fault = Fault.REPEATED if len("".join(shown)) > len(wanted) else Fault.LOST
            faults.append((fault, f"{where}: the chat has {[text[:40] for text in shown]}"))
        return faults


async def run(root: Path, patch: pytest.MonkeyPatch, first: int, step: int) -> tuple[Table, list[str]]:
    """Try each `step`th point from `first` on, until the adapter survives; return table and faults."""
    table, told = Table(Kind), []
    place, driver = Place(root, patch), Driver()
    paths.channels().mkdir(parents=True)
    given = await driver.start()
    (paths.channels() / f"{CHANNEL}.toml").write_text(given["config"])
    try:
        async with place.router() as router:
            lives = await Lives.start(root, given["config"], given["login"])
            trial = Trial(router, driver, lives)
            try:
                await trial.converse(0)  # whatever is done once
                for kill_at in range(first, sys.maxsize, step):
                    words, faults = await trial.converse(kill_at)
                    if not words:
                        break
                    table.add([words.partition(": ")[0]], [fault for fault, _ in faults])
                    told += [f"{fault}: {what} (died {words})" for fault, what in faults]
            finally:
                await lives.end()
    finally:
        await driver.stop()
        await place.systemd.end_all()
        place.close()
    return table, told


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/crash/run --adapter", description=__doc__)
    parser.add_argument("--first", type=int, default=1, metavar="N", help="the first point (1)")
    parser.add_argument("--step", type=int, default=1, metavar="N", help="each Nth point from there on (1)")
    options = parser.parse_args()
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="nanoclaw-crash-") as name,
        pytest.MonkeyPatch.context() as patch,
    ):
        table, told = asyncio.run(run(Path(name), patch, options.first, options.step))
    print(*told, sep="\n", end="\n" if told else "")
    print(table.render())
    print(f"{table.points} points, {table.faults} faults, {time.monotonic() - began:.0f} s")
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main())
