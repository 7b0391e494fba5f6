"""Machine: a Linux with a user manager and rootless Podman, on which tests run commands.

NestedMachine boots one with tests/machine/machine; LocalMachine is the session of whoever runs the tests.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tests/machine/machine"
STORE_TOOL = ROOT / "tests/machine/store"

WARNING = 4  # man 3 syslog; lower is worse
#: What systemd says of a process that crashed or that a seccomp filter killed: never in order, in any unit.
CRASH = re.compile(
    r"code=dumped|code=killed, status=(4/ILL|6/ABRT|7/BUS|8/FPE|11/SEGV|31/SYS)|SECCOMP|apparmor=\"DENIED\""
)
#: What systemd says when a stopped program's last word to it comes after its unit's end: nobody's fault.
LATE = re.compile(r"Got notification message from PID \d+, but reception is disabled")
POLL_S = 0.05
POLL_MAX_S = 0.4  #: each look takes processes, and other tests need the processor

T = TypeVar("T")
Entry = dict[str, Any]  # man 7 systemd.journal-fields


class MachineError(Exception):
    """A command failed in the machine; the message shows it ready to paste, with its output."""


def _as_text(data: object) -> str:
    """Return a journal field as text: journalctl gives bytes that are no UTF-8 as a list of numbers."""
    return bytes(data).decode(errors="replace") if isinstance(data, list) else str(data)


def describe(entry: Entry) -> str:
    """Return one journal entry as a line: unit, priority, message."""
    unit = entry.get("USER_UNIT") or entry.get("_SYSTEMD_USER_UNIT") or entry.get("_SYSTEMD_UNIT", "-")
    return f"{unit} <{entry.get('PRIORITY', '-')}> {_as_text(entry.get('MESSAGE', ''))}"


class Machine(ABC):
    """Where the product runs. Each call is one command there; nothing is kept open between calls."""

    home: str  #: the user's home directory, as seen in the machine
    project: str  #: the checkout, as seen in the machine
    user: str  #: the user whose manager runs the product

    def __init__(self) -> None:
        self._cursor: str | None = None  # the journal up to here has been judged
        self._expected: list[re.Pattern[str]] = []

    @abstractmethod
    def argv(self, command: Sequence[str], *, user: str | None, cwd: str | None, unit: bool) -> list[str]:
        """Return what to run out here so that `command` runs in the machine."""

    @abstractmethod
    def _read_journal(self, options: Sequence[str]) -> str:
        """Return journalctl's output for these options, after everything written so far has arrived."""

    # Commands

    def popen(
        self,
        *command: str,
        user: str | None = None,
        cwd: str | None = None,
        unit: bool = False,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[str]:
        """Start `command` in the machine and return it; the caller ends it.

        unit: as a transient unit of the user manager, with the environment that units have.
        user: "root" or a name; default is the product's user. options: those of subprocess.Popen.
        """
        if env:
            command = ("env", *(f"{name}={value}" for name, value in env.items()), *command)
        return subprocess.Popen(
            self.argv(command, user=user, cwd=cwd, unit=unit),
            text=True,
            errors="replace",
            **options,
        )

    def run(
        self,
        *command: str,
        check: bool = True,
        user: str | None = None,
        cwd: str | None = None,
        unit: bool = False,
        env: Mapping[str, str] | None = None,
        input: str | None = None,
        timeout_s: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Run `command` to its end and return it, with stdout and stderr as text.

        Raises MachineError if it fails (with check) or does not end in time.
        """
        shown = f"$ {shlex.join(command)}"
        with self.popen(
            *command,
            user=user,
            cwd=cwd,
            unit=unit,
            env=env,
            stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            try:
                stdout, stderr = process.communicate(input, timeout=timeout_s)
            except subprocess.TimeoutExpired as exc:
                process.kill()
                stdout, stderr = process.communicate()
                raise MachineError(f"{shown}\nno end after {timeout_s} s\n{stdout}\n{stderr}") from exc
        if check and process.returncode != 0:
            raise MachineError(f"{shown}\nexit status {process.returncode}\n{stdout}\n{stderr}")
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    def sh(self, script: str, **options: Any) -> str:
        """Run a shell script as `run` does and return its stdout, without the last newline."""
        return self.run("bash", "-euo", "pipefail", "-c", script, **options).stdout.rstrip("\n")

    def systemctl(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run `systemctl --user` as `run` does."""
        return self.run("systemctl", "--user", *arguments, **options)

    def unit(self, name: str, *properties: str) -> dict[str, str]:
        """Return properties of a user unit, as `systemctl show` names them (default: its states)."""
        wanted = properties or ("LoadState", "ActiveState", "SubState", "Result", "MainPID", "NRestarts")
        shown = self.systemctl("show", "--property", ",".join(wanted), "--", name).stdout
        return dict(line.split("=", 1) for line in shown.splitlines())

    # Files

    def read(self, path: str, **options: Any) -> str:
        """Return a text file of the machine."""
        return self.run("cat", "--", path, **options).stdout

    def write(self, path: str, text: str, *, mode: str = "644", **options: Any) -> None:
        """Write a text file in the machine, its directory too; it appears whole."""
        script = 'mkdir -p "$(dirname "$1")" && cat > "$1.new" && chmod "$2" "$1.new" && mv "$1.new" "$1"'
        self.run("bash", "-c", script, "write", path, mode, input=text, **options)

    def exists(self, path: str) -> bool:
        """Say whether something is at `path`."""
        return self.run("test", "-e", path, check=False).returncode == 0

    # Waiting

    def wait_for(self, predicate: Callable[[], T | None], *, within_s: float = 10, what: str = "") -> T:
        """Ask `predicate` again and again until it returns something true, and return that.

        Raises MachineError after `within_s`, with the last lines of the journal.
        """
        deadline, pause_s = time.monotonic() + within_s, POLL_S
        while not (answer := predicate()):
            if time.monotonic() >= deadline:
                tail = "\n".join(describe(entry) for entry in self.journal()[-30:])
                raise MachineError(
                    f"{what or predicate} did not come true in {within_s} s; journal:\n{tail}"
                )
            time.sleep(pause_s)
            pause_s = min(POLL_MAX_S, pause_s * 1.25)
        return answer

    # The journal

    def journal(self, unit: str | None = None, *, since_check: bool = True) -> list[Entry]:
        """Return the journal's entries, of one user unit or of all.

        since_check: only those after the last check_journal(), that is, of this test.
        """
        options = ["--output=json", "--all"]
        if since_check and self._cursor is not None:
            options.append(f"--after-cursor={self._cursor}")
        entries: list[Entry] = [json.loads(line) for line in self._read_journal(options).splitlines()]
        if unit is None:
            return entries
        return [
            entry
            for entry in entries
            if unit in (entry.get("_SYSTEMD_USER_UNIT"), entry.get("USER_UNIT"), entry.get("UNIT"))
        ]

    def expect_journal(self, pattern: str) -> None:
        """Let the end of this test accept a warning or crash whose line, see describe, matches `pattern`."""
        self._expected.append(re.compile(pattern))

    def check_journal(self) -> None:
        """Judge what came into the journal since the last time; forget what was expected.

        Raises AssertionError on a crash of anything, and on a warning or worse of a unit nanoclaw*, or of a
        process of the user that ended too soon for journald to know its unit.
        """
        entries = self.journal()
        expected, self._expected = self._expected, []
        if entries:
            self._cursor = entries[-1]["__CURSOR"]
        lines = [describe(entry) for entry in entries if _is_alarming(entry)]
        unexpected = [line for line in lines if not any(pattern.search(line) for pattern in expected)]
        if unexpected:
            raise AssertionError("unexpected in the journal:\n" + "\n".join(unexpected))


def _is_alarming(entry: Entry) -> bool:
    if CRASH.search(_as_text(entry.get("MESSAGE", ""))):
        return True
    if LATE.search(_as_text(entry.get("MESSAGE", ""))):
        return False
    if int(entry.get("PRIORITY", "6")) > WARNING:
        return False
    units = (entry.get("_SYSTEMD_USER_UNIT"), entry.get("USER_UNIT"))
    ours = any(str(unit).startswith("nanoclaw") for unit in units if unit)
    # Last words: the process had ended before journald looked at whose it was.
    nobodys = "_SYSTEMD_UNIT" not in entry and entry.get("_UID", "0") != "0"
    return ours or nobodys


class NestedMachine(Machine):
    """A machine of namespaces, booted here (needs root) and pristine at each boot."""

    home = "/home/claw"
    project = "/srv/project"
    user = "claw"

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = os.environ.get("NANOCLAW_MACHINE_PREFIX", "") + name

    def tool(self, *arguments: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Run tests/machine/machine on this machine, whatever its exit status."""
        env = {**os.environ, "NANOCLAW_MACHINE": self.name}
        return subprocess.run(
            [TOOL, *arguments], env=env, text=True, capture_output=True, check=False, timeout=timeout_s
        )

    def up(self, *options: str) -> None:
        """Boot it, with options of `machine up`; the journal starts anew."""
        self._cursor = None
        done = self.tool("up", *options)
        if done.returncode != 0:
            raise MachineError(done.stderr)

    def down(self, *options: str) -> None:
        """End it."""
        done = self.tool("down", *options)
        if done.returncode != 0:
            raise MachineError(done.stderr)

    def pid(self) -> int:
        """Return the pid of its PID 1, as seen from here."""
        return int(self.tool("pid").stdout)

    def argv(self, command: Sequence[str], *, user: str | None, cwd: str | None, unit: bool) -> list[str]:
        # env: subprocess.Popen's env= is the caller's, so the name travels on the command line.
        line = ["env", f"NANOCLAW_MACHINE={self.name}", str(TOOL), "exec", "-u", user or self.user]
        if cwd is not None:
            line += ["-C", cwd]
        if unit:
            line.append("--unit")
        return [*line, "--", *command]

    def _read_journal(self, options: Sequence[str]) -> str:
        script = 'journalctl --sync && exec journalctl --quiet --no-pager "$@"'
        return self.run("bash", "-c", script, "journal", *options, user="root").stdout


class LocalMachine(Machine):
    """The session of the person who runs the tests: not root, with a user manager; never pristine."""

    def __init__(self) -> None:
        super().__init__()
        self.home = str(Path.home())
        self.project = str(ROOT)
        self.user = Path.home().owner()
        last = self._read_journal(["--output=json", "--lines=1"])
        if last:  # what was before the tests is none of their business
            self._cursor = json.loads(last)["__CURSOR"]

    @staticmethod
    def is_possible() -> bool:
        """Say whether this is such a session."""
        if os.geteuid() == 0 or "XDG_RUNTIME_DIR" not in os.environ:
            return False
        asked = subprocess.run(
            ["systemctl", "--user", "is-system-running"], capture_output=True, check=False
        )
        return asked.stdout.strip() in (b"running", b"degraded")

    def argv(self, command: Sequence[str], *, user: str | None, cwd: str | None, unit: bool) -> list[str]:
        if user not in (None, self.user):
            raise MachineError(f"this machine runs commands as {self.user} only, not as {user}")
        line = ["env", "-C", cwd or self.home]
        if unit:
            line += ["systemd-run", "--user", "--quiet", "--collect", "--wait", "--pipe", "--same-dir", "--"]
        return [*line, *command]

    def _read_journal(self, options: Sequence[str]) -> str:
        return self.run("journalctl", "--user", "--boot", "--quiet", "--no-pager", *options).stdout
