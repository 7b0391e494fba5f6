"""Kills the installed product's processes at random instants of conversations, and checks what came of it.

Router, gateway, runners (PID 1 of their containers), conmon and terminals die by kill -9 in real units and
containers, with the echo provider. Run in the session of whoever runs it; see tests/crash/run --real.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import pty
import re
import secrets
import signal
import sqlite3
import sys
import time
import traceback
from collections import Counter
from contextlib import closing, suppress
from enum import StrEnum
from pathlib import Path
from random import Random

from nanoclawd import paths
from nanoclawd.errors import NanoclawError
from nanoclawd.ids import ChannelName
from tests.bench import host
from tests.bench.adapter import control
from tests.bench.gateway import CTL
from tests.crash.check import WORDS, check, rows_of
from tests.crash.line import CHANNEL, Line
from tests.crash.people import Adapter, Person
from tests.crash.record import Fault, Record, Shown
from tests.crash.script import Chat, Message, Pause, Plan, Step
from tests.crash.table import Table
from tests.support.product import ANNOUNCEMENT

AGENTS = ("crash_a", "crash_b", "crash_c")
CHATS, TERMINALS = 8, 3  #: of one round, side by side
KILLS = 24  #: of one round, at most
KILL_EVERY_S = 0.4  #: on average
CONTAINER_KILLS = 1  #: of one chat: its messages have four attempts, of which a shared turn may cost two
SETTLE_S = 90.0  #: back-offs of 2 and 4 s, restarts; only a round that fails reaches this
POLL_S = 0.1
SOCKETS = {"test": paths.channel_socket(ChannelName("test")), "terminal": paths.terminal_socket()}
FILE = paths.channels() / "test.toml"
DATABASE = paths.state() / "nanoclaw.db"
CONTAINERS = "nanoclaw-agents.slice/nanoclaw-crash_*@*.service"
UNITS = Path(f"/sys/fs/cgroup/user.slice/user-{os.getuid()}.slice/user@{os.getuid()}.service/nanoclaw.slice")


class Victim(StrEnum):
    """What dies, and with which weight."""

    ROUTER = "the router"
    GATEWAY = "the gateway"
    RUNNER = "a runner"
    CONMON = "a conmon"
    TERMINAL = "a terminal"


WEIGHTS = {Victim.ROUTER: 10, Victim.GATEWAY: 2, Victim.RUNNER: 5, Victim.CONMON: 4, Victim.TERMINAL: 4}


def make_plan(seed: int, number: int) -> Plan:
    """Return the conversations of one round, whose chats are new to the router."""
    random = Random(f"{seed}/{number}")
    first = 100 * number
    chats = [_make_chat(random, f"c{first + index}", "test") for index in range(CHATS)]
    chats += [_make_chat(random, f"t{first + index}", "terminal") for index in range(TERMINALS)]
    return Plan(seed=seed, number=number, chats=chats, mood=random.getrandbits(32))


def _make_chat(random: Random, name: str, channel: str) -> Chat:
    steps: list[Step] = []

    def say(order: str, *lines: str, times: int = 1) -> None:
        marker = f"{name}-{1 + sum(isinstance(step, Message) for step in steps)}"
        sends = [f"/send s:{marker}:{index}\n/sleep 0.2" for index in range(times) if order == "send"]
        words = "\n".join([*sends, *lines, f"r:{marker}:0"])
        steps.append(Message(marker, order, str(times), again=random.random() < 0.1, words=words))

    # A notice in a terminal does not say what it is about.
    orders = ("say", "say", "work", "send", "die", "stop") if channel == "test" else ("say", "work", "send")
    for _ in range(random.randint(3, 5)):
        match random.choice(orders):
            case "say":
                say("say")
            case "work":
                say("work", f"/sleep {random.uniform(0.2, 2):.1f}")
            case "send":
                say("send", times=random.randint(1, 3))
            case "die":
                say("die", "/fail invalid_request")
            case "stop":
                steps.append(Pause.UNTIL_ENDED)
                say("stop", "/sleep 60")
                for _ in range(random.randint(0, 2)):
                    say("say")
                steps += [*[Pause.A_SECOND] * random.randint(0, 2), Pause.STOP, Pause.UNTIL_ENDED]
        steps += random.choice(((), (Pause.A_SECOND,), (Pause.UNTIL_ENDED,)))
    return Chat(name=name, agent=random.choice(AGENTS), steps=steps, channel=channel)


class Terminal:
    """A person's nanoclawctl chat, started again whenever it is killed: what it shows, the person saw."""

    def __init__(self, chat: Chat, record: Record) -> None:
        self._chat, self._record = chat, record
        self.name = chat.name
        self.pid: int | None = None
        self._seen = 0

    async def run(self) -> None:
        try:
            while True:
                await self._run_once()
        finally:
            self.kill()

    def kill(self) -> bool:
        if self.pid is None:
            return False
        os.kill(self.pid, signal.SIGKILL)
        return True

    async def _run_once(self) -> None:
        pid, terminal = pty.fork()
        if pid == 0:
            os.environ["TERM"] = "dumb"
            program = Path.home() / ".local/bin/nanoclawctl"
            os.execv(program, [str(program), "chat", self._chat.agent, "--chat", self._chat.name])
        self.pid = pid
        os.set_blocking(terminal, False)
        readable = asyncio.Event()
        asyncio.get_running_loop().add_reader(terminal, readable.set)
        text = ""
        try:
            with suppress(OSError):  # man 4 pty: EIO once nobody has the other end
                while True:
                    await readable.wait()
                    readable.clear()
                    with suppress(BlockingIOError):
                        text += os.read(terminal, 65536).decode(errors="replace")
                    *lines, text = re.split(r"(?<=\n)", text)
                    self._show("".join(lines))
        finally:
            asyncio.get_running_loop().remove_reader(terminal)
            os.close(terminal)
            self.kill()
            os.waitpid(pid, 0)  # noqa: ASYNC222  # it is dead
            self.pid = None
            self._show(text)

    def _show(self, text: str) -> None:
        for words in WORDS.finditer(text):
            self._seen += 1
            kind = "reply" if words[1] == "r" else "message"
            key = f"{self._chat.name}, number {self._seen}"
            self._record.shown[key] = Shown(key, self._chat.name, kind, words[0], frozenset((words[2],)))
            self._record.reported.add(key)
            self._record.note()


