"""What a person sees of messages, and does when one was given up or the database is lost."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.support.machine import Machine
from tests.support.product import CHANNEL, CONTROL, SETTLE_S, Json, Product, wait_reply

CONTROL_INTERFACE = "io.nanoclaw.Control"
UNITS = ("nanoclaw.service", "nanoclaw.socket", "nanoclaw-channel.socket")
DEAD = r"<3> (message|delivery)-dead: "


def varlink(
    machine: Machine, method: str, parameters: Json, *options: str, channel: str = CHANNEL
) -> list[Json]:
    """Call a method with systemd's varlinkctl and return all replies; `channel` is a channel's socket."""
    socket = CONTROL if method.startswith(CONTROL_INTERFACE) else channel
    line = ["varlinkctl", "call", "--json=short", *options, socket, method, json.dumps(parameters)]
    return [json.loads(reply) for reply in machine.run(*line).stdout.replace("\x1e", "").splitlines()]


def deliver(machine: Machine, agent: str, text: str) -> str:
    """Hand over a message of the channel "terminal", and return its id."""
    message = {
        "chat": agent,
        "thread": "",
        "event": text,
        "revision": 0,
        "sender": "me",
    }
    (reply,) = varlink(machine, "io.nanoclaw.Channel.Deliver", {**message, "text": text, "agent": agent})
    return str(reply["message"])


def next_delivery(machine: Machine, chat: str, channel: str = CHANNEL) -> Json:
    """Attach as an adapter until a delivery comes, and return that; `channel` is a channel's socket."""
    parameters = json.dumps({"chat": chat})
    method = "io.nanoclaw.Channel.Attach"
    line = ("varlinkctl", "call", "--json=short", "--more", channel, method, parameters)
    with machine.popen(*line, stdout=subprocess.PIPE) as attached:
        assert attached.stdout is not None
        replies = (json.loads(reply.replace("\x1e", "")) for reply in attached.stdout)
        delivery: Json = next(reply["delivery"] for reply in replies if reply.get("delivery"))
        attached.terminate()
    return delivery


def report(machine: Machine, outcome: str, delivery: Json, **parameters: object) -> None:
    method = f"io.nanoclaw.Channel.Report{outcome}"
    varlink(machine, method, {"key": delivery["key"], **parameters})


def dead_letters(product: Product, agent: str) -> list[str]:
    """Return the ids of an agent's dead letters."""
    letters = product.ask("deadletter", "list")["deadLetters"]
    return [letter.get("id") or letter["key"] for letter in letters if letter["agent"] == agent]


# --- messages ------------------------------------------------------------------------------------------


def test_the_journal_tells_the_whole_story_by_one_id(product: Product, machine: Machine) -> None:
    agent = product.add()
    machine.expect_journal(rf"nanoclaw-{agent}@")
    machine.expect_journal(r"message-failed: .*retrying")
    sending = product.send_later(agent, "/sleep 3\n/send on its way\nhello")
    product.wait_state(agent, "working")
    machine.run("kill", "-KILL", str(product.runner_pid(agent)), user="root")
    machine.wait_for(lambda: "attempt 2 in" in product.session(agent)["detail"])  # it waits for 2 s
    assert wait_reply(sending) == "on its way\nhello"

    (shown,) = product.ask("message", "list", agent)["messages"]
    journal = product.ctl("message", "show", shown["id"]).stderr.partition(": ")[2].strip()
    entries = [json.loads(line) for line in machine.sh(f"{journal} --output=json").splitlines()]

    events = [(entry["NANOCLAWD_EVENT"], entry.get("NANOCLAWD_KEY")) for entry in entries]
    names = ("queued", "leased", "failed", "leased", "answered")
    assert [event for event, key in events if key is None] == [f"message-{name}" for name in names]
    keys = {key for _, key in events if key is not None}
    assert len(keys) == 2  # what it sent in mid-turn, and its reply
    for key in keys:
        assert [event for event, of in events if of == key] == ["delivery-leased", "delivery-sent"]
    turns = [entry["NANOCLAWD_TURN"] for entry in entries if entry["NANOCLAWD_EVENT"] == "message-leased"]
    assert turns[0] != turns[1] == shown["turn"]
    assert (shown["state"], shown["attempts"]) == ("answered", 2)


