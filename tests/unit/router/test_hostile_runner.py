"""A hostile program in the runner's place: memory stays flat, others are served, it is named and cut off.

What it does is in tests/support/hostile_runner.py, one function a kind; it runs as a process of its own.
Beside it, a polite session is asked one thing after the other all the time. `pytest -rP` shows the figures.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nanoclawd import journal, limits
from nanoclawd.wire import Json, VarlinkError
from tests.support import hostile_runner
from tests.support.router import AGENT, Adapter, Container, Place, Router, echo
from tests.support.varlink_peer import WAIT_S, eventually

HAS_PASSRIGHTS = tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 16)  # see bind_listener()
#: The largest message as bytes, as text and as objects, and what a session's four connections may hold.
GROWTH_KIB = 32 << 10
JOURNAL_LINES = 60  #: of one life of a container: an offence each, and a few more

#: What breaks the contract, and what the journal says of it. The runner is stopped, its message tried again,
#: and in the end a dead letter.
CUT_OFF = {
    "forged_turns": "io.nanoclaw.Agent.NoSuchTurn",
    "wrong_types": "org.varlink.service.",
    "malformed": "message: is not JSON",
    "endless_line": "size: a message is longer than",
    "many_items": "org.varlink.service.InvalidParameter {'parameter': 'replies'}",
    "no_hello": "io.nanoclaw.Agent.OutOfOrder",
    "descriptors": "io.nanoclaw.Agent.NoSuchTurn" if HAS_PASSRIGHTS else "descriptor: more than 0 came",
    "no_reading": "reads no replies",
}
#: What is allowed in small doses. The runner waits.
SLOWED = ("heartbeats", "activity", "messages", "large_calls", "works", "connections")
#: What holds something open, or is harmless.
HELD = ("half_messages", "slow_writing", "silent")


def _is_mallory(unit: str) -> bool:
    return unit.startswith("nanoclaw-mallory@")


class Lines:
    """What was written to the journal."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.all: list[tuple[str, str, str | None]] = []  #: event, text, unit
        send = journal._send

        def record(priority: int, event: str, text: str, fields: dict[str, Any]) -> None:
            self.all.append((event, text, fields.get("unit")))
            send(priority, event, text, fields)

        monkeypatch.setattr(journal, "_send", record)

    def of_mallory(self, event: str | None = None) -> list[str]:
        """Return the texts of what names mallory's unit."""
        return [text for e, text, unit in self.all if _is_mallory(unit or "") and event in (None, e)]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Lines:
    return Lines(monkeypatch)


class Memory:
    """This process's resident memory, the router's among it."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: the peak begins anew
        self._before_kib = self._read("VmRSS")

    def grown_kib(self) -> int:
        """Return by how much it was larger at its peak."""
        return self._read("VmHWM") - self._before_kib

    @staticmethod
    def _read(field: str) -> int:
        found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1])


class Hostile:
    """Starts the program in the place of mallory's runner; all others are polite."""

    def __init__(self, place: Place, kind: str) -> None:
        self.kind, self.argument, self.unit = kind, "", ""
        self.seen: list[Json] = []  #: what each life of it printed
        self.lives = 0
        place.registry.add("mallory")
        place.systemd.program = self._run

    async def _run(self, container: Container) -> None:
        if not _is_mallory(container.unit):
            await echo(container)
            return
        self.lives += 1
        self.unit = container.unit
        script = str(Path(hostile_runner.__file__))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", script, self.kind, container.socket.name, self.argument),
            cwd=container.socket.parent,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            container.ready.set()
            assert process.stdout is not None
            line = await process.stdout.readline()
            if line:  # else it has left
                self.seen.append(json.loads(line))
            await process.wait()
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGKILL)
                await process.wait()


class Chat:
    """A person's end of mallory's chat, who reads all that comes."""

    def __init__(self, adapter: Adapter) -> None:
        self.texts: list[str] = []
        self.activity = 0
        self._adapter = adapter

    async def read(self) -> None:
        while True:
            item = await self._adapter.stream.result()
            if item["delivery"] is None:
                self.activity += 1
            else:
                self.texts.append(item["delivery"]["text"])
                await self._adapter.sent(item["delivery"])


@asynccontextmanager
async def reading(router: Router) -> AsyncIterator[Chat]:
    chat = Chat(await router.attach(chat="evil"))
    task = asyncio.create_task(chat.read())
    try:
        yield chat
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Polite:
    """A person who talks to another agent."""

    def __init__(self, router: Router, adapter: Adapter) -> None:
        self._router, self._adapter = router, adapter
        self.took_s: list[float] = []

    async def ask(self) -> None:
        began = time.monotonic()
        text = f"message {len(self.took_s)}"
        await self._router.deliver(text)
        assert await self._adapter.reply() == f"echo: {text}"
        self.took_s.append(time.monotonic() - began)


