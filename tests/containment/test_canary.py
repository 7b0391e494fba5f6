"""A fresh secret where the API key lives is used for real, then looked for wherever it could have gone."""

from __future__ import annotations

import base64
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
API = "messages-api.service"
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
#: Looks for what is on stdin, a line each, in what all processes have but some. Usage: PID…
PROCESSES = """
import glob, os, re, sys
wanted = re.compile(b"|".join(map(re.escape, sys.stdin.buffer.read().split())), re.IGNORECASE)
size = 0
def look(path, data):
    global size
    size += len(data)
    if wanted.search(data):
        print(path, open(path.rpartition("/")[0] + "/comm").read())
for process in glob.glob("/proc/[0-9]*"):
    if process[6:] in (*sys.argv[1:], str(os.getpid())):
        continue
    try:
        for name in ("environ", "cmdline"):
            look(f"{process}/{name}", open(f"{process}/{name}", "rb").read())
        with open(f"{process}/mem", "rb", buffering=0) as memory:
            maps = open(f"{process}/maps").read()
            for first, last in re.findall("^([0-9a-f]+)-([0-9a-f]+) rw", maps, re.MULTILINE):
                try:
                    memory.seek(int(first, 16))
                    look(f"{process}/mem", memory.read(int(last, 16) - int(first, 16)))
                except (OSError, OverflowError, ValueError):
                    pass
    except OSError:
        continue  # it has ended
assert size > 1 << 22, size
"""
#: All that anybody writes to, also what containers see of it; but the scripted API's own files.
PLACES = ("/home/claw", "/run", "/var/lib", "/var/log", "/var/tmp", "/tmp", "/dev/shm")
GREP = (
    *("grep", "--recursive", "--files-with-matches", "--binary-files=text", "--devices=skip"),
    *("--ignore-case", "--fixed-strings", "--file=-", "--exclude=messages-api.*"),
)
#: What a person may look at, and show to others.
SHOWN = (
    *(("status", "--json"), ("doctor", "--json"), ("secret", "list", "--json"), ("deadletter", "list")),
    *(("audit", "list", "--json"), ("audit", "export"), ("session", "list", "--json")),
    *(("usage", "--json"), ("approval", "list", "--json")),
)


def forms(value: str) -> list[str]:
    """Return what shows that `value` is there: halves of it, in base64 wherever it begins, and in hex."""
    middle = len(value) // 2
    found = [value[:middle], value[middle:], value.encode().hex()]
    for shift in range(3):
        coded = base64.b64encode(bytes(shift) + value.encode()).decode()
        found.append(coded[4:-4])  # without what its neighbours are part of
    return found


@pytest.fixture
def api(machine: Machine, product: Product) -> Iterator[Api]:
    """The endpoint; the canary is the key."""
    product.write(f"{machine.home}/.config/nanoclaw/nanoclaw.toml", SETTINGS)
    product.ctl("secret", "set", "anthropic", input=CANARY)
    machine.systemctl("reload", "nanoclaw")
    api = Api(machine)
    yield api
    api.stop()
    product.ctl("secret", "remove", "anthropic", "--yes", check=False)


