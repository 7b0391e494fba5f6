"""An agent that thinks: the real SDK in its container, the real gateway, a Messages API on loopback."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.machine import Machine
from tests.support.product import CHANNEL, Json, Product, unique_prefix, wait_reply

PORT = 8377
UNIT = "messages-api.service"
KEY = "sk-ant-test-4e1c0bb7d5f24a0f"
SETTINGS = f'[providers.anthropic]\nendpoint = "http://127.0.0.1:{PORT}"\n'


class Api:
    """tests/support/messages_api.py as a unit of the machine; one run a test."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._record = f"{machine.home}/messages-api.record"

    def start(self, *answers: Json, require_key: str | None = KEY) -> None:
        """Serve these answers, to requests with the key (None: with any)."""
        script = f"{self.machine.home}/messages-api.json"
        self.machine.write(script, json.dumps(answers))
        self.machine.sh(f"rm -f {self._record}")
        self.machine.run(
            *("systemd-run", "--user", "--quiet", "--collect", f"--unit={UNIT}", "--description=API"),
            f"--working-directory={self.machine.project}",
            *("python3", "-m", "tests.support.messages_api", f"--port={PORT}", f"--script={script}"),
            *(() if require_key is None else (f"--require-key={require_key}",)),
            f"--record={self._record}",
        )
        listens = ("bash", "-c", f": < /dev/tcp/127.0.0.1/{PORT}")
        self.machine.wait_for(lambda: self.machine.run(*listens, check=False).returncode == 0)

    def stop(self) -> None:
        self.machine.systemctl("stop", UNIT, check=False)

    def requests(self) -> list[dict[str, Any]]:
        """Return the requests of this run: at, path, headers, body."""
        if not self.machine.exists(self._record):
            return []
        return [json.loads(line) for line in self.machine.read(self._record).splitlines()]


@pytest.fixture(scope="module")
def configured(_installed: Machine) -> Iterator[Product]:
    """The product with the endpoint on loopback and a key."""
    product = Product(_installed, unique_prefix())
    product.write(f"{_installed.home}/.config/nanoclaw/nanoclaw.toml", SETTINGS)
    set_key(product)
    _installed.systemctl("reload", "nanoclaw")
    yield product
    product.ctl("secret", "remove", "anthropic", "--yes")
    product.close()


@pytest.fixture(scope="module")
def agent(configured: Product) -> str:
    """An agent for all tests that can share its container, which takes seconds to load the SDK."""
    return configured.add(provider="anthropic")


@pytest.fixture
def api(configured: Product, machine: Machine) -> Iterator[Api]:
    api = Api(machine)
    yield api
    api.stop()


def set_key(product: Product, value: str = KEY) -> None:
    product.ctl("secret", "set", "anthropic", input=value)


def user_text(request: Json) -> str:
    """Return what the last message of a request says."""
    content = request["body"]["messages"][-1]["content"]
    return content if isinstance(content, str) else json.dumps(content)


# --- answers -------------------------------------------------------------------------------------------


def test_the_answer_comes_and_streams(product: Product, machine: Machine, agent: str, api: Api) -> None:
    api.start({"thinking": "hm", "text": "good morning to you all", "pause_s": 0.1})
    attach = json.dumps({"chat": agent})
    with machine.popen(
        *("varlinkctl", "call", "--json=short", "--more", CHANNEL, "io.nanoclaw.Channel.Attach", attach),
        stdout=subprocess.PIPE,
    ) as attached:
        assert attached.stdout is not None
        product.ctl("send", agent, "hello there")

        activities = []
        for line in attached.stdout:
            reply = json.loads(line.lstrip("\x1e"))
            if reply.get("delivery"):
                break
            activities.append(reply["activity"])
        delivery = reply["delivery"]
        attached.terminate()

    assert (delivery["kind"], delivery["text"]) == ("reply", "good morning to you all")
    pieces = [activity["text"] for activity in activities if activity["kind"] == "text"]
    assert len(pieces) > 1 and "".join(pieces) == delivery["text"]
    assert "thinking" in [activity["kind"] for activity in activities]
    (request,) = api.requests()
    assert "hello there" in user_text(request)
    report = {"key": delivery["key"], "receipt": "r"}
    machine.run("varlinkctl", "call", CHANNEL, "io.nanoclaw.Channel.ReportSent", json.dumps(report))


def test_bash_really_runs_in_the_workspace(product: Product, machine: Machine, agent: str, api: Api) -> None:
    command = "pwd; echo $((6*7)) > answer.txt"
    api.start({"tool_use": [{"name": "bash", "input": {"command": command}}]}, {"text": "It is done."})

    assert product.send(agent, "what is 6 by 7?") == "It is done."

    workspace = product.ask("agent", "show", agent)["workspace"]
    assert machine.read(f"{workspace}/answer.txt") == "42\n"
    result = user_text(api.requests()[1])
    assert "tool_result" in result and "/workspace" in result


