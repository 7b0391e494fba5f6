"""Idle exit of the installed product: it ends, comes back with the next call, and loses none."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.support.machine import Machine
from tests.support.product import CHANNEL, CONTROL, Product

#: Calls one after the other, some after the time in which the router leaves; prints what became of them.
CALLS = r"""
import json, random, socket, sys, time
count, idle_s, paths = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
chance = random.Random(1)
answered, slowest_s = 0, 0.0
for number in range(count):
    began = time.monotonic()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30)
        sock.connect(paths[number % len(paths)])
        sock.sendall(b'{"method": "org.varlink.service.GetInfo"}\0')
        data = b""
        while not data.endswith(b"\0"):
            part = sock.recv(65536)
            if not part:
                break
            data += part
        answered += b'"nanoclaw"' in data
    slowest_s = max(slowest_s, time.monotonic() - began)
    if chance.random() < 0.05:
        time.sleep(idle_s + chance.uniform(-0.003, 0.02))
print(json.dumps({"answered": answered, "slowest_s": slowest_s}))
"""


@pytest.fixture
def idle(product: Product, machine: Machine) -> Iterator[Product]:
    """A router that leaves after a second."""
    settings = f"{product.home}/.config/nanoclaw/nanoclaw.toml"
    before = machine.run("cat", settings, check=False)
    machine.write(settings, f"idle_exit = 1\n{before.stdout}")
    # Not reloaded: a client that an earlier test left must not keep it busy.
    machine.systemctl("restart", "nanoclaw.service")
    yield product
    if before.returncode == 0:
        machine.write(settings, before.stdout)
    else:
        machine.run("rm", settings)
    machine.systemctl("restart", "nanoclaw.service")


def is_away(product: Product) -> bool:
    return product.state("nanoclaw.service") == "inactive"


def test_router_leaves_and_comes_back_with_the_next_call(idle: Product, machine: Machine) -> None:
    agent = idle.add("", "--idle-seconds", "0")
    assert idle.send(agent, "hello") == "hello"
    machine.wait_for(lambda: is_away(idle), within_s=30)

    shown = machine.unit("nanoclaw.service", "Result", "ExecMainStatus", "SubState")
    assert shown == {"Result": "success", "ExecMainStatus": "0", "SubState": "dead"}
    assert machine.sh("systemctl --user --failed --no-legend --plain") == ""
    assert idle.send(agent, "hello again") == "hello again"
    assert idle.status()["queue"]["answered"] >= 2


def test_router_stays_while_there_is_something_to_do(idle: Product, machine: Machine) -> None:
    agent, stopped = idle.add("a", "--idle-seconds", "0"), idle.add("b")
    idle.ctl("agent", "stop", stopped)
    idle.ctl("send", stopped, "for later")
    pid = machine.unit("nanoclaw.service", "MainPID")["MainPID"]

    assert idle.send(agent, "/sleep 3\nslept") == "slept"

    assert machine.unit("nanoclaw.service", "MainPID")["MainPID"] == pid
    idle.ctl("agent", "start", stopped)
    idle.wait_event("message-answered", agent=stopped)


def test_no_call_is_lost_while_the_router_leaves_and_comes(idle: Product, machine: Machine) -> None:
    count = 300
    began = len(idle.events("started"))

    done = machine.run("python3", "-c", CALLS, str(count), "1", CONTROL, CHANNEL, timeout_s=900)

    found = json.loads(done.stdout)
    starts = len(idle.events("started")) - began
    print(f"{found['answered']} of {count} calls answered over {starts} starts, {found['slowest_s']:.2f} s")
    assert found["answered"] == count
    assert starts >= 8
    assert machine.sh("systemctl --user --failed --no-legend --plain") == ""