class Round:
    """People talk side by side while processes die, until all has ended and nothing is left of it."""

    def __init__(self, plan: Plan, killer: Killer) -> None:
        self.record = Record(plan)
        self.deaths: list[tuple[Victim, str]] = []
        self._random = Random(f"{plan.seed}/{plan.number}/kills")
        self._killer = killer
        self._adapter = Adapter(self.record, SOCKETS["test"])
        self._terminals = [Terminal(chat, self.record) for chat in plan.chats if chat.channel == "terminal"]
        self._killed: Counter[str] = Counter()  #: units of containers

    async def run(self) -> None:
        began = time.time()
        try:
            async with asyncio.timeout(SETTLE_S), asyncio.TaskGroup() as tasks:
                shows = [tasks.create_task(self._adapter.run(), name="adapter")]
                shows += [tasks.create_task(terminal.run(), name="terminal") for terminal in self._terminals]
                await self._wire()  # by hand, so who does it would say it again
                kills = tasks.create_task(self._kill(), name="kills")
                await self._talk()
                kills.cancel()
                while self._waiting():  # noqa: ASYNC110
                    await asyncio.sleep(POLL_S)
                for show in shows:
                    show.cancel()
                while await orphans():  # noqa: ASYNC110
                    await asyncio.sleep(POLL_S)
        except* TimeoutError:
            open_ = [marker for marker in self.record.messages if not self.record.has_ended(marker)]
            self.record.fault(Fault.OTHER, f"no end after {SETTLE_S:.0f} s; open: {open_}")
            if not open_:
                for orphan in await orphans():
                    self.record.fault(Fault.ORPHAN, orphan)
        except* Exception:
            self.record.fault(Fault.OTHER, traceback.format_exc())
        with suppress(RuntimeError):  # nothing found
            line = ("--user", "--quiet", f"--since=@{began:.0f}", "--grep=Traceback", "--output=cat")
            self.record.fault(Fault.OTHER, await host.run("journalctl", *line))
        self._name_what_terminals_showed()
        self.record.faults += check(self.record, DATABASE, deaths=len(self.deaths))

    async def _wire(self) -> None:
        """Have the agents listen in their chats of the platform, and the person there be the owner."""
        chats = {chat.id: chat.agent for chat in self.record.plan.chats if chat.channel == "test"}
        line = Line(SOCKETS["test"])
        for chat in chats:
            invitation = {"chat": chat, "sender": "someone"}
            await line.call(f"{CHANNEL}.Invite", invitation)
        await line.drop()
        for chat in json.loads(await host.run(CTL, "chat", "list", "--json"))["chats"]:
            if chat["chat"] in chats:
                await host.run(CTL, "chat", "wire", str(chat["number"]), chats[chat["chat"]])
        await host.run(CTL, "person", "link", "owner", "test", "someone")

    async def _talk(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for chat in self.record.plan.chats:
                person = Person(chat, self.record, SOCKETS[chat.channel])
                tasks.create_task(person.talk(), name=chat.name)
        await self.record.until(self.record.all_ended)

    async def _kill(self) -> None:
        while len(self.deaths) < KILLS:
            await asyncio.sleep(self._random.expovariate(1 / KILL_EVERY_S))
            (victim,) = self._random.choices((*WEIGHTS,), (*WEIGHTS.values(),))
            if (what := await self._kill_one(victim)) is not None:
                self.deaths.append((victim, what))

    async def _kill_one(self, victim: Victim) -> str | None:
        """Kill one of these; return which, or None if there is none at this moment."""
        if victim is Victim.TERMINAL:
            terminal = self._random.choice(self._terminals)
            return terminal.name if terminal.kill() else None
        if victim in (Victim.ROUTER, Victim.GATEWAY):
            unit = host.ROUTER if victim is Victim.ROUTER else host.GATEWAY
            # No person's router dies twenty times a minute: RestartSteps= shall not slow it down.
            await host.systemctl("reset-failed", unit)
            pids = processes(UNITS / unit)
        else:
            spared = {unit for unit, times in self._killed.items() if times >= CONTAINER_KILLS}
            units = [path for path in UNITS.glob(CONTAINERS) if path.name not in spared]
            if not units:
                return None
            cgroup = self._random.choice(units)
            unit = cgroup.name
            pids = processes(cgroup, "libpod-payload-*" if victim is Victim.RUNNER else "runtime")
        if not pids or not await self._killer.kill(pids[0]):
            return None
        self._killed[unit] += victim in (Victim.RUNNER, Victim.CONMON)
        return unit

    def _waiting(self) -> bool:
        """Return whether something is open in the database: a terminal reports later than it shows."""
        with closing(sqlite3.connect(f"file:{DATABASE}?mode=ro", uri=True)) as connection:
            connection.row_factory = sqlite3.Row
            rows = [row for table in ("inbox", "outbox") for row in rows_of(connection, table, self.record)]
        return any(row["ended_at"] is None for row in rows)

    def _name_what_terminals_showed(self) -> None:
        """Give what terminals showed the key that it has, once: a terminal does not show keys."""
        with closing(sqlite3.connect(f"file:{DATABASE}?mode=ro", uri=True)) as connection:
            rows = connection.execute("SELECT body, key FROM outbox WHERE channel = 'terminal'")
            keys: dict[str, str] = dict(rows)
        self.record.shown = {
            keys.pop(shown.text, key) if shown.chat.startswith("t") else key: shown
            for key, shown in self.record.shown.items()
        }


def processes(cgroup: Path, below: str = ".") -> list[int]:
    """Return the pids in a cgroup, or in those below it that match; the oldest first."""
    pids: list[int] = []
    for file in sorted(cgroup.glob(f"{below}/cgroup.procs")):
        with suppress(OSError):  # gone
            pids += [int(pid) for pid in file.read_text().split()]
    return sorted(pids)


async def orphans() -> list[str]:
    """Return all there is of our agents' sessions: units, directories, containers, listeners."""
    found = [f"processes of {path.name}" for path in UNITS.glob(CONTAINERS)]
    found += [f"directory {path}" for path in paths.runtime().glob("agents/crash_*/*")]
    if found:  # the rest takes longer to ask
        return found
    units = await host.systemctl("list-units", "--all", "--plain", "--no-legend", "nanoclaw-crash_*@*")
    found += [f"unit {line}" for line in units.splitlines()]
    containers = await host.run("podman", "ps", "--all", "--format={{.Names}}")
    found += [f"container {name}" for name in containers.split() if name.startswith("nanoclaw-crash_")]
    listeners = await host.run("systemd-analyze", "--user", "fdstore", host.ROUTER)
    found += [f"in the fd store: {line}" for line in listeners.splitlines() if ".crash_" in line]
    try:
        if gateway := (await control("Status"))["gateway"]:
            sessions = [session for session in gateway["sessions"] if session.startswith("crash_")]
            found += [f"session {session} of the gateway" for session in sessions]
    except NanoclawError:  # it died last
        found.append("no router to ask")
    return found


class Killer:
    """Kills processes of the user, and of the user's containers, whose uids are foreign ones."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls) -> Killer:
        command = ("podman", "unshare", sys.executable, "-u", "-c", _KILL)
        pipe = asyncio.subprocess.PIPE
        return cls(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe))

    async def kill(self, pid: int) -> bool:
        """Return whether there was such a process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{pid}\n".encode())
        return await self._process.stdout.readline() == b"killed\n"

    async def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


_KILL = """
import os, sys
for line in sys.stdin:
    try:
        os.kill(int(line), 9)
        print("killed")
    except ProcessLookupError:
        print("gone")
"""


async def _add_channel() -> None:
    """Have the router listen for the channel "test", whose adapter is in this process."""
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text('kind = "none"\n')
    await control("Reload")
    line = Line(SOCKETS["test"])
    await line.call(f"{CHANNEL}.Announce", ANNOUNCEMENT)
    await line.drop()


async def measure(seed: int, points: int, only: int | None) -> int:
    """Run rounds until `points` processes have died; print the table, and return the exit status."""
    table = Table(Victim)
    began = time.monotonic()
    for name in AGENTS:
        await control("AddAgent", name=name, provider="echo", idleSeconds=1)
    killer = await Killer.start()
    await _add_channel()
    try:
        for number in itertools.count(1) if only is None else (only,):
            a_round = Round(make_plan(seed, number), killer)
            await a_round.run()
            faults = a_round.record.faults
            died, took_s = len(a_round.deaths), time.monotonic() - began
            print(f"round {number}: {died} died, {took_s:.0f} s since the beginning", file=sys.stderr)
            table.add([victim for victim, _ in a_round.deaths], [fault for fault, _ in faults])
            if faults:
                print(f"round {number}, tests/crash/run --real --seed {seed} --only {number}")
                print("\n".join(f"    {victim} died: {what}" for victim, what in a_round.deaths))
                print("\n".join(f"    {fault}: {what}" for fault, what in faults), flush=True)
            if table.points >= points:
                break
    finally:
        await killer.end()
        for name in AGENTS:
            await control("RemoveAgent", name=name)
        FILE.unlink()
        await control("Reload")
    print(table.render())
    print(f"seed {seed}, {table.points} points, {table.faults} faults, {time.monotonic() - began:.0f} s")
    return 1 if table.faults else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/crash/run --real", description=__doc__)
    parser.add_argument("--points", type=int, default=100, metavar="N", help="how many deaths (100)")
    parser.add_argument("--seed", type=int, metavar="S", help="of what is said and who dies (a random one)")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="one round")
    options = parser.parse_args()
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    print(f"seed {seed}, {options.points} points", flush=True)
    return asyncio.run(measure(seed, options.points, options.only))


if __name__ == "__main__":
    sys.exit(main())