def test_instructions_and_notes_reach_the_system_prompt(
    configured: Product, product: Product, machine: Machine, api: Api
) -> None:
    agent = product.add(provider="anthropic")
    product.ctl("agent", "set", agent, "--instructions", "-", input="Speak like a sailor.\n")
    workspace = product.ask("agent", "show", agent)["workspace"]
    machine.write(f"{workspace}/CLAUDE.md", "The cat is called Minka.\n")
    api.start({"text": "aye"})

    assert product.send(agent, "hello") == "aye"

    system = json.dumps(api.requests()[0]["body"]["system"])
    assert "Speak like a sailor." in system and "The cat is called Minka." in system
    file = product.ask("agent", "show", agent)["file"]
    assert machine.read(file.removesuffix(".toml") + ".md") == "Speak like a sailor.\n"


def test_a_new_container_goes_on_with_the_conversation(product: Product, agent: str, api: Api) -> None:
    api.start({"text": "I shall remember."}, {"text": "It is 1234."})
    product.send(agent, "the number is 1234")
    runner = product.runner_pid(agent)

    product.ctl("agent", "restart", agent)

    assert product.send(agent, "which number?") == "It is 1234."
    assert product.runner_pid(agent) != runner
    messages = json.dumps(api.requests()[1]["body"]["messages"])
    for text in ("the number is 1234", "I shall remember.", "which number?"):
        assert text in messages


# --- what goes wrong -----------------------------------------------------------------------------------


def test_without_a_credential_the_chat_is_told_what_to_do(
    product: Product, machine: Machine, agent: str, api: Api
) -> None:
    api.start({"text": "never"})
    machine.expect_journal(r"message-dead: |nanoclaw-gateway\.service <4> ")
    product.ctl("secret", "remove", "anthropic", "--yes")

    try:
        failed = product.ctl("send", agent, "hello", "--wait", "--timeout", "30", check=False)
    finally:
        set_key(product)

    assert failed.returncode == 1
    assert "could not be answered" in failed.stdout and "nanoclawctl secret set anthropic" in failed.stdout
    assert api.requests() == []


def test_a_refused_credential_is_an_honest_line(
    product: Product, machine: Machine, agent: str, api: Api
) -> None:
    api.start({"text": "never"}, require_key="another-key")
    machine.expect_journal(r"message-dead: ")

    failed = product.ctl("send", agent, "hello", "--wait", "--timeout", "30", check=False)

    assert failed.returncode == 1
    assert "refuses the credential" in failed.stdout
    assert KEY not in failed.stdout
    assert len(api.requests()) == 1


def test_a_rate_limit_is_waited_out(product: Product, machine: Machine, agent: str, api: Api) -> None:
    machine.expect_journal(r"message-failed: .*retrying")
    api.start({"status": 429, "headers": {"retry-after": "4"}}, {"text": "now"})

    assert product.send(agent, "hello") == "now"

    first, second = api.requests()
    assert second["at"] - first["at"] >= 4


def test_an_overloaded_api_is_tried_again(product: Product, machine: Machine, agent: str, api: Api) -> None:
    machine.expect_journal(r"message-failed: .*retrying")
    api.start({"status": 529}, {"text": "now"})

    assert product.send(agent, "hello") == "now"

    assert len(api.requests()) == 2


def test_a_stream_that_breaks_off_is_tried_again_and_said_once(
    product: Product, machine: Machine, agent: str, api: Api
) -> None:
    machine.expect_journal(r"message-failed: .*retrying|nanoclaw-gateway\.service <4> ")
    api.start({"text": "half of an answer", "drop_after": 4}, {"text": "a whole answer"})

    assert product.send(agent, "hello") == "a whole answer"

    first, second = api.requests()
    assert user_text(first) != ""
    assert "half of an answer" not in json.dumps(second["body"]["messages"])


def test_a_person_may_stop_it_in_mid_stream(
    product: Product, machine: Machine, agent: str, api: Api
) -> None:
    api.start({"text": "this will never end", "hold_after": 4}, {"text": "here I am"})
    sending = product.send_later(agent, "tell me a long story")
    machine.wait_for(lambda: len(api.requests()) == 1)
    product.wait_state(agent, "working")
    runner = product.runner_pid(agent)
    place = json.dumps({"chat": agent, "thread": ""})

    began = time.monotonic()
    stopped = machine.run("varlinkctl", "call", CHANNEL, "io.nanoclaw.Channel.StopTurn", place)
    stdout, _ = sending.communicate(timeout=30)

    assert json.loads(stopped.stdout) == {"stopped": True}
    assert stdout == "Stopped.\n"
    assert time.monotonic() - began < 10  # the runner obeyed: it was not stopped itself
    assert product.send(agent, "are you there?") == "here I am"
    assert product.runner_pid(agent) == runner


