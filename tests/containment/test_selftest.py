"""nanoclawctl selftest: an agent does not get out, and where it could, that is noticed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support.machine import Machine
from tests.support.product import Product

CTL = "/home/claw/.local/bin/nanoclawctl"
RUN_S = 120
#: A way out of the machine, a name server and ping, so that attempts at them tell something.
NETWORK = """
ip address add 198.51.100.7/24 dev lo; ip route add default dev lo src 198.51.100.7
ip -6 address add 2001:db8::7/64 dev lo
echo 0 2147483647 > /proc/sys/net/ipv4/ping_group_range
cp /etc/resolv.conf /etc/resolv.conf.saved 2> /dev/null || true
echo nameserver 127.0.0.1 > /etc/resolv.conf
"""
NO_NETWORK = """
ip address del 198.51.100.7/24 dev lo; ip -6 address del 2001:db8::7/64 dev lo; ip route del default || true
echo 1 0 > /proc/sys/net/ipv4/ping_group_range
mv /etc/resolv.conf.saved /etc/resolv.conf 2> /dev/null || rm /etc/resolv.conf
"""
NAME_SERVER = """
import socket, sys, threading
def answer():
    while True:
        question, who = sock.recvfrom(512)
        sock.sendto(question, who)
sock = socket.socket(type=socket.SOCK_DGRAM)
sock.bind(("127.0.0.1", 53))
threading.Thread(target=answer, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""
#: What a machine of a test may lack: parts of the kernel, and the controllers that bound memory.
MAY_LACK = {"alg", "kexec", "module", "sysrq", "memory-flood", "internet6"}

#: A person's drop-in that takes a protection away, and what must be noticed at least.
BROKEN = {
    "capabilities": (
        "AddCapability=CAP_NET_RAW CAP_SETUID CAP_DAC_OVERRIDE",
        {"capabilities", "raw-ip", "root", "private", "secret-files"},
    ),
    "seccomp": (
        "PodmanArgs=--security-opt=seccomp=unconfined",
        {"user-namespace", "clone-namespace", "clone3-namespace", "io_uring", "keyring", "userfaultfd"},
    ),
    "network": ("Network=\nNetwork=host", {"tcp", "udp", "abstract"}),
    "processes": ("PodmanArgs=--pid=host --ipc=host", {"processes", "other-processes", "shared-memory"}),
    "identity": ("User=1000", {"identity", "private"}),
    "new-privileges": ("NoNewPrivileges=false", {"setuid-program"}),
}


@pytest.fixture(autouse=True)
def expected(machine: Machine) -> None:
    machine.expect_journal(
        "nanoclaw(-gateway)?.service <[34]> (malformed-call|message-dead|runner-|protocol)"
    )
    machine.expect_journal("nanoclaw-selftest(_other)?@.*.service <[34]> ")


@contextmanager
def networked(machine: Machine) -> Iterator[None]:
    machine.sh(NETWORK, user="root")
    try:
        pipe = subprocess.PIPE
        with machine.popen("python3", "-c", NAME_SERVER, user="root", stdin=pipe, stdout=pipe) as server:
            assert server.stdin is not None and server.stdout is not None
            with server.stdin:
                assert server.stdout.readline() == "ready\n"
                yield
    finally:
        machine.sh(NO_NETWORK, user="root")


def selftest(machine: Machine, *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Run it as a person who may read the journal; return its exit status and its rows by name."""
    done = machine.run(
        *("setpriv", "--reuid=claw", "--regid=claw", "--groups=systemd-journal", "env", "HOME=/home/claw"),
        *("XDG_RUNTIME_DIR=/run/user/1000", "USER=claw", CTL, "selftest", *arguments, "--json"),
        user="root",
        cwd=machine.home,
        check=False,
        timeout_s=RUN_S,
    )
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    rows = {row["name"]: row for row in found["probes"]}
    results = [row["result"] for row in rows.values()]
    assert (found["held"], found["untried"]) == (results.count("held"), results.count("untried"))
    assert found["tried"] == len(rows) - found["untried"]
    return done.returncode, rows


def through(rows: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name, row in rows.items() if row["result"] == "through"}


def leftovers(machine: Machine) -> str:
    """Return what is there of a selftest."""
    return machine.sh(
        f"for noun in agent deadletter; do {CTL} $noun list --json | grep -o selftest || true; done; "
        "podman ps --all --format '{{.Names}}' | grep selftest || true; cd; "
        "find .config .local/state/nanoclaw /run/user/1000/nanoclaw -name '*selftest*' ! -name selftest.lock"
    )


def test_nothing_gets_out_and_nothing_stays(machine: Machine, product: Product) -> None:
    with networked(machine):
        code, rows = selftest(machine)

    print(json.dumps(rows, indent=1))
    assert (code, through(rows)) == (0, set())
    untried = {name: row["detail"] for name, row in rows.items() if row["result"] == "untried"}
    assert untried.keys() <= MAY_LACK, untried
    assert all(untried.values())
    assert len(rows) - len(untried) >= 120
    layers = {row["by"] for row in rows.values() if row["result"] == "held"}
    assert layers == {
        *("namespace", "mount", "seccomp", "capability", "uid", "kernel", "limit"),
        *("gateway", "router", "systemd"),
    }
    assert leftovers(machine) == ""


@pytest.mark.parametrize("name", BROKEN)
def test_a_protection_that_is_gone_is_noticed(machine: Machine, product: Product, name: str) -> None:
    line, wanted = BROKEN[name]
    # For all agents: its name is the beginning of all of theirs.
    product.write(
        f"{machine.home}/.config/containers/systemd/nanoclaw-.container.d/50-broken.conf",
        f"[Container]\n{line}\n",
    )

    code, rows = selftest(machine)

    assert code == 1
    assert wanted <= through(rows)


def test_an_agent_with_a_drop_in_of_its_own_is_tried_as_it_is(machine: Machine, product: Product) -> None:
    agent = product.add("", "--tasks-max", "99")
    directory = product.ask("agent", "show", agent)["dropInDirectory"]
    product.write(f"{directory}/50-local.conf", "[Container]\nAddCapability=CAP_SYS_PTRACE\n")
    machine.systemctl("daemon-reload")

    code, rows = selftest(machine, agent)
    others = selftest(machine)[1]

    assert code == 1 and "capabilities" in through(rows)
    assert re.fullmatch(r"EAGAIN at \d\d", rows["fork-flood"]["detail"]), rows["fork-flood"]
    assert through(others) == set()
    assert leftovers(machine) == ""
    machine.run("rm", "-r", directory)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_stays_when_it_is_interrupted(machine: Machine, product: Product, number: int) -> None:
    interrupt(machine, number)

    assert leftovers(machine) == ""


def test_what_a_killed_one_left_is_removed_by_the_next(machine: Machine, product: Product) -> None:
    interrupt(machine, signal.SIGKILL)
    assert "selftest" in leftovers(machine)

    code, rows = selftest(machine)

    assert (code, through(rows)) == (0, set())
    assert leftovers(machine) == ""


def interrupt(machine: Machine, number: int) -> None:
    """Start one, and send it a signal once the agent runs."""
    with machine.popen("bash", "-c", f"echo $$; exec {CTL} selftest", stdout=-1, stderr=-2) as running:
        assert running.stdout is not None
        pid = running.stdout.readline().strip()
        machine.wait_for(
            lambda: "nanoclaw-selftest-" in machine.sh("podman ps --format '{{.Names}}'"), within_s=60
        )
        machine.run("kill", f"-{number:d}", pid)
        running.communicate(timeout=RUN_S)


def test_an_agent_of_the_person_is_never_taken_for_it(machine: Machine, product: Product) -> None:
    product.ctl("agent", "add", "selftest", "--provider", "anthropic")

    done = product.ctl("selftest", check=False, timeout_s=RUN_S)

    assert done.returncode == 5 and "an agent of yours named 'selftest'" in done.stderr
    assert product.ask("agent", "show", "selftest")["configuration"]["provider"] == "anthropic"
    product.ctl("agent", "remove", "selftest", "--yes", "--purge")
