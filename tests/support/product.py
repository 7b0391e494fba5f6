"""Product: the installed NanoClaw on a machine, driven as a person drives it."""

from __future__ import annotations

import json
import subprocess
import time
from typing import Any

from tests.support.machine import Entry, Machine, MachineError

REPLY_S = 60.0  #: an agent's reply on a busy machine, a container's start included
SETTLE_S = 30.0  #: a unit that starts or stops
RUNTIME = "/run/user/1000/nanoclaw"
CONTROL = f"{RUNTIME}/control/io.nanoclaw.Control"
CHANNEL = f"{RUNTIME}/channel/io.nanoclaw.Channel"
GATEWAY = f"{RUNTIME}/gateway/io.nanoclaw.Gateway"

Json = dict[str, Any]
#: Parameters of Announce(), of an adapter that can do nothing.
ANNOUNCEMENT: Json = {
    "protocol": 1,
    "adapter": "test",
    "capabilities": {
        **dict.fromkeys(("threads", "edits", "reactions", "redactions", "files", "typing"), False),
        "textBytes": 0,
        "fileBytes": 0,
        "markup": "plain",
    },
    "accounts": [],
}


class Product:
    """One test's view: the agents that it adds are removed by close()."""

    def __init__(self, machine: Machine, prefix: str) -> None:
        self.machine = machine
        self.home = machine.home
        self._prefix = prefix  # of this test's agents
        self._added: list[str] = []
        self._files: list[str] = []

    def close(self) -> None:
        """Remove agents and files of this test, and let the services run."""
        for name in self._added:
            self.ctl("agent", "remove", name, "--yes", "--purge", check=False)
        if self._files:
            self.machine.run("rm", "-rf", "--", *self._files)
            self.machine.systemctl("daemon-reload")
            self.machine.systemctl("reload-or-restart", "nanoclaw.service")
        if self.state("nanoclaw.service") != "active":
            self.machine.systemctl("start", "nanoclaw.service")

    # What a person does

    def ctl(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run nanoclawctl, with options of Machine.run()."""
        return self.machine.run(f"{self.home}/.local/bin/nanoclawctl", *arguments, **options)

    def ask(self, *arguments: str, **options: Any) -> Json:
        """Run nanoclawctl with --json and return its document."""
        document: Json = json.loads(self.ctl(*arguments, "--json", **options).stdout)
        return document

    def add(self, suffix: str = "", *options: str, provider: str = "echo") -> str:
        """Add an agent, with options of `nanoclawctl agent add`; returns its name."""
        name = f"{self._prefix}{suffix}"
        self._added.append(name)
        self.ctl("agent", "add", name, "--provider", provider, *options)
        return name

    def add_channel(self, name: str, kind: str = "none") -> None:
        """Have the router listen for a channel, without an adapter unless there is one of that kind."""
        if kind == "none":
            self.machine.expect_journal("<3> channel-broken: .* there is no adapter of the kind 'none'")
        self.write(f"{self.home}/.config/nanoclaw/channels/{name}.toml", f'kind = "{kind}"\n')
        self.machine.systemctl("reload", "nanoclaw")

    def forget(self, agent: str) -> None:
        """The test has removed this agent itself."""
        self._added.remove(agent)

    def send(self, agent: str, text: str, *options: str, **more: Any) -> str:
        """Send a message and return what `nanoclawctl send --wait` prints, without the last newline."""
        more.setdefault("timeout_s", REPLY_S + 10)
        line = ("send", agent, "--wait", "--timeout", str(int(REPLY_S)), *options)
        return self.ctl(*line, input=text, **more).stdout.removesuffix("\n")

    def send_later(self, agent: str, text: str, *options: str) -> subprocess.Popen[str]:
        """Begin to send a message; wait_reply() returns what comes."""
        line = ("send", agent, text, "--wait", "--timeout", str(int(REPLY_S)), *options)
        return self.machine.popen(
            f"{self.home}/.local/bin/nanoclawctl",
            *line,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def write(self, path: str, text: str, **options: Any) -> None:
        """Write a file below the home directory that close() removes."""
        if path not in self._files:
            self._files.append(path)
        self.machine.write(path, text, **options)

    # What is there

    def state(self, unit: str) -> str:
        """Return ActiveState= of a user unit."""
        return self.machine.unit(unit, "ActiveState")["ActiveState"]

    def status(self) -> Json:
        return self.ask("status")

    def sessions(self, agent: str) -> list[Json]:
        sessions: list[Json] = self.ask("session", "list", agent)["sessions"]
        return sessions

    def session(self, agent: str, chat: str | None = None) -> Json:
        """Return the session of a chat (default: the agent's own)."""
        (found,) = (s for s in self.sessions(agent) if s["chat"] == (chat or agent))
        return found

    def container(self, agent: str) -> str:
        """Return the name of the container of the agent's own chat."""
        return f"nanoclaw-{agent}-{self.session(agent)['session']}"

    def runner_pid(self, agent: str) -> int:
        """Return the pid of the container's first process, as the machine sees it."""
        shown = self.machine.run("podman", "inspect", "--format", "{{.State.Pid}}", self.container(agent))
        return int(shown.stdout)

    def inside(self, agent: str, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command in the agent's running container."""
        return self.machine.run("podman", "exec", "-i", self.container(agent), *command, **options)

    def python_inside(self, agent: str, script: str, *arguments: str, **options: Any) -> Any:
        """Run a Python script in the agent's container and return what it prints, which is JSON."""
        shown = self.inside(agent, "python3", "-c", script, *arguments, **options)
        return json.loads(shown.stdout)

    def events(self, name: str | None = None, **fields: str) -> list[Entry]:
        """Return our journal entries of this test with that event and these fields (agent="…")."""
        wanted = {f"NANOCLAWD_{key.upper()}": value for key, value in fields.items()}
        if name is not None:
            wanted["NANOCLAWD_EVENT"] = name
        return [
            entry
            for entry in self.machine.journal()
            if "NANOCLAWD_EVENT" in entry and all(entry.get(key) == value for key, value in wanted.items())
        ]

    def wait_event(self, name: str, *, within_s: float = SETTLE_S, **fields: str) -> Entry:
        """Wait for a journal entry and return the first."""
        return self.machine.wait_for(
            lambda: self.events(name, **fields), within_s=within_s, what=f"event {name}"
        )[0]

    def wait_state(self, agent: str, state: str, *, within_s: float = SETTLE_S) -> None:
        """Wait until the session of the agent's own chat has that state."""
        self.machine.wait_for(
            lambda: any(s["chat"] == agent and s["state"] == state for s in self.sessions(agent)),
            within_s=within_s,
            what=f"{agent} is {state}",
        )


def wait_reply(sending: subprocess.Popen[str], *, within_s: float = REPLY_S) -> str:
    """Return what send_later() printed, without the last newline. Raises MachineError if it failed."""
    try:
        stdout, stderr = sending.communicate(timeout=within_s)
    except subprocess.TimeoutExpired as exc:
        sending.kill()
        stdout, stderr = sending.communicate()
        raise MachineError(f"no reply within {within_s} s\n{stdout}\n{stderr}") from exc
    if sending.returncode != 0:
        raise MachineError(f"exit status {sending.returncode}\n{stdout}\n{stderr}")
    return stdout.removesuffix("\n")


def unique_prefix() -> str:
    """Return the beginning of agent names that no other test has used: a workspace may outlive its agent."""
    return f"t{time.monotonic_ns() // 1000 % 10**9}"