def test_a_message_is_shown_with_what_became_of_it(product: Product, machine: Machine) -> None:
    agent = product.add()
    product.ctl("agent", "stop", agent)
    message = product.ctl("send", agent, "hello\x1b[31m there").stdout.strip()

    queued = product.ctl("message", "list", agent, "--state", "queued").stdout
    shown = product.ctl("message", "show", message[:8]).stdout
    unknown = product.ctl("message", "show", "mx", check=False)

    assert queued.splitlines()[1].split()[:2] == [message, "queued"]
    assert "hello␛[31m there" in queued and "hello␛[31m there" in shown
    assert f"nanoclaw-{agent}@" in shown
    assert (unknown.returncode, "nanoclawctl message list" in unknown.stderr) == (4, True)
    product.ctl("agent", "start", agent)
    machine.wait_for(lambda: product.ask("message", "show", message)["deliveries"], within_s=SETTLE_S)


def test_varlinkctl_sees_the_same(product: Product, machine: Machine) -> None:
    agent = product.add()
    texts = ["one", "two", "three"]
    for text in texts:
        product.send(agent, text)

    method = f"{CONTROL_INTERFACE}.ListMessages"
    listed = varlink(machine, method, {"agent": agent, "state": "answered", "limit": 10}, "--more")
    message, delivery = varlink(
        machine, f"{CONTROL_INTERFACE}.ShowMessage", {"id": listed[0]["message"]["id"]}, "--more"
    )

    assert [reply["message"]["text"] for reply in listed] == texts
    assert message["message"] == listed[0]["message"]
    assert (delivery["delivery"]["text"], delivery["delivery"]["state"]) == ("one", "sent")


# --- dead letters --------------------------------------------------------------------------------------


def test_a_message_of_a_removed_agent_is_answered_once_there_is_one_again(
    product: Product, machine: Machine
) -> None:
    machine.expect_journal(DEAD)
    agent = product.add()
    product.ctl("agent", "stop", agent)
    message = product.ctl("send", agent, "hello").stdout.strip()
    product.ctl("agent", "remove", agent, "--yes", "--purge")
    assert dead_letters(product, agent) == [message]
    assert "deadletter list" in product.ctl("status").stdout

    refused = product.ctl("deadletter", "retry", message, check=False)
    product.ctl("agent", "add", agent, "--provider", "echo")
    product.ctl("deadletter", "retry", message[:8])

    assert (refused.returncode, "deadletter drop" in refused.stderr) == (5, True)
    product.wait_event("message-answered", message=message)
    assert dead_letters(product, agent) == []
    assert product.ask("message", "show", message)["message"]["revived"] == 1


def test_a_delivery_that_was_given_up_is_sent_after_all(product: Product, machine: Machine) -> None:
    machine.expect_journal(DEAD)
    product.ctl("deadletter", "drop", "--all", check=False)  # what other tests have left, if anything
    agent = product.add()
    message = deliver(machine, agent, "hello")
    delivery = next_delivery(machine, agent)
    report(machine, "Failed", delivery, reason="no such room", retryable=False)
    assert dead_letters(product, agent) == [delivery["key"]]
    assert "no such room" in product.ctl("deadletter", "show", delivery["key"]).stdout

    product.ctl("deadletter", "retry", "--all")
    again = next_delivery(machine, agent)
    report(machine, "Sent", again, receipt="r1")

    assert (again["key"], again["text"]) == (delivery["key"], "hello")
    (shown,) = product.ask("message", "show", message)["deliveries"]
    assert (shown["state"], shown["receipt"]) == ("sent", "r1")