async def attack(place: Place, hostile: Hostile, lines: Lines, *, until_dead: bool) -> Chat:
    """Let mallory's runner be hostile until it is done, or its message dead; check what always holds."""
    async with place.router() as router, reading(router) as chat:
        polite = Polite(router, await router.attach(chat="chat"))
        await polite.ask()
        descriptors = len(os.listdir("/proc/self/fd"))
        memory = Memory()

        await router.deliver("hello", agent="mallory", chat="evil")
        async with asyncio.timeout(WAIT_S):
            while not (chat.texts if until_dead else hostile.seen):
                await polite.ask()
        await polite.ask()

        grown_kib = memory.grown_kib()
        longest_ms = max(polite.took_s) * 1000
        print(
            f"{hostile.kind}: {hostile.lives} containers, memory +{grown_kib} KiB;"
            f" {len(polite.took_s)} polite messages, at most {longest_ms:.0f} ms;"
            f" saw {json.dumps(hostile.seen)[:200]}"
        )
        assert grown_kib <= GROWTH_KIB
        assert len(lines.of_mallory()) <= JOURNAL_LINES * hostile.lives
        await place.systemd.end(hostile.unit)
        await eventually(lambda: len(os.listdir("/proc/self/fd")) <= descriptors)
    return chat


@pytest.mark.parametrize("kind", CUT_OFF)
def test_offender_is_named_and_cut_off(
    place: Place, monkeypatch: pytest.MonkeyPatch, lines: Lines, kind: str
) -> None:
    monkeypatch.setattr(limits, "BACKOFF_FIRST_S", 0.01)
    monkeypatch.setattr(limits, "SEND_S", 0.02)
    monkeypatch.setattr(limits, "OFFENCES", 10)
    hostile = Hostile(place, kind)

    async def run() -> None:
        chat = await attack(place, hostile, lines, until_dead=True)

        reason = "its runner broke the protocol too often"
        assert hostile.lives == limits.ATTEMPTS
        (text,) = chat.texts
        assert text.startswith(f"Your message could not be answered: {reason}")
        named = lines.of_mallory("protocol-broken")
        assert [f"{reason}, at last with: {CUT_OFF[kind]}" in line for line in named] == [
            True
        ] * hostile.lives
        assert place.systemd.stops.count(hostile.unit) >= hostile.lives

    place.run(run)


@pytest.mark.parametrize("kind", SLOWED)
def test_what_is_too_much_waits(
    place: Place, monkeypatch: pytest.MonkeyPatch, lines: Lines, kind: str
) -> None:
    if kind != "messages":  # a busy machine may do no more
        monkeypatch.setattr(limits, "CALLS_PER_S", 20)
        monkeypatch.setattr(limits, "CALLS_BURST", 20)
    hostile = Hostile(place, kind)

    async def run() -> None:
        began = time.monotonic()
        chat = await attack(place, hostile, lines, until_dead=False)

        (seen,) = hostile.seen
        allowed = limits.CALLS_BURST + limits.CALLS_PER_S * (time.monotonic() - began)
        # What lies in the sockets' buffers was said, and not heard yet.
        assert seen.get("calls", 0) <= allowed + 200
        assert chat.activity <= allowed
        assert not lines.of_mallory("protocol-broken")
        if kind != "messages":
            assert lines.of_mallory("calls-too-fast") == ["letting it wait from now on"]

    place.run(run)
    if kind == "messages":
        answers = hostile.seen[0]["answers"]
        # The 300 of one key count once, so there is room for 99 others.
        assert answers == {"Refused": 7 + 4 + 300 - 99, "ok": 300 + 99}
    if kind == "works":
        assert hostile.seen[0]["same"]


@pytest.mark.parametrize("kind", HELD)
def test_what_is_held_open_harms_nobody(place: Place, lines: Lines, kind: str) -> None:
    hostile = Hostile(place, kind)

    async def run() -> None:
        await attack(place, hostile, lines, until_dead=False)

    place.run(run)
    assert not lines.of_mallory("protocol-broken")
    if kind == "slow_writing":
        assert hostile.seen[0]["answers"] == ["ok"]


@pytest.mark.parametrize("kind", ["never_works", "silent"])
def test_runner_that_asks_for_no_work_is_stopped(
    place: Place, monkeypatch: pytest.MonkeyPatch, lines: Lines, kind: str
) -> None:
    monkeypatch.setattr(limits, "BACKOFF_FIRST_S", 0.01)
    monkeypatch.setattr(limits, "HELLO_S", 0.2)
    hostile = Hostile(place, kind)

    async def run() -> None:
        chat = await attack(place, hostile, lines, until_dead=True)

        assert len(chat.texts) == 1 and "did not ask for work" in chat.texts[0]
        assert len(lines.of_mallory("runner-silent")) == limits.ATTEMPTS

    place.run(run)


