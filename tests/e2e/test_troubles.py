"""What befalls agents in real units and containers: what becomes of the message, what the person is told.

See the table in ARCHITECTURE.md. Containers that never come to work are in test_bad_containers.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.support.machine import Machine
from tests.support.product import CHANNEL, Json, Product, wait_reply

TURN_S = 8  #: a turn in whose middle something ends, also on a busy machine
LEASE_S = 4
#: The installed router with shorter leases.
HURRY = "; ".join(
    (
        "import sys",
        "sys.path.insert(0, '%h/.local/lib/nanoclaw')",
        "from nanoclawd import limits",
        f"limits.LEASE_S, limits.HEARTBEAT_S = {LEASE_S}.0, 1.0",
        "from nanoclawd.__main__ import main",
        "sys.exit(main())",
    )
)
#: The container's first process leaves with a status of its own as soon as the runner, its child, is gone.
FAILS = '[Container]\nEntrypoint=["sh", "-c", "/opt/nanoclaw/nanoclaw-runner; exit 3"]\n'
#: What systemd-oomd does: it counts on the unit's cgroup, and kills all that is in it.
OOM_KILL = """
import os, sys
os.setxattr(sys.argv[1], "user.oomd_ooms", b"1")
with open(f"{sys.argv[1]}/cgroup.kill", "w") as file:
    file.write("1")
"""


def shown(product: Product, agent: str, pattern: str) -> None:
    """Wait until `nanoclawctl status` says so of the agent's session, in its one line."""

    def look() -> re.Match[str] | None:
        return re.search(rf"^{agent} .*  {pattern}$", product.ctl("status").stdout, re.MULTILINE)

    product.machine.wait_for(look, within_s=30, what=f"{agent}: {pattern!r} in the status")


def ended(product: Product, agent: str) -> list[tuple[str, int]]:
    """Return state and attempts of each message to the agent, the oldest first."""
    messages = product.ask("message", "list", agent)["messages"]
    return [(message["state"], message["attempts"]) for message in messages]


def buried(product: Product, agent: str, reason: str) -> str:
    """Send a message that ends at once as a dead letter, for that reason; return its id."""
    answer = product.ctl("send", agent, "hello", "--wait", "--timeout", "60", check=False)
    letters = product.ask("deadletter", "list")["deadLetters"]
    (letter,) = (letter for letter in letters if letter["agent"] == agent)

    assert (answer.returncode, answer.stdout) == (1, f"Your message could not be answered: {reason}\n")
    assert letter["reason"] == reason
    return str(letter["id"])


def write_drop_in(product: Product, agent: str, text: str) -> None:
    directory = product.ask("agent", "show", agent)["dropInDirectory"]
    product.write(f"{directory}/50-local.conf", text)
    product.machine.systemctl("daemon-reload")


# --- it ends --------------------------------------------------------------------------------------------


def end(product: Product, agent: str, how: str) -> None:
    """End the agent's container in that way."""
    machine, unit = product.machine, product.session(agent)["unit"]
    match how:
        case "exits":
            children = f"/proc/{product.runner_pid(agent)}/task/*/children"
            machine.sh(f"kill -KILL $(cat {children})", user="root")
        case "runner":
            machine.run("kill", "-KILL", str(product.runner_pid(agent)), user="root")
        case "conmon":
            machine.run("kill", "-KILL", machine.unit(unit, "MainPID")["MainPID"])
        case "unit":
            machine.systemctl("kill", "--signal=KILL", unit)
        case "memory":
            group = machine.unit(unit, "ControlGroup")["ControlGroup"]
            machine.run("python3", "-c", OOM_KILL, f"/sys/fs/cgroup{group}")


