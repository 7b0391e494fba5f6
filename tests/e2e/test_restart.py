"""Whatever ends and comes back: nothing is lost, nothing is said twice, nothing ends in silence."""

from __future__ import annotations

import json
import re

import pytest

from tests.support.machine import Machine, MachineError
from tests.support.product import CHANNEL, Product, wait_reply

TURN_S = 3  #: how long a turn takes in whose middle something ends, also on a busy machine
KILLED = r"code=killed, status=9/KILL|Failed with result 'signal'|code=exited, status=137|result 'exit-code'"


def message_of(product: Product, agent: str) -> str:
    """Return the id of the last message to the agent."""
    return str(product.events("message-queued", agent=agent)[-1]["NANOCLAWD_MESSAGE"])


def assert_answered_once(product: Product, agent: str, *, attempt: int) -> None:
    message = message_of(product, agent)
    answered = [entry["NANOCLAWD_ATTEMPT"] for entry in product.events("message-answered", message=message)]
    assert answered == [str(attempt)]
    sent = [entry["NANOCLAWD_KEY"] for entry in product.events("delivery-sent", message=message)]
    assert len(sent) == len(set(sent)), sent


# --- the router ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["restart", "stop and start", "kill -9"])
def test_a_turn_does_not_notice_that_the_router_is_new(product: Product, machine: Machine, how: str) -> None:
    agent = product.add()
    product.send(agent, "hello")
    runner = product.runner_pid(agent)
    router = machine.unit("nanoclaw.service", "MainPID")["MainPID"]
    sending = product.send_later(agent, f"/sleep {TURN_S}\nslept\n/sent")
    product.wait_state(agent, "working")

    if how == "restart":
        machine.systemctl("restart", "nanoclaw")
    elif how == "stop and start":
        machine.systemctl("stop", "nanoclaw")
        machine.systemctl("start", "nanoclaw")
    else:
        machine.expect_journal(rf"nanoclaw\.service <\d> .*({KILLED})")
        machine.run("kill", "-KILL", router)

    assert wait_reply(sending) == "slept\nattempt 1, already sent: nothing"
    assert product.runner_pid(agent) == runner
    assert machine.unit("nanoclaw.service", "MainPID")["MainPID"] not in (router, "0")
    assert_answered_once(product, agent, attempt=1)
    assert product.events("session-adopted")


def test_a_held_agent_stays_held_when_the_router_is_new(product: Product, machine: Machine) -> None:
    agent = product.add()
    product.ctl("agent", "stop", agent)
    product.ctl("send", agent, "for later")

    machine.systemctl("restart", "nanoclaw")

    shown = product.ask("agent", "show", agent)["runtime"]
    assert (shown["state"], shown["queued"], shown["running"]) == ("held", 1, 0)


#: Delivers messages in order, each again until it is taken, and prints what comes for them. Connects anew
#: whenever the router goes away, as a channel adapter does.
ADAPTER = r"""
import json, socket, sys, threading, time
path, agent, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
place = {"chat": agent}
deadline = time.monotonic() + 100
got = []

def lines(sock):
    buffer = b""
    while data := sock.recv(65536):
        buffer += data
        *whole, buffer = buffer.split(b"\0")
        yield from map(json.loads, whole)
    raise ConnectionResetError

def connect(method, parameters, **flags):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(path)
    message = {"method": f"io.nanoclaw.Channel.{method}", "parameters": parameters, **flags}
    sock.sendall(json.dumps(message).encode() + b"\0")
    return sock

def call(method, parameters):
    while time.monotonic() < deadline:
        try:
            with connect(method, parameters) as sock:
                return next(lines(sock))
        except OSError:
            time.sleep(0.05)

def deliver():
    for number in range(count):
        call("Deliver", {**place, "thread": "", "event": f"e{number}", "revision": 0, "sender": "me",
                         "text": f"/sleep 0.05\n{number}", "agent": agent})

threading.Thread(target=deliver, daemon=True).start()
while len(got) < count and time.monotonic() < deadline:
    try:
        with connect("Attach", place, more=True) as sock:
            for reply in lines(sock):
                delivery = reply["parameters"].get("delivery")
                if delivery is None:
                    continue
                if delivery["key"] not in dict(got):
                    got.append((delivery["key"], delivery["text"]))
                call("ReportSent", {"key": delivery["key"], "receipt": "r"})
                if len(got) >= count:
                    break
    except OSError:
        time.sleep(0.05)
print(json.dumps([text for _, text in got]))
"""


def test_a_burst_survives_kills_of_the_router_in_order_and_once(product: Product, machine: Machine) -> None:
    agent = product.add()
    machine.expect_journal(rf"nanoclaw\.service <\d> .*({KILLED})")
    with machine.popen("python3", "-c", ADAPTER, CHANNEL, agent, "30", stdout=-1) as adapter:
        for number in (5, 15):
            machine.wait_for(
                lambda number=number: len(product.events("message-answered", agent=agent)) >= number,  # type: ignore[misc]
                within_s=60,
            )
            machine.run("kill", "-KILL", machine.unit("nanoclaw.service", "MainPID")["MainPID"])
            machine.wait_for(lambda: product.state("nanoclaw.service") == "active")
        assert adapter.stdout is not None
        got = json.loads(adapter.stdout.read())

    assert got == [str(number) for number in range(30)]
    answered = [entry["NANOCLAWD_MESSAGE"] for entry in product.events("message-answered", agent=agent)]
    assert len(answered) == len(set(answered)) == 30


# --- the container -------------------------------------------------------------------------------------