def test_runner_that_leaves_with_its_turn_ends_in_a_dead_letter(
    place: Place, monkeypatch: pytest.MonkeyPatch, lines: Lines
) -> None:
    monkeypatch.setattr(limits, "BACKOFF_FIRST_S", 0.01)
    hostile = Hostile(place, "leaves")

    async def run() -> None:
        chat = await attack(place, hostile, lines, until_dead=True)

        assert (len(chat.texts), hostile.lives) == (1, limits.ATTEMPTS)

    place.run(run)


def test_offender_is_not_heard_while_its_container_takes_its_time_to_stop(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "OFFENCES", 3)
    ended = asyncio.Event()

    async def offends(container: Container) -> None:
        await container.begin()
        with pytest.raises((EOFError, ConnectionError)):
            for _ in range(10):
                with pytest.raises(VarlinkError, match="NoSuchTurn"):
                    await container.call("RenewTurn", {"turn": "forged"})
        late = await container.connect(hello=False)
        await late.send(f"{AGENT}.Hello", {"protocol": 1, "version": "x"})
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(late.reader.read(1), 0.2)
        ended.set()

    async def run() -> None:
        async def stop(unit: str) -> None:
            await ended.wait()

        monkeypatch.setattr(place.systemd, "stop_unit", stop)
        place.systemd.programs = [offends]
        async with place.router() as router:
            await router.deliver("hello")
            await asyncio.wait_for(ended.wait(), WAIT_S)

    place.run(run)


def test_answer_counts_once(place: Place, lines: Lines) -> None:
    Hostile(place, "acknowledge_twice")

    async def run() -> None:
        async with place.router() as router, reading(router) as chat:
            await router.deliver("hello", agent="mallory", chat="evil")
            await eventually(lambda: lines.of_mallory("protocol-broken"))
            await router.settled()

            assert await router.states() == ["answered"]
            await eventually(lambda: chat.texts)
            assert chat.texts == ["answer 0"]

    place.run(run)


def test_another_sessions_turn_is_nobodys(place: Place, lines: Lines) -> None:
    hostile = Hostile(place, "foreign_turn")
    release = asyncio.Event()

    async def slow(container: Container) -> None:
        await container.begin()
        turn = await container.take()
        hostile.argument = turn["id"]
        await release.wait()
        await container.finish(turn, "mine")

    async def run() -> None:
        place.systemd.programs = [slow]
        async with place.router() as router:
            adapter = await router.attach(chat="chat")
            await router.deliver("hello")
            await eventually(lambda: hostile.argument)
            await router.deliver("hello", agent="mallory", chat="evil")
            await eventually(lambda: hostile.seen)

            release.set()

            assert await adapter.reply() == "mine"
            assert (await router.states())[0] == "answered"
            assert [row["body"] for row in await router.outbox()] == ["mine"]

    place.run(run)
    assert hostile.seen[0]["answers"] == ["NoSuchTurn"] * 5


def test_goodbye_while_a_message_waits_for_its_next_attempt(
    place: Place, monkeypatch: pytest.MonkeyPatch, lines: Lines
) -> None:
    """It may leave, and says so again and again; that gives it no more time than saying so once."""
    monkeypatch.setattr(limits, "STOP_TURN_S", 0.5)
    monkeypatch.setattr(limits, "BACKOFF_FIRST_S", 60.0)
    hostile = Hostile(place, "goodbyes")

    async def run() -> None:
        async with place.router() as router:
            await router.deliver("hello", agent="mallory", chat="evil")

            await eventually(lambda: lines.of_mallory("runner-stayed"))
            await eventually(lambda: not place.systemd.is_running(hostile.unit))

            assert (await router.states(), hostile.lives, hostile.seen) == (["queued"], 1, [])

    place.run(run)


def test_journal_shows_an_agents_words_on_one_line(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    async def forges(container: Container) -> None:
        peer = await container.connect(hello=False)
        await peer.call(f"{AGENT}.Hello", {"protocol": 1, "version": "x\n<3>forged: \x1b[31m"})
        await echo(container)

    async def run() -> None:
        place.systemd.programs = [forges]
        async with place.router() as router:
            await router.deliver("hello")
            await router.settled()

    place.run(run)
    assert r"runner-hello: version=x\n<3>forged: \x1b[31m" in capfd.readouterr().err


def test_failure_in_ugly_words_is_one_clean_line(place: Place, lines: Lines) -> None:
    Hostile(place, "ugly_failure")

    async def run() -> None:
        async with place.router() as router, reading(router) as chat:
            await router.deliver("hello", agent="mallory", chat="evil")
            await eventually(lambda: chat.texts)

            (text,) = chat.texts
            assert text.isprintable() and len(text) < 700, text
            (dead,) = [t for e, t, _ in lines.all if e == "message-dead"]
            assert dead.isprintable()

    place.run(run)


def test_each_kind_of_hostility_is_tested() -> None:
    elsewhere = {"acknowledge_twice", "foreign_turn", "goodbyes", "leaves", "never_works", "ugly_failure"}
    in_a_container = {"bad_files", "noise"}

    assert {*CUT_OFF, *SLOWED, *HELD, *elsewhere, *in_a_container} == set(hostile_runner.kinds())
