"""From an installed product to an answer: what the first five minutes touch."""

from __future__ import annotations

import json
import re

import pytest

from tests.support.machine import Machine, MachineError
from tests.support.product import Product, wait_reply


def test_echo_answers_cold_and_warm_in_one_container(product: Product, machine: Machine) -> None:
    agent = product.add()

    first = product.ctl("send", agent, "hello", "--wait")
    container = machine.sh(f"podman ps --quiet --no-trunc --filter name={agent}")
    second = product.ctl("send", agent, "hello again", "--wait")

    assert (first.stdout, first.stderr) == ("hello\n", "")
    assert (second.stdout, second.stderr) == ("hello again\n", "")
    assert machine.sh(f"podman ps --quiet --no-trunc --filter name={agent}") == container


@pytest.mark.parametrize(
    "text",
    [
        "über Köln \N{SNOWMAN} \N{PILE OF POO} 漢字 \N{ARABIC LETTER SHEEN}",
        "one\ntwo\n\n  four, indented\tand a tab",
        "not --an option, 'quoted' \"twice\" $HOME `id` %n \\",
        "ü" * 80_000,
    ],
    ids=["unicode", "lines", "syntax", "long"],
)
def test_text_from_a_pipe_comes_back_unchanged(product: Product, text: str) -> None:
    agent = product.add()

    assert product.send(agent, text) == text


def test_text_as_argument_and_a_dash_for_stdin(product: Product) -> None:
    agent = product.add()

    assert product.ctl("send", agent, "as an argument", "--wait").stdout == "as an argument\n"
    assert product.ctl("send", agent, "-", "--wait", input="from stdin\n").stdout == "from stdin\n"


def test_the_longest_text_is_taken_and_its_echo_says_what_was_cut_off(product: Product) -> None:
    agent = product.add()

    answer = product.send(agent, "x" * (256 << 10))

    kept, _, note = answer.partition("\n")
    cut = (256 << 10) - len(kept)
    assert note == f"[{cut} more bytes were cut off]"


def test_text_over_the_limit_is_refused(product: Product) -> None:
    agent = product.add()

    refused = product.ctl("send", agent, "--wait", input="x" * ((256 << 10) + 1), check=False)

    assert (refused.returncode, refused.stdout) == (5, "")
    assert "error:" in refused.stderr and "256" in refused.stderr
    assert product.sessions(agent) == []


def test_what_a_terminal_would_obey_is_shown_instead(product: Product) -> None:
    agent = product.add()

    assert product.send(agent, "red \x1b[31m bell \a") == "red ␛[31m bell ␇"
    shown = product.ctl("send", agent, "--wait", "--json", input="red \x1b[31m").stdout
    assert "\x1b" not in shown
    assert json.loads(shown)["replies"][0]["text"] == "red \x1b[31m"


def test_json_holds_message_and_replies(product: Product) -> None:
    agent = product.add()

    answer = product.ask("send", agent, "/send on its way\nhello", "--wait")

    assert [(reply["kind"], reply["text"]) for reply in answer["replies"]] == [
        ("message", "on its way"),
        ("reply", "hello"),
    ]
    assert len({reply["key"] for reply in answer["replies"]}) == 2
    assert product.events("message-answered", message=answer["message"])


def test_message_in_mid_turn_joins_it_and_each_sender_gets_the_own_answer(product: Product) -> None:
    agent = product.add()
    first = product.send_later(agent, "/sleep 2\none")
    product.wait_state(agent, "working")

    second = product.ask("send", agent, "two", "--wait")

    assert wait_reply(first) == "one"
    assert [reply["text"] for reply in second["replies"]] == ["two"]
    answered = product.events("message-answered", agent=agent)
    assert len(answered) == 2
    assert len({event["NANOCLAWD_TURN"] for event in answered}) == 1


def test_without_wait_the_message_is_stored_and_answered_later(product: Product) -> None:
    agent = product.add()

    message = product.ctl("send", agent, "hello").stdout.strip()

    answered = product.wait_event("message-answered", message=message)
    assert answered["NANOCLAWD_AGENT"] == agent


def test_two_chats_are_two_sessions(product: Product, machine: Machine) -> None:
    agent = product.add()

    answers = [product.send(agent, f"hello from {chat}", "--chat", chat) for chat in ("home", "work")]

    assert answers == ["hello from home", "hello from work"]
    home, work = (product.session(agent, f"{agent}/{chat}") for chat in ("home", "work"))
    assert home["session"] != work["session"]
    names = machine.sh(f"podman ps --format '{{{{.Names}}}}' --filter name={agent}").splitlines()
    assert sorted(names) == sorted(f"nanoclaw-{agent}-{session['session']}" for session in (home, work))