def test_a_person_may_stop_the_unit_and_the_turn_is_tried_again(product: Product, machine: Machine) -> None:
    agent = product.add()
    machine.expect_journal(r"message-failed: .*retrying")
    product.send(agent, "hello")
    unit = product.session(agent)["unit"]
    sending = product.send_later(agent, f"/sleep {TURN_S}\n/sent")
    product.wait_state(agent, "working")

    machine.systemctl("stop", unit)

    assert wait_reply(sending) == "attempt 2, already sent: nothing"
    assert_answered_once(product, agent, attempt=2)


def test_an_idle_container_leaves_and_the_next_message_brings_a_new_one(
    product: Product, machine: Machine
) -> None:
    agent = product.add("", "--idle-seconds", "3")
    product.send(agent, "hello")
    first = product.runner_pid(agent)

    product.wait_state(agent, "idle")

    assert machine.sh(f"podman ps --all --quiet --filter name={agent}") == ""
    unit = product.session(agent)["unit"]
    assert machine.unit(unit, "ActiveState", "Result") == {"ActiveState": "inactive", "Result": "success"}
    assert product.send(agent, "hello again") == "hello again"
    assert product.runner_pid(agent) != first


def test_a_unit_that_cannot_start_is_tried_again_and_then_an_honest_notice(
    product: Product, machine: Machine
) -> None:
    agent = product.add()
    directory = product.ask("agent", "show", agent)["dropInDirectory"]
    machine.expect_journal(rf"nanoclaw-{agent}@|message-(failed|dead): ")
    product.write(f"{directory}/50-local.conf", "[Container]\nImage=localhost/no-such-image:latest\n")
    machine.systemctl("daemon-reload")

    sending = product.send_later(agent, "hello")
    product.wait_event("message-failed", agent=agent)
    machine.run("rm", "-r", directory)
    machine.systemctl("daemon-reload")

    assert wait_reply(sending) == "hello"


# --- the gateway ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["restart", "kill -9"])
def test_sessions_are_attached_to_a_new_gateway(product: Product, machine: Machine, how: str) -> None:
    agent = product.add()
    product.send(agent, "hello")
    name = f"{agent}/{product.session(agent)['session']}"
    machine.expect_journal(rf"nanoclaw-gateway\.service <\d> .*({KILLED})|gateway-away: .*retrying")
    pid = machine.unit("nanoclaw-gateway.service", "MainPID")["MainPID"]

    if how == "restart":
        machine.systemctl("restart", "nanoclaw-gateway.service")
    else:
        machine.run("kill", "-KILL", pid)

    def attached() -> bool:
        gateway = product.status()["gateway"]
        return gateway is not None and name in gateway["sessions"]

    machine.wait_for(attached, within_s=30)
    assert machine.unit("nanoclaw-gateway.service", "MainPID")["MainPID"] not in (pid, "0")
    code = product.inside(
        agent,
        *("curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}"),
        *("--unix-socket", "/run/nanoclaw/gateway.sock", "http://gateway/nothing"),
    ).stdout
    assert re.fullmatch("4[0-9]{2}", code)


# --- stop, start, restart ------------------------------------------------------------------------------


def test_messages_to_a_held_agent_wait_until_it_is_started(product: Product, machine: Machine) -> None:
    agent = product.add()
    product.send(agent, "hello")

    product.ctl("agent", "stop", agent)
    first = product.send_later(agent, "first")
    machine.wait_for(lambda: product.ask("agent", "show", agent)["runtime"]["queued"] == 1)
    second = product.send_later(agent, "second")
    machine.wait_for(lambda: product.ask("agent", "show", agent)["runtime"]["queued"] == 2)

    assert product.ask("agent", "show", agent)["runtime"]["state"] == "held"
    assert machine.sh(f"podman ps --all --quiet --filter name={agent}") == ""
    product.ctl("agent", "start", agent)
    assert (wait_reply(first), wait_reply(second)) == ("first", "second")


def test_stop_and_start_give_a_running_turn_back(product: Product, machine: Machine) -> None:
    agent = product.add()
    sending = product.send_later(agent, f"/sleep {TURN_S}\n/sent")
    product.wait_state(agent, "working")

    product.ctl("agent", "stop", agent)
    product.ctl("agent", "start", agent)

    # What the person stopped is no failed attempt.
    assert wait_reply(sending) == "attempt 1, already sent: nothing"
    assert_answered_once(product, agent, attempt=1)


def test_restart_takes_the_new_configuration_and_gives_a_running_turn_back(
    product: Product, machine: Machine
) -> None:
    agent = product.add()
    product.send(agent, "hello")
    first = product.runner_pid(agent)
    product.ctl("agent", "set", agent, "--tasks-max", "44")
    sending = product.send_later(agent, f"/sleep {TURN_S}\n/sent")
    product.wait_state(agent, "working")

    product.ctl("agent", "restart", agent)

    assert wait_reply(sending) == "attempt 1, already sent: nothing"
    assert product.runner_pid(agent) != first
    assert machine.unit(product.session(agent)["unit"], "TasksMax") == {"TasksMax": "44"}


def test_removing_an_agent_tells_the_chat_that_waits(product: Product, machine: Machine) -> None:
    agent = product.add()
    sending = product.send_later(agent, "/sleep 30")
    product.wait_state(agent, "working")

    product.ctl("agent", "remove", agent, "--yes", "--purge")
    product.forget(agent)

    with pytest.raises(MachineError, match=r"could not be answered.*was removed"):
        wait_reply(sending)
    assert machine.sh(f"podman ps --all --quiet --filter name={agent}") == ""
    units = machine.sh(f"systemctl --user list-unit-files --no-legend 'nanoclaw-{agent}@*' || true")
    assert units == ""