def test_a_dropped_dead_letter_is_gone_from_sight(product: Product, machine: Machine) -> None:
    machine.expect_journal(DEAD)
    agent = product.add()
    message = deliver(machine, agent, "/fail invalid_request")
    machine.wait_for(lambda: dead_letters(product, agent) == [message], within_s=SETTLE_S)
    before = product.status()["queue"]["dead"]

    product.ctl("deadletter", "drop", message)

    assert dead_letters(product, agent) == []
    assert product.status()["queue"]["dead"] == before - 1
    refused = product.ctl("deadletter", "retry", message, check=False)
    assert (refused.returncode, "is dropped" in refused.stderr) == (5, True)
    assert "Dropped: " in product.ctl("message", "show", message).stdout
    report(machine, "Sent", next_delivery(machine, agent), receipt="r1")  # the notice


# --- the whole -----------------------------------------------------------------------------------------


def test_all_agents_stop_and_start_again(product: Product, machine: Machine) -> None:
    agent = product.add()
    product.send(agent, "hello")
    unit = product.session(agent)["unit"]

    try:
        product.ctl("stop", "--all")
        message = product.ctl("send", agent, "for later").stdout.strip()

        assert product.state(unit) in ("inactive", "failed")
        assert "ALL AGENTS ARE STOPPED" in product.ctl("status").stdout
        assert "nanoclawctl start --all" in product.ask("agent", "show", agent)["runtime"]["problem"]
    finally:
        product.ctl("start", "--all")

    product.wait_event("message-answered", message=message)
    assert not product.status()["held"]


@pytest.mark.parametrize("lost", [True, False])
def test_a_backup_that_was_made_while_all_ran_is_put_back(
    product: Product, machine: Machine, lost: bool
) -> None:
    agent, state = product.add(), f"{machine.home}/.local/state/nanoclaw"
    product.send(agent, "hello")
    backup = f"{machine.home}/nanoclaw-{agent}.backup"
    sending = product.send_later(agent, "/sleep 2\nstill here")
    product.wait_state(agent, "working")

    product.ctl("backup", backup)
    again = product.ctl("backup", backup, check=False)

    assert wait_reply(sending) == "still here"
    assert machine.sh(f"stat -c %a {backup}; ls {state}/backups") == "600"
    assert (again.returncode, "there is a file" in again.stderr) == (5, True)
    running = product.ctl("restore", backup, check=False)
    assert (running.returncode, "systemctl --user stop" in running.stderr) == (5, True)
    machine.systemctl("stop", *UNITS)
    try:
        if not lost:
            refused = product.ctl("restore", backup, check=False)
            assert (refused.returncode, "there is a database" in refused.stderr) == (5, True)
            return
        machine.sh(f"mkdir {state}/lost; mv {state}/nanoclaw.db* {state}/lost")
        restored = product.ctl("restore", backup).stderr
        assert "systemctl --user start" in restored
    finally:
        machine.systemctl("start", *UNITS)
        machine.sh(f"rm -rf {state}/lost {backup}")

    # What ran at that moment is as good as interrupted: its chat may hear it twice, and never nothing.
    machine.wait_for(
        lambda: [m["state"] for m in product.ask("message", "list", agent)["messages"]] == ["answered"] * 2,
        within_s=SETTLE_S,
    )
    machine.expect_journal(r"message-failed: .*retrying")


def test_what_is_older_than_the_retention_goes_at_the_next_start(product: Product, machine: Machine) -> None:
    agent, database = product.add(), f"{machine.home}/.local/state/nanoclaw/nanoclaw.db"
    old, new = (product.ask("send", agent, text, "--wait")["message"] for text in ("old", "new"))
    machine.wait_for(lambda: len(product.events("delivery-sent", agent=agent)) == 2)
    script = (
        "import sqlite3, sys; connection = sqlite3.connect(sys.argv[1])\n"
        "for table, column in (('inbox', 'id'), ('outbox', 'message')):\n"
        "    connection.execute(f'UPDATE {table} SET ended_at = 1 WHERE {column} = ?', sys.argv[2:])\n"
        "connection.commit()"
    )
    machine.systemctl("stop", "nanoclaw.service")
    machine.run("python3", "-c", script, database, old)
    machine.systemctl("start", "nanoclaw.service")

    product.wait_event("pruned")

    assert [message["id"] for message in product.ask("message", "list", agent)["messages"]] == [new]
    assert product.ctl("message", "show", old, check=False).returncode == 4