def test_containers_that_end_in_mid_turn_are_replaced(product: Product, machine: Machine) -> None:
    words = {
        "exits": "its container failed with status 3",
        "runner": "its runner was ended by SIGKILL",
        "conmon": "its container was stopped from outside",
        "unit": "its container was stopped from outside",
        "memory": "its container used more memory than it may",
    }
    agents = {how: product.add(how) for how in words}
    write_drop_in(product, agents["exits"], FAILS)
    machine.expect_journal(r"message-failed: .*retrying")
    sending, before = {}, {}

    for how, agent in agents.items():
        machine.expect_journal(rf"nanoclaw-{agent}@")
        sending[how] = product.send_later(agent, f"/send on its way\n/sleep {TURN_S}\n/sent")
        product.wait_event("delivery-sent", agent=agent)
        before[how] = product.runner_pid(agent)
        end(product, agent, how)
        shown(product, agent, rf"attempt 2( in \d+ s)?: {words[how]}")

    for how, agent in agents.items():
        assert wait_reply(sending[how]) == "on its way\nattempt 2, already sent: 'on its way'", how
        assert ended(product, agent) == [("answered", 2)], how
        assert not machine.exists(f"/proc/{before[how]}"), how
        names = machine.sh(f"podman ps --all --format '{{{{.Names}}}}' --filter name={agent}-")
        assert names == product.container(agent)


@pytest.fixture
def short_leases(product: Product, machine: Machine) -> Iterator[None]:
    drop_in = f"{product.home}/.config/systemd/user/nanoclaw.service.d/50-leases.conf"
    machine.write(drop_in, f'[Service]\nExecStart=\nExecStart=/usr/bin/python3 -sP -c "{HURRY}"\n')
    machine.systemctl("daemon-reload")
    try:
        machine.systemctl("restart", "nanoclaw.service")
        yield
    finally:
        machine.run("rm", drop_in)
        machine.systemctl("daemon-reload")
        machine.systemctl("restart", "nanoclaw.service")


def test_runner_that_hangs_is_stopped_and_replaced(
    product: Product, machine: Machine, short_leases: None
) -> None:
    agent = product.add()
    machine.expect_journal(r"lease-expired: |message-failed: .*retrying")
    sending = product.send_later(agent, f"/sleep {TURN_S}\n/sent")
    product.wait_state(agent, "working")
    hung = product.runner_pid(agent)

    machine.run("kill", "-STOP", str(hung), user="root")

    shown(product, agent, rf"its runner says nothing since \d s, and is stopped at {LEASE_S} s")
    shown(product, agent, rf"attempt 2( in \d+ s)?: its runner was silent for {LEASE_S} s")
    assert wait_reply(sending) == "attempt 2, already sent: nothing"
    assert not machine.exists(f"/proc/{hung}")
    assert ended(product, agent) == [("answered", 2)]


# --- a message arrives meanwhile ------------------------------------------------------------------------

#: An adapter that says something in each chat with an agent and waits for all answers, again and again.
ADAPTER = r"""
import json, socket, subprocess, sys, time
path, agent, chats, rounds, pause_s, turn_s, *meanwhile = sys.argv[1:]
chats, rounds, pause_s = int(chats), int(rounds), float(pause_s)

def connect(method, parameters, **flags):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(60)
    sock.connect(path)
    message = {"method": f"io.nanoclaw.Channel.{method}", "parameters": parameters, **flags}
    sock.sendall(json.dumps(message).encode() + b"\0")
    return sock.makefile("rb")

def read(file):
    data = b""
    while not data.endswith(b"\0"):
        byte = file.read(1)
        assert byte, "the router hung up"
        data += byte
    return json.loads(data[:-1])["parameters"]

answers = []
attached = connect("Attach", {}, more=True)
for turn in range(rounds):
    ending = subprocess.Popen(meanwhile) if meanwhile and turn else None
    for number in range(chats):
        chat, text = f"{agent}/{number}", f"/sleep {turn_s if number % 2 else 0}\n{turn}"
        message = {"chat": chat, "thread": "", "event": f"e{turn}", "revision": 0}
        read(connect("Deliver", {**message, "sender": "me", "text": text, "agent": agent}))
        time.sleep(pause_s)
    for number in range(chats):
        while (delivery := read(attached).get("delivery")) is None or delivery["agent"] != agent:
            pass
        read(connect("ReportSent", {"key": delivery["key"], "receipt": "r"}))
        answers.append((delivery["chat"], delivery["text"]))
    assert not ending or ending.wait(60) == 0
    time.sleep(turn * pause_s)
print(json.dumps(sorted(answers)))
"""