def test_an_unknown_agent_is_an_error_with_a_hint(product: Product) -> None:
    agent = product.add()

    failed = product.ctl("send", f"{agent}x", "hello", "--wait", check=False)

    assert (failed.returncode, failed.stdout) == (4, "")
    assert f"'{agent}x'" in failed.stderr and "hint:" in failed.stderr


def test_the_journal_tells_a_message_by_unit_and_by_id_and_never_its_text(
    product: Product, machine: Machine
) -> None:
    agent = product.add()

    answer = product.ask("send", agent, "confidential-text", "--wait")

    lines = machine.sh(f"journalctl --user --output=json --unit='nanoclaw-{agent}@*'").splitlines()
    of_unit = [entry.get("NANOCLAWD_EVENT") for entry in map(json.loads, lines)]
    assert "session-started" in of_unit
    assert "message-answered" in of_unit
    lines = machine.sh(f"journalctl --user --output=json NANOCLAWD_MESSAGE={answer['message']}").splitlines()
    of_message = [json.loads(line)["NANOCLAWD_EVENT"] for line in lines]
    assert of_message[:3] == ["message-queued", "message-leased", "message-answered"]
    assert of_message[3:] == ["delivery-leased", "delivery-sent"]
    assert "confidential-text" not in machine.sh("journalctl --output=json --all", user="root")


def test_systemctl_shows_all_units(product: Product, machine: Machine) -> None:
    agent = product.add()
    product.send(agent, "hello")

    shown = machine.sh("systemctl --user status 'nanoclaw*'")

    unit = product.session(agent)["unit"]
    for name in (
        "nanoclaw.service",
        "nanoclaw.socket",
        "nanoclaw-channel.socket",
        "nanoclaw-gateway.service",
        "nanoclaw-agents.slice",
        unit,
    ):
        assert f"● {name} - " in shown, shown
    assert "could not be found" not in shown


def test_the_first_client_starts_the_service(product: Product, machine: Machine) -> None:
    agent = product.add()
    machine.systemctl("stop", "nanoclaw.service")
    assert product.state("nanoclaw.service") == "inactive"

    assert product.send(agent, "anybody there?") == "anybody there?"

    assert product.state("nanoclaw.service") == "active"


def test_services_say_ready_status_and_watchdog(product: Product, machine: Machine) -> None:
    product.add()
    machine.systemctl("reload", "nanoclaw.service")

    router = machine.unit("nanoclaw.service", "Type", "StatusText", "WatchdogUSec")

    assert router["Type"] == "notify-reload"
    assert router["WatchdogUSec"] == "30s"
    assert re.match(r"[0-9]+ agents", router["StatusText"])
    machine.systemctl("start", "nanoclaw-gateway.service")
    gateway = machine.unit("nanoclaw-gateway.service", "Type", "WatchdogUSec", "ActiveState")
    assert gateway == {"Type": "notify-reload", "WatchdogUSec": "1min", "ActiveState": "active"}


def test_reload_takes_what_a_person_wrote(product: Product, machine: Machine) -> None:
    agent = product.add()
    file = product.ask("agent", "show", agent)["file"]
    machine.write(file, f"{machine.read(file)}\nmemory_max = '123M'\n")

    machine.systemctl("reload", "nanoclaw")

    unit = machine.unit(f"nanoclaw-{agent}@s1.service", "MemoryMax")
    assert unit == {"MemoryMax": str(123 << 20)}
    assert product.ask("agent", "show", agent)["configuration"]["memoryMax"] == "123M"
    assert product.send(agent, "hello") == "hello"


def test_a_broken_file_breaks_its_agent_alone(product: Product, machine: Machine) -> None:
    broken, fine = product.add("broken"), product.add("fine")
    file = product.ask("agent", "show", broken)["file"]
    before = machine.read(file)
    machine.expect_journal(rf"agent-broken: .*{broken}\.toml:")
    machine.write(file, "# mine\nmemory_max = '12 GB'\n")

    machine.systemctl("reload", "nanoclaw")

    assert "1 broken" in machine.unit("nanoclaw.service", "StatusText")["StatusText"]
    runtime = product.ask("agent", "show", broken)["runtime"]
    assert runtime["state"] == "broken"
    assert f"{broken}.toml:2: " in runtime["problem"] and "memory_max" in runtime["problem"]
    with pytest.raises(MachineError, match=rf"{broken}\.toml:2: .*memory_max"):
        product.send(broken, "hello")
    assert product.send(fine, "hello") == "hello"

    machine.write(file, before)
    machine.systemctl("reload", "nanoclaw")
    assert product.send(broken, "hello") == "hello"
