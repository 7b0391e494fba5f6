"""The kill switch of the installed product: all agents gone at once, none comes back, no message is lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from tests.support.machine import Machine, NestedMachine
from tests.support.product import Product, unique_prefix, wait_reply

SLICE = "nanoclaw-agents.slice"
GONE_S = 2.0  #: until no process of any agent is left
TURN_S = 5  #: longer than it takes to stop it

#: A runner that does all it can to stay: takes a message, ignores signals, keeps both processors busy.
STUBBORN = r"""
import os, signal, socket, threading
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)

def calls(*messages):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect("/run/nanoclaw/host.sock")
    for message in messages:
        sock.sendall(message.encode() + b"\0")
    return sock

work = calls('{"method": "io.nanoclaw.Agent.Hello", "parameters": {"protocol": 1, "version": "stubborn"}}',
             '{"method": "io.nanoclaw.Agent.Work", "more": true}')
ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
ready.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
while b'"turn"' not in work.recv(1 << 16):
    pass
busy = True
for number in range(7):
    if os.fork() == 0:
        busy = number == 0
        break
while True:
    if not busy:
        signal.pause()
"""
#: Stops the slice and prints what happened to the processes of its cgroup.
STOP = r"""
import json, pathlib, subprocess, sys, time
show = ["systemctl", "--user", "show", "--value", "--property=ControlGroup", "nanoclaw-agents.slice"]
group = subprocess.run(show, stdout=-1, text=True).stdout.strip()
def processes():
    found = pathlib.Path(f"/sys/fs/cgroup{group}").glob("**/libpod-payload-*/cgroup.procs")
    return [pid for file in found for pid in file.read_text().split()]
before = len(processes())
began = time.monotonic()
stopping = subprocess.Popen(sys.argv[1:])
while processes() and time.monotonic() < began + 30:
    time.sleep(0.01)