def talk(
    product: Product, agent: str, *meanwhile: str, chats: int, rounds: int, pause_s: float, turn_s: float = 0
) -> None:
    """Have messages answered, each once; `pause_s` is between chats, and one more from round to round.

    turn_s: what every other chat's take. meanwhile: what is run beside each round but the first.
    """
    numbers = (str(number) for number in (chats, rounds, pause_s, turn_s))
    done = product.machine.run("python3", "-c", ADAPTER, CHANNEL, agent, *numbers, *meanwhile, timeout_s=120)

    expected = sorted([f"{agent}/{chat}", f"{turn}"] for chat in range(chats) for turn in range(rounds))
    assert json.loads(done.stdout) == expected
    assert {state for state, _ in ended(product, agent)} == {"answered"}


def test_messages_that_arrive_while_the_runner_leaves_are_answered_once(product: Product) -> None:
    agent = product.add("", "--idle-seconds", "0")

    talk(product, agent, chats=1, rounds=16, pause_s=0.015)

    assert {attempts for _, attempts in ended(product, agent)} == {1}  # to say good-bye is no failure
    assert len(product.events("session-started", agent=agent)) > 4


def test_messages_that_arrive_while_containers_are_killed_are_answered_once(
    product: Product, machine: Machine
) -> None:
    agent = product.add()
    machine.expect_journal(rf"nanoclaw-{agent}@|message-failed: .*retrying")
    kill = ("systemctl", "--user", "kill", "--signal=KILL", f"nanoclaw-{agent}@*.service")

    talk(product, agent, *kill, chats=8, rounds=2, pause_s=0.01, turn_s=1)

    assert {attempts for _, attempts in ended(product, agent)} <= {1, 2}
    # The answer of every other chat takes longer than the kill.
    assert len(product.events("session-started", agent=agent)) > 8


# --- it does not start ----------------------------------------------------------------------------------


def test_a_masked_unit_ends_the_message_and_unmasked_it_goes_on(product: Product, machine: Machine) -> None:
    agent = product.add("", "--idle-seconds", "0")
    machine.expect_journal("message-dead: ")
    product.send(agent, "hello")
    product.wait_state(agent, "idle")
    machine.systemctl("mask", f"nanoclaw-{agent}@.service")

    unit = product.session(agent)["unit"]
    letter = buried(product, agent, f"Unit {unit} is masked; 'systemctl --user unmask' lets it run again")

    assert len(product.events("session-ended", agent=agent)) == 2, "nobody waits for what cannot get better"
    machine.systemctl("unmask", f"nanoclaw-{agent}@.service")
    product.ctl("deadletter", "retry", letter)
    product.wait_event("message-answered", message=letter)


def test_an_image_that_is_gone_ends_the_message_and_made_again_it_goes_on(
    product: Product, machine: Machine
) -> None:
    image = "localhost/nanoclaw-gone:1"
    # Not a tag of the agent image: that would copy its record from the machine's store into the user's,
    # where it has no mapped layers, and each later start of any agent would make them anew.
    build = ("podman", "build", "--quiet", "--network=none", "--pull=never", "--tag", image, "-")
    containerfile = "FROM localhost/nanoclaw-agent:latest\nLABEL gone=soon\n"
    machine.run(*build, input=containerfile)
    agent = product.add("", "--image", image, "--idle-seconds", "0")
    machine.expect_journal(f"message-dead: |nanoclaw-{agent}@.* <[34]> ")
    product.send(agent, "hello")
    product.wait_state(agent, "idle")
    machine.run("podman", "image", "rm", image)

    reason = f"its image '{image}' is missing; run: nanoclawctl image build --image {image}"
    letter = buried(product, agent, reason)

    assert len(product.events("session-ended", agent=agent)) == 2, "nobody waits for what cannot get better"
    machine.run(*build, input=containerfile)
    product.ctl("deadletter", "retry", letter)
    product.wait_event("message-answered", message=letter)
    product.wait_state(agent, "idle")
    machine.run("podman", "image", "rm", image)