def test_the_router_may_be_new_in_mid_stream(
    product: Product, machine: Machine, agent: str, api: Api
) -> None:
    api.start({"text": "one two three four five six seven eight nine ten", "pause_s": 0.15})
    sending = product.send_later(agent, "count")
    machine.wait_for(lambda: len(api.requests()) == 1)

    machine.systemctl("restart", "nanoclaw")

    assert wait_reply(sending) == "one two three four five six seven eight nine ten"
    assert len(api.requests()) == 1


def test_a_new_key_counts_from_the_next_call_on_also_in_mid_stream(
    product: Product, machine: Machine, agent: str, api: Api
) -> None:
    text = "one two three four five six seven eight nine ten"
    api.start({"text": text, "pause_s": 0.15}, {"text": "again"}, require_key=None)
    sending = product.send_later(agent, "count")
    machine.wait_for(lambda: len(api.requests()) == 1)
    runner = product.runner_pid(agent)

    set_key(product, "sk-ant-the-next-one")
    try:
        assert wait_reply(sending) == text
        assert product.send(agent, "hello") == "again"
    finally:
        set_key(product)

    assert [r["headers"]["x-api-key"] for r in api.requests()] == [KEY, "sk-ant-the-next-one"]
    assert product.runner_pid(agent) == runner


# --- the key -------------------------------------------------------------------------------------------

#: Looks for what stdin says in all that a process of the agent can read.
SEARCH = r"""
import json, os, sys
wanted, found, looked = sys.stdin.buffer.read(), [], 0
def look(path):
    global looked
    try:
        with open(path, "rb") as file:
            tail = b""
            while data := file.read(1 << 20):
                if wanted in tail + data:
                    found.append(path)
                    break
                tail = data[-len(wanted):]
        looked += 1
    except OSError:
        pass
for top, directories, files in os.walk("/"):
    if top in ("/sys", "/dev"):
        directories[:] = []
    elif top == "/proc":
        directories[:] = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            if pid != str(os.getpid()):
                for name in ("environ", "cmdline", "stat", "status", "maps"):
                    look(f"/proc/{pid}/{name}")
    elif not top.startswith("/usr"):
        for name in files:
            if not os.path.islink(os.path.join(top, name)):
                look(os.path.join(top, name))
found += [f"environment: {name}" for name, value in os.environb.items() if wanted in value]
print(json.dumps({"found": found, "looked": looked}))
"""
BODY = json.dumps(
    {"model": "claude-sonnet-5-5", "max_tokens": 9, "messages": [{"role": "user", "content": "hello"}]}
)


def curl(product: Product, agent: str, path: str, *options: str) -> str:
    """Return what the agent gets from the gateway, headers too."""
    line = ("curl", "--silent", "--include", "--unix-socket", "/run/nanoclaw/gateway.sock", *options)
    return product.inside(agent, *line, f"http://gateway{path}").stdout


def test_the_key_is_at_the_api_and_nowhere_in_the_container(
    product: Product, machine: Machine, agent: str, api: Api
) -> None:
    api.start(*[{"text": "hi"}] * 2)
    product.send(agent, "hello")

    answers = [
        curl(product, agent, "/anthropic/v1/messages", "--json", BODY),
        curl(product, agent, "/anthropic/v1/models"),
        curl(product, agent, "/"),
        curl(product, agent, "/%0d%0a"),
    ]
    found = product.python_inside(agent, SEARCH, input=KEY)

    assert [request["headers"]["x-api-key"] for request in api.requests()] == [KEY, KEY]
    assert answers[0].startswith("HTTP/1.1 200")
    assert not any(KEY in answer for answer in answers)
    assert found["looked"] > 20
    assert found["found"] == []
    entries = machine.journal(since_check=False)
    # The API itself is started with it.
    assert [
        entry for entry in entries if KEY in str(entry) and entry.get("_SYSTEMD_USER_UNIT") != UNIT
    ] == []
    state = f"{machine.home}/.local/state/nanoclaw"
    assert machine.run("grep", "-rlF", KEY, state, user="root", check=False).stdout == ""


def test_keys_that_an_agent_sends_itself_do_not_pass(product: Product, agent: str, api: Api) -> None:
    api.start(*[{"text": "hi"}] * 2)
    product.send(agent, "hello")

    answer = curl(
        product,
        agent,
        "/anthropic/v1/messages",
        *(
            "--json",
            BODY,
            "--header",
            "x-api-key: agents-own",
            "--header",
            "authorization: Bearer agents-own",
        ),
        *("--header", "cookie: agents-own"),
    )

    assert answer.startswith("HTTP/1.1 200")
    headers = api.requests()[1]["headers"]
    assert headers["x-api-key"] == KEY
    assert "agents-own" not in json.dumps(headers)
    # Nor does what the SDK had to send in place of a key.
    assert "the-gateway-has-it" not in json.dumps([request["headers"] for request in api.requests()])