gone_s = time.monotonic() - began
print(json.dumps({"before": before, "gone_s": gone_s, "status": stopping.wait(60)}))
"""


@pytest.fixture
def product(product: Product) -> Iterator[Product]:
    """Whatever becomes of a test, agents may run after it."""
    yield product
    product.machine.systemctl("start", SLICE)


def add_stubborn(product: Product) -> str:
    """Add an agent whose runner is STUBBORN."""
    agent = product.add("stubborn")
    shown = product.ask("agent", "show", agent)
    product.write(f"{shown['workspace']}/stubborn.py", STUBBORN, mode="0644")
    entrypoint = '[Container]\nEntrypoint=["python3", "/workspace/stubborn.py"]\n'
    product.write(f"{shown['dropInDirectory']}/50-local.conf", entrypoint)
    product.machine.systemctl("daemon-reload")
    return agent


def stop_all(machine: Machine, *command: str) -> None:
    """Have `command` stop all agents; fails if that takes too long."""
    done = machine.run("python3", "-c", STOP, *command, timeout_s=120)
    stopped = json.loads(done.stdout)

    assert stopped["status"] == 0
    assert stopped["before"] >= 10, "the agents were not there"
    assert stopped["gone_s"] < GONE_S
    assert containers(machine) == ""


def containers(machine: Machine) -> str:
    return machine.sh(
        "podman ps --quiet; systemctl --user list-units --no-legend --plain 'nanoclaw-*@*.service'"
    )


def waiting(product: Product) -> int:
    return int(product.status()["queue"]["queued"])


def attempts(product: Product, *agents: str) -> list[int]:
    """Return how many attempts the last message of each agent has had."""
    last = {m["agent"]: m["attempts"] for m in product.ask("message", "list")["messages"]}
    return [last[agent] for agent in agents]


def router_pid(machine: Machine) -> str:
    return machine.unit("nanoclaw.service", "MainPID")["MainPID"]


def stop_with_running_router(product: Product, stop: Callable[[], None]) -> None:
    stop()


def stop_with_stopped_router(product: Product, stop: Callable[[], None]) -> None:
    product.machine.systemctl("stop", "nanoclaw.socket", "nanoclaw-channel.socket", "nanoclaw.service")
    stop()
    product.machine.systemctl("start", "nanoclaw.socket", "nanoclaw-channel.socket", "nanoclaw.service")


def stop_with_frozen_router(product: Product, stop: Callable[[], None]) -> None:
    pid = router_pid(product.machine)
    product.machine.run("kill", "-STOP", pid)
    try:
        stop()
    finally:
        product.machine.run("kill", "-CONT", pid)
    assert router_pid(product.machine) == pid


CTL = f"{NestedMachine.home}/.local/bin/nanoclawctl"
BY_CTL = ((CTL, "stop", "--all"), (CTL, "start", "--all"))
BY_SYSTEMCTL = (("systemctl", "--user", "stop", SLICE), ("systemctl", "--user", "start", SLICE))


@pytest.mark.parametrize(
    ("router", "by"),
    [
        pytest.param(stop_with_running_router, BY_CTL, id="nanoclawctl"),
        pytest.param(stop_with_running_router, BY_SYSTEMCTL, id="systemctl"),
        pytest.param(stop_with_stopped_router, BY_SYSTEMCTL, id="systemctl, router stopped"),
        pytest.param(stop_with_frozen_router, BY_SYSTEMCTL, id="systemctl, router frozen"),
    ],
)
def test_all_agents_go_and_their_messages_wait(
    product: Product,
    machine: Machine,
    router: Callable[[Product, Callable[[], None]], None],
    by: tuple[tuple[str, ...], tuple[str, ...]],
) -> None:
    stop, start = by
    idle, working, hung = product.add("idle"), product.add("working"), product.add("hung")
    stubborn = add_stubborn(product)
    for agent in (idle, working, hung):
        product.send(agent, "hello")
    product.ctl("send", stubborn, "hello")
    product.wait_state(stubborn, "working")
    sent = [product.send_later(hung, f"/sleep {TURN_S}\nwoke up")]
    product.wait_state(hung, "working")
    machine.run("kill", "-STOP", str(product.runner_pid(hung)), user="root")
    sent.append(product.send_later(working, f"/sleep {TURN_S}\nworked"))
    product.wait_state(working, "working")

    router(product, lambda: stop_all(machine, *stop))

    product.wait_event("agents-held")
    sent.append(product.send_later(idle, "later"))
    machine.wait_for(lambda: waiting(product) == 4)
    machine.systemctl("restart", "nanoclaw.service")
    assert attempts(product, idle, working, hung, stubborn) == [0, 0, 0, 0]
    assert containers(machine) == ""
    assert machine.unit(SLICE, "ActiveState") == {"ActiveState": "inactive"}

    machine.run("rm", f"{product.ask('agent', 'show', stubborn)['dropInDirectory']}/50-local.conf")
    machine.systemctl("daemon-reload")
    machine.run(*start)

    assert [wait_reply(sending) for sending in sent] == ["woke up", "worked", "later"]
    machine.wait_for(lambda: waiting(product) == 0)
    assert attempts(product, idle, working, hung, stubborn) == [1, 1, 1, 1]


def test_the_chat_is_told_why_nothing_comes(product: Product, machine: Machine) -> None:
    agent = product.add()
    machine.systemctl("stop", SLICE)
    try:
        product.wait_event("agents-held")
        sending = product.send_later(agent, "hello")
        machine.wait_for(lambda: waiting(product) == 1)
    finally:
        machine.systemctl("start", SLICE)

    stdout, stderr = sending.communicate(timeout=60)
    assert (stdout, sending.returncode) == ("hello\n", 0), stderr
    assert "all agents are stopped; 'nanoclawctl start --all' lets them go on" in stderr


def test_end_of_the_user_manager_holds_nobody_and_keeps_a_hold(fresh_machine: NestedMachine) -> None:
    machine = fresh_machine
    machine.run("./install.sh", "--yes", "--no-demo", "--no-image", cwd=machine.project, timeout_s=600)
    product = Product(machine, unique_prefix())
    agent = product.add()
    # The bus may end before the router, and so may the gateway.
    machine.expect_journal(r"kill-switch: systemd does not answer|gateway-away")

    def log_out_and_in() -> None:
        machine.run("systemctl", "stop", "user@1000.service", "user-runtime-dir@1000.service", user="root")
        machine.run("systemctl", "start", "user@1000.service", user="root")
        machine.wait_for(lambda: product.state("nanoclaw.service") == "active", within_s=30)

    product.send(agent, "hello")
    log_out_and_in()
    assert product.send(agent, "hello again") == "hello again"
    machine.systemctl("stop", SLICE)
    product.wait_event("agents-held")
    product.ctl("send", agent, "for later")
    log_out_and_in()
    assert waiting(product) == 1 and containers(machine) == ""
    machine.systemctl("start", SLICE)
    machine.wait_for(lambda: waiting(product) == 0)
    product.close()