def test_the_key_is_nowhere_but_in_the_gateway(machine: Machine, product: Product, api: Api) -> None:
    agent = product.add(provider="anthropic")
    refusal = {"status": 401, "headers": ECHO, "error": {"message": f"{CANARY} is no key"}}
    api.start({"text": "good morning", "headers": ECHO}, refusal, refusal, require_key=None)

    assert product.send(agent, "hello") == "good morning"
    status, answer = product.python_inside(agent, ASK)
    inside = product.python_inside(agent, SEARCH, timeout_s=120)
    wanted = "\n".join(forms(CANARY))
    own = product.inside(agent, *GREP, "/tmp", "/run", "/dev/shm", input=wanted, check=False).stdout
    failures = [fail(machine, product, agent) for fail in (break_tls, break_value, break_file)]
    product.ctl("backup", f"{machine.home}/canary-backup.db")
    told = [
        show(product, *command) for command in (*SHOWN, ("agent", "show", agent), ("agent", "logs", agent))
    ]
    told.append(machine.run("podman", "inspect", product.container(agent)).stdout)
    told.append(machine.systemctl("show", "*").stdout + machine.systemctl("show-environment").stdout)
    gateway, endpoint = (machine.unit(unit, "MainPID")["MainPID"] for unit in ("nanoclaw-gateway", API))
    line = ("python3", "-c", PROCESSES, gateway, endpoint)
    remembered = machine.run(*line, user="root", input=wanted, timeout_s=120).stdout

    assert CANARY in json.dumps(api.requests())  # it was used
    assert status == 401 and CANARY not in answer
    assert {row["result"] for row in inside} == {"held"}, inside
    assert [status for status, _ in failures] == [502, 401, 401]
    assert traces(*told, *(answer for _, answer in failures)) == []
    assert own + remembered == ""
    crash_the_gateway(machine)
    api.stop()
    assert traces(*map(json.dumps, machine.journal())) == []
    found = machine.run(*GREP, *PLACES, input=wanted, user="root", check=False, timeout_s=120)
    assert found.stdout == ""
    machine.run("rm", f"{machine.home}/canary-backup.db")


def show(product: Product, *command: str) -> str:
    """Return what a command shows; `doctor` fails, as not all is well on a machine for tests."""
    done = product.ctl(*command, check=False)
    assert done.returncode in (0, 1) and done.stdout + done.stderr, (command, done.stderr)
    return done.stdout + done.stderr


def traces(*texts: str) -> list[str]:
    """Return which of `texts` tell of the canary."""
    wanted = [form.lower() for form in forms(CANARY)]
    return [text for text in texts if any(form in text.lower() for form in wanted)]


def break_tls(machine: Machine, product: Product, agent: str) -> tuple[int, str]:
    """Ask while the endpoint, which the key is meant for, speaks no TLS."""
    settings = f"{machine.home}/.config/nanoclaw/nanoclaw.toml"
    product.write(settings, SETTINGS.replace("http://", "https://"))
    machine.systemctl("reload", "nanoclaw")
    status, answer = product.python_inside(agent, ASK)
    product.write(settings, SETTINGS)
    machine.systemctl("reload", "nanoclaw")
    return status, answer


def break_value(machine: Machine, product: Product, agent: str) -> tuple[int, str]:
    """Ask while the key is none that fits into a header."""
    product.ctl("secret", "set", "anthropic", input=f"{CANARY}\r\n{CANARY}")
    status, answer = product.python_inside(agent, ASK)
    return status, answer


def break_file(machine: Machine, product: Product, agent: str) -> tuple[int, str]:
    """Ask while the file with the key is damaged."""
    product.ctl("secret", "set", "anthropic", input=CANARY)
    path = product.ask("secret", "list")["secrets"][0]["path"]
    good = machine.read(path)
    machine.write(path, good[:-40] + good[-20:], mode="600")
    status, answer = product.python_inside(agent, ASK)
    machine.write(path, good, mode="600")
    assert product.python_inside(agent, ASK)[0] == 401  # by the endpoint: the gateway has the key again
    return status, answer


def test_a_gateway_that_covers_nothing_is_noticed(machine: Machine, product: Product, api: Api) -> None:
    machine.expect_journal("nanoclaw(-gateway)?.service <4> records-")  # the router is away for a moment
    agent = product.add(provider="anthropic")
    error = {"type": "invalid_request_error", "message": f"your key is {CANARY}"}
    api.start({"text": "hi"}, {"status": 400, "headers": ECHO, "error": error}, require_key=CANARY)
    product.send(agent, "hello")

    uncovered = ("gateway/redact.py", "s/return any(secret in lower.*/return False/")
    with broken_code(machine, uncovered):
        _status, answer = product.python_inside(agent, ASK)

    head, _, body = answer.partition("\r\n\r\n")
    assert CANARY in head and CANARY in body


def test_a_secret_that_an_agent_is_told_is_found_in_its_runner(product: Product) -> None:
    agent = product.add()
    product.send(agent, f"NANOCLAWCANARY{secrets.token_hex(16)}")  # not the key, which must be nowhere

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
