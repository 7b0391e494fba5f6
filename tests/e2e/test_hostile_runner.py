"""A hostile program in the runner's place, in a real container: see tests/support/hostile_runner.py.

Each kind is tested by itself in tests/unit/router/test_hostile_runner.py; here several are at it at once,
and the memory is that of the router and of the gateway alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from tests.support.hostile_runner import __file__ as program
from tests.support.machine import Machine
from tests.support.product import Product

SERVICES = ("nanoclaw.service", "nanoclaw-gateway.service")
#: Some MiB for each of those that are at it at once: a message, what was made of it, half ones that wait.
GROWTH_KB = 24 << 10
CUT_OFF = (
    "forged_turns",
    "wrong_types",
    "malformed",
    "endless_line",
    "many_items",
    "no_hello",
    "descriptors",
)
HELD = (
    "heartbeats",
    "activity",
    "messages",
    "large_calls",
    "works",
    "connections",
    "half_messages",
    "silent",
)
BROKEN = "Your message could not be answered: its runner broke the protocol too often"


def add_hostile(product: Product, machine: Machine, kinds: Iterable[str]) -> dict[str, str]:
    """Add an agent for each kind and return their names."""
    names = {}
    with open(program) as file:
        script = file.read()
    for number, kind in enumerate(kinds):
        names[kind] = product.add(f"h{number}")
        shown = product.ask("agent", "show", names[kind])
        machine.write(f"{shown['workspace']}/hostile.py", script)
        drop_in = f"[Container]\nEntrypoint=/usr/bin/python3\nExec=-I /workspace/hostile.py {kind}\n"
        product.write(f"{shown['dropInDirectory']}/50-local.conf", drop_in)
    machine.systemctl("daemon-reload")
    return names


class Watch:
    """The router and the gateway while they are attacked."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._pids = self._find()
        for pid in self._pids:
            machine.sh(f"echo 5 > /proc/{pid}/clear_refs", user="root")  # man 5 proc: the peak begins anew
        self._before = [self._read(pid, "VmRSS") for pid in self._pids]

    def check(self) -> list[int]:
        """Fail if one of them ended or grew; return by how much, in kB."""
        assert self._find() == self._pids
        grown = [self._read(pid, "VmHWM") - kb for pid, kb in zip(self._pids, self._before, strict=True)]
        assert max(grown) <= GROWTH_KB
        return grown

    def _find(self) -> list[str]:
        return [self._machine.unit(unit, "MainPID")["MainPID"] for unit in SERVICES]

    def _read(self, pid: str, field: str) -> int:
        found = re.search(rf"^{field}:\s+(\d+) kB$", self._machine.read(f"/proc/{pid}/status"), re.MULTILINE)
        assert found is not None
        return int(found[1])


def seen(machine: Machine, product: Product, agent: str) -> dict[str, Any]:
    """Wait for what the program printed, and return it."""
    unit = product.session(agent)["unit"]

    def printed() -> list[str]:
        messages = (str(entry.get("MESSAGE")) for entry in machine.journal(unit))
        return [message for message in messages if message.startswith('{"kind"')]

    found: dict[str, Any] = json.loads(machine.wait_for(printed, within_s=60, what=f"words of {unit}")[0])
    return found


def test_offenders_are_named_and_cut_off_and_others_are_served(product: Product, machine: Machine) -> None:
    product.write(f"{product.home}/.config/nanoclaw/nanoclaw.toml", "attempts = 2\n")
    product.ctl("reload")
    other = product.add("other")
    agents = add_hostile(product, machine, CUT_OFF)
    product.send(other, "warm up")
    watch = Watch(machine)

    machine.expect_journal(
        "<[34]> (malformed-call|protocol-broken|message-failed|message-dead|calls-too-fast):"
    )
    machine.expect_journal("nanoclaw-.*@terminal_[0-9]+.service.* <[34]> ")
    sending = {kind: product.send_later(agent, "hello") for kind, agent in agents.items()}
    polite = 0
    while any(process.poll() is None for process in sending.values()):
        assert product.send(other, f"message {polite}") == f"message {polite}"
        polite += 1
    answers = {kind: process.communicate()[0] for kind, process in sending.items()}

    print(f"{polite} polite messages; grown by {watch.check()} kB")
    assert {kind: text[: len(BROKEN)] for kind, text in answers.items()} == dict.fromkeys(CUT_OFF, BROKEN)
    named = {kind: len(product.events("protocol-broken", agent=agent)) for kind, agent in agents.items()}
    assert named == dict.fromkeys(CUT_OFF, 2)
    assert polite > 3


def test_floods_and_what_is_held_open_harm_nobody(product: Product, machine: Machine) -> None:
    other = product.add("other")
    agents = add_hostile(product, machine, [*HELD, "no_reading"])
    product.send(other, "warm up")
    watch = Watch(machine)

    machine.expect_journal(
        "<[34]> (calls-too-fast|reader-too-slow|message-failed|message-dead|lease-expired):"
    )
    machine.expect_journal("nanoclaw-.*@terminal_[0-9]+.service.* <[34]> ")
    for agent in agents.values():
        product.ctl("send", agent, "hello")
    for number in range(20):
        assert product.send(other, f"message {number}") == f"message {number}"
    product.wait_event("reader-too-slow", within_s=60)  # after 30 s
    said = {kind: seen(machine, product, agents[kind]) for kind in HELD}

    print(f"grown by {watch.check()} kB; {said}")
    assert said["messages"]["answers"] == {"Refused": 212, "ok": 399}
    assert said["works"]["same"]
    for kind, one in said.items():
        assert one.get("calls", 0) < 3000, kind


def test_nobody_opens_what_an_agent_leaves_in_its_directories(product: Product, machine: Machine) -> None:
    agent = add_hostile(product, machine, ["bad_files"])["bad_files"]
    before = machine.sh("sha256sum /etc/passwd")

    assert product.send(agent, "hello") == "done"
    machine.expect_journal("nanoclaw-.*@terminal_[0-9]+.service.* <[34]> ")
    workspace = product.ask("agent", "show", agent)["workspace"]
    assert machine.sh(f"stat -c %F {workspace}/fifo {workspace}/link") == "fifo\nsymbolic link"
    for command in (["status"], ["session", "list"], ["agent", "restart", agent], ["doctor"]):
        product.ctl(*command, check=command != ["doctor"], timeout_s=60)
    machine.systemctl("restart", "nanoclaw.service")
    assert product.send(agent, "again") == "done"
    product.ctl("agent", "remove", agent, "--yes", "--purge", timeout_s=60)
    product.forget(agent)

    assert not machine.exists(workspace)
    assert machine.sh("sha256sum /etc/passwd") == before


def test_noise_of_an_agent_looks_like_nobody_elses_and_hides_nothing(
    product: Product, machine: Machine
) -> None:
    """Its lines are of a priority of their own, for each of which journald has another bound."""
    agent = add_hostile(product, machine, ["noise"])["noise"]

    machine.expect_journal("<[34]> (protocol-broken|message-failed|message-dead):")
    product.ctl("send", agent, "hello")
    product.wait_event("protocol-broken", agent=agent)

    unit = product.session(agent)["unit"]
    noise = [entry for entry in machine.journal(unit) if "<3>" in str(entry["MESSAGE"])]
    assert {(entry["PRIORITY"], entry["MESSAGE"]) for entry in noise} == {("7", "<3>noise")}
    assert len(noise) >= 10_000
