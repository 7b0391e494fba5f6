"""A fresh secret where the API key lives is used for real, then looked for wherever it could have gone."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator

import pytest

from tests.containment.test_selftest import broken_code
from tests.e2e.test_anthropic import SETTINGS, Api
from tests.support.machine import Machine
from tests.support.product import Product

CANARY = f"NANOCLAWCANARY{secrets.token_hex(16)}"
#: An endpoint that says the key back, as some proxies do.
ECHO = {"x-echo": f"Bearer {CANARY}", "x-api-key": CANARY, f"x-{CANARY}": "1"}
API = "messages_api"  #: its own process has the canary on its command line
#: The program's own rows about secrets, in the container of an agent that has just used one.
SEARCH = """
import json, sys
sys.path.insert(0, "/opt/nanoclaw/lib")
from runner.containment import canary, suite
print(json.dumps([suite.run(probe, {"absent": {}}) for probe in canary.PROBES]))
"""
ASK = """
import json, sys
sys.path.insert(0, "/opt/nanoclaw/lib")
from runner.containment import gateway
body = b'{"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}'
request = gateway.post(b"/anthropic/v1/messages", b"Content-Length: %d\\r\\n" % len(body), body)
status, answer = gateway.ask(request)
print(json.dumps([status, answer.decode()]))
"""
PROCESSES = """
import glob, sys
for path in glob.glob("/proc/[0-9]*/environ") + glob.glob("/proc/[0-9]*/cmdline"):
    try:
        text = open(path, "rb").read()
    except OSError:
        continue
    if sys.argv[1].encode() in text and b"sys.argv[1]" not in text:
        print(path)
"""


@pytest.fixture
def api(machine: Machine, product: Product) -> Iterator[Api]:
    """The endpoint; the canary is the key, which it demands."""
    product.write(f"{machine.home}/.config/nanoclaw/nanoclaw.toml", SETTINGS)
    product.ctl("secret", "set", "anthropic", input=CANARY)
    machine.systemctl("reload", "nanoclaw")
    api = Api(machine)
    yield api
    api.stop()
    product.ctl("secret", "remove", "anthropic", "--yes")


def test_the_key_is_nowhere_but_in_the_gateway(machine: Machine, product: Product, api: Api) -> None:
    agent = product.add(provider="anthropic")
    refusal = {"status": 400, "headers": ECHO}
    api.start({"text": "good morning", "headers": ECHO}, refusal, refusal, require_key=CANARY)

    assert product.send(agent, "hello") == "good morning"
    status, answer = product.python_inside(agent, ASK)
    inside = product.python_inside(agent, SEARCH, timeout_s=120)
    told = "".join(
        product.ctl(*command, check=False).stdout
        for command in (
            *(["status", "--json"], ["doctor", "--json"], ["secret", "list", "--json"]),
            *(["agent", "show", agent, "--json"], ["message", "list", agent, "--json"]),
        )
    )

    assert CANARY in json.dumps(api.requests())  # it was used
    assert status == 400 and CANARY not in answer
    assert {row["result"] for row in inside} == {"held"}, inside
    assert CANARY not in told
    crash_the_gateway(machine)
    api.stop()
    assert [line for line in map(json.dumps, machine.journal()) if CANARY in line and API not in line] == []
    assert machine.run("python3", "-c", PROCESSES, CANARY, user="root").stdout == ""
    # All that anybody wrote to disk: the database, core dumps, sessions; the API's own files are beside.
    found = machine.run(
        *("grep", "--recursive", "--files-with-matches", "--binary-files=text", "--devices=skip", CANARY),
        *("/home/claw/.config", "/home/claw/.local/state", "/run", "/var/lib/systemd", "/var/tmp", "/tmp"),
        user="root",
        check=False,
        timeout_s=120,
    )
    assert found.stdout == ""


def test_a_gateway_that_covers_nothing_is_noticed(machine: Machine, product: Product, api: Api) -> None:
    machine.expect_journal("nanoclaw-gateway.service <4> records-lost")  # the router is away for a moment
    agent = product.add(provider="anthropic")
    error = {"type": "invalid_request_error", "message": f"your key is {CANARY}"}
    api.start({"text": "hi"}, {"status": 400, "headers": ECHO, "error": error}, require_key=CANARY)
    product.send(agent, "hello")

    # Two lines: of headers and of bodies.
    changes = ("s/self._pattern.search(data))/False)/", "s/return self._pattern.sub.*/return data/")
    with broken_code(machine, *(("gateway/redact.py", change) for change in changes)):
        _status, answer = product.python_inside(agent, ASK)

    head, _, body = answer.partition("\r\n\r\n")
    assert CANARY in head and CANARY in body


def test_a_secret_that_an_agent_is_told_is_found_in_its_runner(product: Product) -> None:
    agent = product.add()
    product.send(agent, CANARY)

    inside = {row["name"]: row["result"] for row in product.python_inside(agent, SEARCH, timeout_s=120)}

    assert inside["secret-memory"] == "through"


def crash_the_gateway(machine: Machine) -> None:
    """With the key in its memory; systemd says "dumped" of a process that left a core."""
    machine.expect_journal("nanoclaw-gateway.service.*(SEGV|signal)")
    machine.expect_journal("nanoclaw.service <[34]> gateway")
    pid = machine.unit("nanoclaw-gateway.service", "MainPID")["MainPID"]
    machine.run("kill", "-SEGV", pid)
    machine.wait_for(
        lambda: machine.unit("nanoclaw-gateway.service", "MainPID")["MainPID"] not in (pid, "0"), within_s=30
    )
    lines = [str(entry["MESSAGE"]) for entry in machine.journal() if "SEGV" in str(entry.get("MESSAGE"))]
    assert lines and all("code=killed" in line for line in lines), lines