def test_messages_wait_while_the_file_of_their_agent_is_broken(product: Product, machine: Machine) -> None:
    agent = product.add()
    file = f"{product.home}/.config/nanoclaw/agents/{agent}.toml"
    mended = machine.read(file)
    machine.expect_journal("agent-broken: ")
    product.ctl("agent", "stop", agent)
    waiting = product.send_later(agent, "hello")
    product.wait_event("message-queued", agent=agent)
    machine.write(file, "provider = \n")
    product.ctl("reload", check=False)

    shown(
        product, agent, re.escape(f"{file}:1: is not TOML: Invalid value (the format is TOML: key = value)")
    )
    machine.write(file, mended)
    product.ctl("reload")
    shown(product, agent, f"'{agent}' is stopped; 'nanoclawctl agent start {agent}' lets it go on")
    product.ctl("agent", "start", agent)
    assert wait_reply(waiting) == "hello"


def test_a_start_limit_that_is_hit_is_told_and_reset(product: Product, machine: Machine) -> None:
    agent = product.add("", "--idle-seconds", "0")
    machine.expect_journal(rf"nanoclaw-{agent}@|message-failed: .*retrying")
    product.send(agent, "hello")
    product.wait_state(agent, "idle")
    # systemd counts the starts of a unit while it knows it: now a unit of the person's mentions this one.
    unit = product.session(agent)["unit"]
    wants = f"{product.home}/.config/systemd/user/default.target.d/50-{agent}.conf"
    product.write(wants, f"[Unit]\nWants={unit}\n")
    write_drop_in(product, agent, "[Unit]\nStartLimitIntervalSec=600\nStartLimitBurst=1\n")
    product.send(agent, "hello")
    product.wait_state(agent, "idle")

    sending = product.send_later(agent, "hello")

    words = "its container was started too often in a short time"
    shown(product, agent, rf"attempt 2 in \d+ s: {words}; 'nanoclawctl agent logs {agent}' shows more")
    assert wait_reply(sending) == "hello"
    assert ended(product, agent) == [("answered", 1), ("answered", 1), ("answered", 2)]


# --- slots ----------------------------------------------------------------------------------------------

SLOTS = 4


def test_twenty_sessions_take_turns_with_four_slots(product: Product, machine: Machine) -> None:
    """The oldest message is next, but an agent that has its share leaves the others theirs."""
    product.write(f"{product.home}/.config/nanoclaw/nanoclaw.toml", f"max_sessions = {SLOTS}\n")
    product.ctl("reload")
    many, few, one = (product.add(suffix) for suffix in ("many", "few", "one"))
    line = [many] * 14 + [one] + [few] * 5
    product.ctl("stop", "--all")
    try:
        sends = []
        for number, agent in enumerate(line):
            text = "/sleep 2" if number < SLOTS else "/sleep 0.2"
            sends.append(f"~/.local/bin/nanoclawctl send {agent} '{text}' --chat chat{number}")
        machine.sh("\n".join(sends))
    finally:
        product.ctl("start", "--all")

    # Who has its share comes last. Each chat of nanoclawctl's is called AGENT/CHAT.
    waiting = sorted(range(SLOTS, len(line)), key=lambda number: line[number] == many)
    expected = {number: f"waits for a slot, {before} before it" for before, number in enumerate(waiting)}

    def number_of(session: Json) -> int:
        return int(session["chat"].rpartition("chat")[2])

    def look() -> bool:
        return expected == {number_of(s): s["detail"] for s in product.status()["sessions"] if s["detail"]}

    machine.wait_for(look, what="the line in the status")
    machine.wait_for(lambda: len(product.events("message-answered")) == 20, within_s=60)

    assert [ended(product, agent) for agent in (many, few, one)] == [
        [("answered", 1)] * count for count in (14, 5, 1)
    ]
    running, most, started = 0, 0, list[int]()
    numbers = {s["unit"]: number_of(s) for agent in (many, few, one) for s in product.sessions(agent)}
    for entry in product.events():
        event = entry["NANOCLAWD_EVENT"]
        running += (event == "session-started") - (event == "session-ended")
        if event == "attached":  # the first thing that is done with a slot
            started.append(numbers[entry["USER_UNIT"]])
        most = max(most, running)
    assert most == SLOTS
    # As many may be on their way at once.
    for agent in (many, few):
        own = [number for number in started if line[number] == agent]
        assert all(abs(place - own.index(n)) < SLOTS for place, n in enumerate(sorted(own))), own
    assert max(started.index(line.index(agent)) for agent in (few, one)) < 2 * SLOTS, started
