"""Power cuts: records what the router writes and syncs, and starts it on what a cut may leave of that.

    python -m tests.crash.power_cut [--prefixes N] [--samples N] [--seed N]

strace(1) records power_cut_script.py. A cut after any of its system calls leaves what was synced before: a
file's bytes by fsync(2) of the file, its name by fsync of the directory. Of the rest it leaves all (a prefix
of what was written), or any part, in any order (a sample): writes by sectors of 512 bytes, names one by one;
a rename(2) happens or not. That is less than common file systems promise. On each of these disks the router
starts and must have all that was acknowledged before the cut; a person's file and a unit is the old one or
the new one, whole.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from tests.crash.power_cut_script import started

SECTOR = 512
RECORD_S = 300
CALLS = (
    "openat,close,write,pwrite64,ftruncate,fsync,fdatasync,rename,renameat,renameat2,link,linkat,unlink,unlinkat,"
    "mkdir,mkdirat"
)
CALL = re.compile(r"(\w+)\((.*)\) += (\d+)")
STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
#: There before the script begins, as systemd makes them.
DIRECTORIES = ("state/nanoclaw", "config/nanoclaw/agents", "config/containers/systemd", "run")
WHOLE = (".toml", ".md", ".container")  #: files that are the old one or the new one

# --- what was done ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Write:
    file: int
    at: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Truncate:
    file: int
    size: int


@dataclass(frozen=True, slots=True)
class Names:
    """Names that appear (with a file or directory) or go (with None), all at once."""

    changes: tuple[tuple[int, str, int | None], ...]  #: directory, name, what it names


@dataclass(frozen=True, slots=True)
class Sync:
    file: int  #: or directory


@dataclass(frozen=True, slots=True)
class Ack:
    fact: dict[str, Any]


Event = Write | Truncate | Names | Sync | Ack


class Disk:
    """Files and directories by number; 0 is the root."""

    def __init__(self) -> None:
        self.files: dict[int, bytearray] = defaultdict(bytearray)
        self.names: dict[int, dict[str, int]] = defaultdict(dict)

    def apply(self, event: Event) -> None:
        match event:
            case Write(file, at, data):
                content = self.files[file]
                content.extend(bytes(max(0, at - len(content))))
                content[at : at + len(data)] = data
            case Truncate(file, size):
                content = self.files[file]
                del content[size:]
                content.extend(bytes(size - len(content)))
            case Names(changes):
                for directory, name, named in changes:
                    if named is None:
                        self.names[directory].pop(name, None)
                    else:
                        self.names[directory][name] = named

    def find(self, path: str) -> int | None:
        number: int | None = 0
        for part in path.split("/"):
            number = None if number is None else self.names[number].get(part)
        return number


class Recording:
    """All that a script did below a directory, in order."""

    def __init__(self, root: Path, acks: Path, trace: Path) -> None:
        self.events: list[Event] = []
        self.directories = {0}
        self._root, self._acks = f"{root}/", str(acks)
        self._disk = Disk()  #: as it is without a cut
        self._numbers = 0
        self._open: dict[str, tuple[int | Path, int]] = {}  #: by descriptor: file, or the acks; position
        for directory in DIRECTORIES:
            parts = directory.split("/")
            for depth in range(1, len(parts) + 1):
                self._make_directory("/".join(parts[:depth]))
        #: By path, what WHOLE files were: from which event on, and the content.
        self.versions: dict[str, list[tuple[int, bytes | None]]] = defaultdict(list)
        self.base, self.events = self.events, []
        unfinished: dict[str, str] = {}
        with trace.open(encoding="ascii") as lines:
            for line in lines:
                pid, call = line.rstrip("\n").split(maxsplit=1)
                if call.endswith("<unfinished ...>"):
                    unfinished[pid] = call.removesuffix("<unfinished ...>")
                    continue
                if call.startswith("<... "):
                    call = unfinished.pop(pid) + call.partition(" resumed>")[2]
                if match := CALL.match(call):
                    self._read(*match.groups())

    def _note(self, event: Event) -> None:
        self._disk.apply(event)
        self.events.append(event)

    def _place(self, path: str) -> tuple[int, str] | None:
        """Return directory and name of a path below the root."""
        if not path.startswith(self._root):
            return None
        directory, _, name = path.removeprefix(self._root).rpartition("/")
        found = self._disk.find(directory) if directory else 0
        assert found is not None, path
        return found, name

    def _make_directory(self, path: str) -> None:
        if self._disk.find(path) is None:
            self._numbers += 1
            self.directories.add(self._numbers)
            parent, _, name = path.rpartition("/")
            directory = self._disk.find(parent) if parent else 0
            assert directory is not None
            self._note(Names(((directory, name, self._numbers),)))

    def _read(self, name: str, arguments: str, result: str) -> None:
        strings = [bytes.fromhex(text.replace("\\x", "")) for text in STRING.findall(arguments)]
        paths = [text.decode(errors="replace") for text in strings]
        rest = STRING.sub("", arguments).split(", ")
        match name:
            case "openat":
                self._read_open(paths[0], rest[2], result)
            case "close":
                self._open.pop(rest[0], None)
            case "write" | "pwrite64" if rest[0] in self._open:
                file, position = self._open[rest[0]]
                if isinstance(file, Path):
                    self.events += [Ack(json.loads(line)) for line in strings[0].splitlines()]
                    return
                at = int(rest[3]) if name == "pwrite64" else position
                self._note(Write(file, at, strings[0][: int(result)]))
                if name == "write":
                    self._open[rest[0]] = (file, position + int(result))
            case "ftruncate" if rest[0] in self._open:
                file, _ = self._open[rest[0]]
                assert isinstance(file, int)
                self._note(Truncate(file, int(rest[1])))
            case "fsync" | "fdatasync" if rest[0] in self._open:
                file, _ = self._open[rest[0]]
                assert isinstance(file, int)
                self._note(Sync(file))
            case "mkdir" | "mkdirat":
                if self._place(paths[0]):
                    self._make_directory(paths[0].removeprefix(self._root))
            case "rename" | "renameat" | "renameat2" | "link" | "linkat" | "unlink" | "unlinkat":
                self._read_names(name, paths)

    def _read_open(self, path: str, flags: str, descriptor: str) -> None:
        self._open.pop(descriptor, None)
        if path == self._acks:
            self._open[descriptor] = (Path(path), 0)
        if (place := self._place(path)) is None:
            return
        directory, name = place
        file = self._disk.names[directory].get(name, 0)
        if not file:
            assert "O_CREAT" in flags, (path, flags)
            self._numbers += 1
            file = self._numbers
            self._note(Names(((directory, name, file),)))
        elif "O_TRUNC" in flags:
            self._note(Truncate(file, 0))
        self._open[descriptor] = (file, 0)

    def _read_names(self, name: str, paths: list[str]) -> None:
        places = [self._place(path) for path in paths]
        if places[0] is None:
            return
        directory, source = places[0]
        changes: list[tuple[int, str, int | None]] = []
        if not name.startswith("link"):
            changes.append((directory, source, None))
        if not name.startswith("unlink"):
            assert places[1] is not None
            changes.append((*places[1], self._disk.names[directory][source]))
        for path, (_, _, file) in zip(paths[-len(changes) :], changes, strict=True):
            if path.endswith(WHOLE):
                content = None if file is None else bytes(self._disk.files[file])
                self.versions[path.removeprefix(self._root)].append((len(self.events), content))
        self._note(Names(tuple(changes)))


# --- what a cut leaves --------------------------------------------------------------------------------


def left_by_cut(recording: Recording, at: int, dice: random.Random | None) -> Disk:
    """Return the disk after a cut before event `at`, with all that is not synced, or what the dice leave."""
    disk = Disk()
    for event in recording.base:
        disk.apply(event)
    synced: dict[int, int] = {}
    for number, event in enumerate(recording.events[:at]):
        if isinstance(event, Sync):
            synced[event.file] = number
    kept = dice.choice((0.0, 0.3, 0.7, 0.95)) if dice else 1.0
    for number, event in enumerate(recording.events[:at]):
        match event:
            case Write(file, start, data) if dice and number > synced.get(file, -1):
                for sector in range(start - start % SECTOR, start + len(data), SECTOR):
                    if dice.random() < kept:
                        part = slice(
                            max(start, sector) - start, min(start + len(data), sector + SECTOR) - start
                        )
                        disk.apply(Write(file, max(start, sector), data[part]))
            case Truncate(file, _) if dice and number > synced.get(file, -1):
                if dice.random() < kept:
                    disk.apply(event)
            case Names(changes) if dice and any(number > synced.get(d, -1) for d, _, _ in changes):
                if dice.random() < kept:
                    disk.apply(event)
            case _:
                disk.apply(event)
    return disk


def write_disk(disk: Disk, directories: set[int], root: Path, number: int = 0) -> None:
    root.mkdir()
    for name, file in disk.names[number].items():
        if file in directories:
            write_disk(disk, directories, root / name, file)
        elif name.endswith("-shm"):  # it is mapped, and lost in a cut: SQLite must not trust it
            (root / name).write_bytes(random.Random(number).randbytes(32 << 10))
        else:
            (root / name).write_bytes(disk.files[file])


# --- what must be true ----------------------------------------------------------------------------------


class Broken(AssertionError):
    """Something acknowledged is not there."""


def require(truth: bool, words: str) -> None:
    if not truth:
        raise Broken(words)


def check_files(recording: Recording, at: int, disk: Disk) -> None:
    """Files that are whole or not at all are as at the last acknowledgement, or as written since."""
    events = recording.events[:at]
    acknowledged = max((number for number, event in enumerate(events) if isinstance(event, Ack)), default=-1)
    for path, versions in recording.versions.items():
        file = disk.find(path)
        content = None if file is None else bytes(disk.files[file])
        before = [content for number, content in versions if number < acknowledged]
        since = [content for number, content in versions if acknowledged < number < at]
        require(content in (before[-1] if before else None, *since), f"{path} is none of what was written")


async def check_start(facts: Sequence[dict[str, Any]], under_way: dict[str, Any]) -> None:
    """Start as the router does, and look for all that was acknowledged."""
    agents: dict[str, str | None] = {}
    for fact in facts:
        if "agent" in fact:
            agents[fact["agent"]] = fact["memory"]
        if "removed" in fact:
            agents[fact["removed"]] = None
    async with started() as (db, registry):
        inbox = {row["id"]: row for row in await db._reader.execute_fetchall("SELECT * FROM inbox")}
        outbox = {row["key"]: row for row in await db._reader.execute_fetchall("SELECT * FROM outbox")}
        replied = {row["turn"] for row in outbox.values() if row["kind"] == "reply"}
        for row in inbox.values():
            require((row["state"] == "answered") == (row["turn"] in replied), f"half a turn: {row['id']}")
        for fact in facts:
            match fact:
                case {"stored": message}:
                    require(message in inbox, f"message {message} is lost")
                case {"answered": messages}:
                    for message in messages:
                        require(inbox[message]["state"] == "answered", f"the answer to {message} is lost")
                case {"sent": key}:
                    require(key in outbox, f"{key} is lost")
                case {"delivered": key}:
                    require(outbox[key]["state"] == "sent", f"{key} would be sent again")
                case {"held": agent}:
                    held = {row["name"]: row["held"] for row in await db.read("list_agents")}
                    require(held[agent] == 1, f"{agent} is not held")
                case {"backup": file, "messages": messages}:
                    with closing(sqlite3.connect(file)) as backup:
                        (count,) = backup.execute("SELECT count(*) FROM inbox").fetchone()
                    require(count == messages, "the backup is not whole")
        for name, memory in agents.items():
            agent = registry.find(name)  # type: ignore[arg-type]
            if under_way.get("removed") != name:
                require(
                    (agent is None) == (memory is None), f"{name} is {'there again' if agent else 'lost'}"
                )
            if agent is not None:
                require(agent.problem is None, f"{name}: {agent.problem}")


# --- the whole --------------------------------------------------------------------------------------


def environment(root: Path) -> dict[str, str]:
    return {
        "XDG_STATE_HOME": f"{root}/state",
        "XDG_CONFIG_HOME": f"{root}/config",
        "XDG_RUNTIME_DIR": f"{root}/run",
    }


def record(directory: Path) -> Recording:
    """Run the script once, below `directory`/root, which is gone afterwards."""
    root, acks, trace = directory / "root", directory / "acks", directory / "trace"
    for name in DIRECTORIES:
        (root / name).mkdir(parents=True)
    strace = (
        "strace",
        "-f",
        "-qq",
        "-xx",
        "-s",
        str(1 << 24),
        "--seccomp-bpf",
        "-e",
        f"trace={CALLS}",
        "-o",
        trace,
    )
    script = (sys.executable, "-m", "tests.crash.power_cut_script", acks)
    subprocess.run(
        [*strace, *script],
        env={**os.environ, **environment(root)},
        stderr=subprocess.DEVNULL,
        check=True,
        timeout=RECORD_S,
    )
    shutil.rmtree(root)
    return Recording(root, acks, trace)


def cut(recording: Recording, directory: Path, at: int, seed: str | None) -> str:
    """Cut before event `at`, start again; returns what is wrong, or nothing. Without a seed: a prefix."""
    disk = left_by_cut(recording, at, random.Random(seed) if seed else None)
    facts = [event.fact for event in recording.events[:at] if isinstance(event, Ack)]
    rest = [event.fact for event in recording.events[at:] if isinstance(event, Ack)]
    root = directory / "root"
    write_disk(disk, recording.directories, root)
    try:
        check_files(recording, at, disk)
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            asyncio.run(check_start(facts, rest[0] if rest else {}))
    except Exception as exc:
        what = f"sample {seed}" if seed else "prefix"
        return f"cut before event {at}, {what}: {type(exc).__name__}: {exc}"
    finally:
        shutil.rmtree(root)
    return ""


def replay(*, prefixes: int, samples: int, seed: int) -> tuple[str, list[str]]:
    """Record, and start after that many cuts of each kind; returns the counts, and what was wrong."""
    # In memory if possible: the script's syncs count, not the disk's.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        directory = Path(name)
        recording = record(directory)
        events = len(recording.events)
        dice = random.Random(seed)
        points = sorted(dice.sample(range(events + 1), min(prefixes, events + 1)))
        cuts: list[tuple[int, str | None]] = [(at, None) for at in points]
        cuts += [(dice.randint(1, events), f"{seed}/{number}") for number in range(samples)]
        began = time.monotonic()
        with mock.patch.dict(os.environ, environment(directory / "root")):
            wrong = [words for at, sample in cuts if (words := cut(recording, directory, at, sample))]
    acks = sum(isinstance(event, Ack) for event in recording.events)
    counts = (
        f"seed {seed}: {events} writes, names, syncs and acknowledgements ({acks});"
        f" cuts: {len(points)} prefixes, {samples} samples; wrong: {len(wrong)};"
        f" {time.monotonic() - began:.0f} s"
    )
    return counts, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description="Cut the router's power, and start it again.")
    parser.add_argument("--prefixes", type=int, default=1 << 30, help="default: each")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    counts, wrong = replay(prefixes=options.prefixes, samples=options.samples, seed=options.seed)
    print(*wrong, counts, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
