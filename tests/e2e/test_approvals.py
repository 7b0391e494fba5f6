"""A person is asked: a real curl in a real container waits, and what becomes of it is what was answered."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.support.machine import Machine, NestedMachine
from tests.support.product import Json, Product, unique_prefix

UNIT = "far-server"
FIRST = 2  #: of 11.0.0.0/24, which is a public network: nobody is asked about others
#: A server with 60 addresses in a network of its own, as if it were far away. Tells what it got.
SERVER = """
import http.server, json
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        answer = json.dumps({"method": self.command, "path": self.path, "body": body.decode()}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
    do_POST = do_GET
http.server.ThreadingHTTPServer(("0.0.0.0", 80), Handler).serve_forever()
"""
START = """
systemd-run --quiet --collect --service-type=exec --unit=far-server -p PrivateNetwork=yes python3 -c "$1"
pid=$(systemctl show -P MainPID far-server)
ip link add far0 type veth peer name far1 netns "$pid"
ip addr add 11.0.0.1/24 dev far0
ip link set far0 up
for n in $(seq 2 60); do nsenter -t "$pid" -n ip addr add "11.0.0.$n/24" dev far1; done
nsenter -t "$pid" -n ip link set far1 up
for _ in $(seq 100); do
  if (: < /dev/tcp/11.0.0.60/80) 2> /dev/null; then exit 0; fi
  sleep 0.1
done
exit 1
"""


class Asker:
    """An agent with a container, and what a person says."""

    def __init__(self, product: Product, agent: str, host: int) -> None:
        self.product, self.agent = product, agent
        self.host = f"11.0.0.{host}"
        self.running = ExitStack()

    def curl(self, path: str = "/x", *options: str, agent: str = "") -> subprocess.Popen[str]:
        """Begin to ask for something."""
        url = path if "://" in path else f"http://{self.host}{path}"
        line = ("curl", "-sS", "-w", "\n%{http_code}", "--path-as-is", *options, url)
        container = self.product.container(agent or self.agent)
        curl = self.product.machine.popen(
            *("podman", "exec", container, *line), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.running.enter_context(curl)
        self.running.callback(curl.kill)
        return curl

    def end(self, curl: subprocess.Popen[str]) -> tuple[str, str]:
        """Return body and status."""
        body, _, status = curl.communicate(timeout=60)[0].rpartition("\n")
        return body, status

    def pending(self, agent: str = "") -> list[Json]:
        found: list[Json] = self.product.ask("approval", "list", agent or self.agent)["approvals"]
        return found

    def waiting(self) -> str:
        """Return the id of what waits."""
        (approval,) = self.product.machine.wait_for(self.pending, within_s=30, what="approval")
        return str(approval["id"])

    def say(self, verb: str, id: str, *options: str) -> Json:
        return self.product.ask("approval", verb, id, *options)

    def tested(self, url: str) -> Json:
        shown = self.product.ctl("policy", "test", self.agent, url, "--json", check=False)
        found: Json = json.loads(shown.stdout)
        return found


@pytest.fixture(scope="module")
def agents(_installed: Machine) -> Iterator[tuple[Product, str, str]]:
    """Two agents with running containers, and a server far away."""
    machine, product = _installed, Product(_installed, unique_prefix())
    if not isinstance(machine, NestedMachine):
        pytest.skip("a network like this needs root")
    machine.run("bash", "-euc", START, "bash", SERVER, user="root")
    names = [product.add(suffix, "--unknown", "ask") for suffix in ("a", "b")]
    for name in names:
        product.send(name, "hello")
    yield product, *names
    product.close()
    machine.run("systemctl", "stop", UNIT, user="root")


_hosts = iter(range(FIRST, 60))


@pytest.fixture
def asker(agents: tuple[Product, str, str], machine: Machine) -> Iterator[Asker]:
    """The first of them, and a host that nobody has been asked about."""
    asker = Asker(agents[0], agents[1], next(_hosts))
    yield asker
    asker.running.close()
    for approval in [*asker.pending(), *asker.pending(agents[2])]:
        asker.say("deny", approval["id"], "--once")


def test_request_is_shown_and_allowed_in_the_chat_that_it_is_for(asker: Asker) -> None:
    curl = asker.curl("/x?y=z", "--data", "hello")
    id = asker.waiting()

    assert id in asker.product.send(asker.agent, "/approve")
    said = asker.product.send(asker.agent, f"/approve {id}")

    assert f"Approval {id}: allowed by" in said
    body, status = asker.end(curl)
    assert (status, json.loads(body)["body"]) == ("200", "hello")


def test_curl_waits_and_goes_on_when_it_is_allowed(asker: Asker) -> None:
    curl = asker.curl("/x?y=z", "--data", "hello", "-H", "X-Mine: 1")
    id = asker.waiting()

    shown = asker.product.ctl("approval", "show", id[:-1]).stdout
    for words in (
        f"http://{asker.host}/x?y=z",
        "POST",
        asker.agent,
        "5 bytes\n  | hello",
        "x-mine: 1",
        "No rule",
    ):
        assert words in shown
    assert "1 wait for your answer" in asker.product.ctl("status").stdout
    assert asker.say("allow", id)["sent"]

    body, status = asker.end(curl)
    assert status == "200"
    assert json.loads(body) == {"method": "POST", "path": "/x?y=z", "body": "hello"}
    assert asker.product.ctl("approval", "allow", id, check=False).returncode == 5
    # Only once.
    curl = asker.curl("/x?y=z", "--data", "hello", "-H", "X-Mine: 1")
    assert asker.waiting() != id
    asker.say("deny", asker.waiting(), "--once")
    assert asker.end(curl)[1] == "403"
    rows = asker.product.ask("audit", "list", asker.agent, "--limit", "1000")["rows"]
    events = [row["event"] for row in rows if row["detail"].get("approval") == id]
    assert events == ["approval_asked", "approval_allowed", "approval_used"]
    (by,) = (
        row["detail"]["by"]
        for row in rows
        if row["detail"].get("approval") == id and row["kind"] == "control"
    )
    assert by == "claw (uid 1000)"
    assert asker.product.ctl("audit", "verify").returncode == 0


def test_chat_has_a_line_about_it(asker: Asker) -> None:
    asker.curl()
    id = asker.waiting()

    session = asker.product.session(asker.agent)
    shown = asker.product.ask("approval", "show", id)["approval"]
    assert (shown["session"], shown["chat"]) == (session["session"], session["chat"])
    delivery = asker.product.ask("message", "show", f"{id}.card0")["deliveries"][0]
    assert delivery["kind"] == "notice"
    assert f"'/approve {id}'" in delivery["text"]


def test_tunnel_shows_no_more_than_it_is(asker: Asker) -> None:
    curl = asker.curl("/secret/path", "--proxytunnel")
    id = asker.waiting()

    shown = asker.product.ctl("approval", "show", id).stdout
    assert f"{asker.host}:80, of which nothing else can be seen: it is a tunnel" in shown
    assert "secret" not in shown
    asker.say("allow", id)

    assert asker.end(curl)[1] == "200"


def test_denial_is_remembered(asker: Asker) -> None:
    curl = asker.curl()
    asker.say("deny", asker.waiting())
    assert asker.end(curl)[1] == "403"

    assert asker.end(asker.curl("/other"))[1] == "403"

    assert not asker.pending()
    rules = asker.product.ask("policy", "show", asker.agent)["rules"]
    assert [
        (rule["host"], rule["deny"], rule["until"] > 0) for rule in rules if rule["host"] == asker.host
    ] == [(asker.host, True, True)]
    assert asker.tested(f"http://{asker.host}/x")["reason"] == "denied"


def test_time_out_says_what_to_do_and_the_question_stays(asker: Asker) -> None:
    product, machine = asker.product, asker.product.machine
    file = f"{machine.home}/.config/nanoclaw/nanoclaw.toml"
    before = machine.run("cat", file, check=False).stdout
    machine.write(
        file, before + "\nask_seconds = 1\n" if "[" not in before else f"ask_seconds = 1\n{before}"
    )
    machine.systemctl("reload", "nanoclaw")
    try:
        body, status = asker.end(asker.curl("/x"))
    finally:
        machine.write(file, before)
        machine.systemctl("reload", "nanoclaw")
    id = asker.waiting()
    assert status == "403"
    assert f"stays open as approval {id}" in json.loads(body)["error"]["message"]

    assert not asker.say("allow", id)["sent"]
    # What is not the very same waits for an answer of its own.
    others = [asker.curl("/y"), asker.curl("/x", "--data", "x"), asker.curl("/x", "-H", "X-More: 1")]
    machine.wait_for(lambda: len(asker.pending()) == 3, within_s=30)
    assert product.ask("approval", "show", id)["approval"]["state"] == "allowed"
    assert asker.end(asker.curl("/x"))[1] == "200"
    assert product.ask("approval", "show", id)["approval"]["state"] == "used"
    for approval in asker.pending():
        asker.say("deny", approval["id"], "--once")
    assert [asker.end(curl)[1] for curl in others] == ["403"] * 3


def test_restart_of_the_router_in_mid_hold(asker: Asker) -> None:
    curl = asker.curl()
    id = asker.waiting()

    asker.product.machine.systemctl("restart", "nanoclaw.service")

    assert asker.waiting() == id
    assert curl.poll() is None
    asker.product.machine.wait_for(lambda: _joined(asker, id, curl), within_s=30)
    assert asker.end(curl)[1] == "200"


def _joined(asker: Asker, id: str, curl: subprocess.Popen[str]) -> bool:
    """Allow it; the router may not have been told yet that it still waits, and then it goes by itself."""
    if asker.pending():
        asker.say("allow", id)
    return curl.poll() is not None


def test_restart_of_the_gateway_in_mid_hold(asker: Asker) -> None:
    curl = asker.curl()
    id = asker.waiting()

    asker.product.machine.systemctl("restart", "nanoclaw-gateway.service")

    assert asker.end(curl)[1] in ("403", "000")
    assert asker.waiting() == id
    curl = asker.curl()
    asker.product.machine.wait_for(lambda: _joined(asker, id, curl), within_s=30)
    assert asker.end(curl)[1] == "200"
    assert not asker.pending()


def test_always_is_a_rule_in_the_file(asker: Asker) -> None:
    curl = asker.curl("/pub/x")
    assert asker.say("allow", asker.waiting(), "--always")["rule"] == f"allow {asker.host}:80 GET /pub/x"
    assert asker.end(curl)[1] == "200"

    text = asker.product.machine.read(asker.product.ask("agent", "show", asker.agent)["file"])
    assert f'host = "{asker.host}"' in text and 'path = "/pub/x"' in text
    assert asker.end(asker.curl("/pub/x/below?z"))[1] == "200"
    assert not asker.pending()
    assert asker.tested(f"http://{asker.host}/pub")["reason"] == "ask"
    curl = asker.curl("/pub")
    asker.say("deny", asker.waiting(), "--always")
    assert asker.end(curl)[1] == "403"
    assert asker.end(asker.curl("/other"))[1] == "403"
    assert asker.end(asker.curl("/pub/x"))[1] == "200"  # the rule that was there first


def test_for_a_while_ends(asker: Asker) -> None:
    machine = asker.product.machine
    curl = asker.curl()
    asker.say("allow", asker.waiting(), "--for", "1h")
    assert asker.end(curl)[1] == "200"
    machine.systemctl("restart", "nanoclaw.service", "nanoclaw-gateway.service")
    machine.wait_for(lambda: asker.end(asker.curl())[1] == "200", within_s=30)
    assert asker.tested(f"http://{asker.host}/x")["allowed"]

    other = Asker(asker.product, asker.agent, next(_hosts))
    curl = other.curl()
    other.say("allow", other.waiting(), "--for", "2s")
    assert other.end(curl)[1] == "200"
    machine.wait_for(lambda: other.tested(f"http://{other.host}/x")["reason"] == "ask", within_s=30)
    other.curl()
    other.waiting()
    other.running.close()


def test_approval_of_one_agent_is_none_of_another(asker: Asker, agents: tuple[Product, str, str]) -> None:
    curl = asker.curl()
    asker.say("allow", asker.waiting(), "--for", "1h")
    assert asker.end(curl)[1] == "200"

    asker.curl(agent=agents[2])

    asker.product.machine.wait_for(lambda: asker.pending(agents[2]), within_s=30)


def test_flood_is_bounded_and_others_are_heard(asker: Asker, agents: tuple[Product, str, str]) -> None:
    curl_one = "curl -s -o /dev/null -m 60 -w '%{http_code}\\n' http://11.0.1.$n/"
    script = f"for n in $(seq 100 130); do {curl_one} & done; wait"
    line = ("podman", "exec", asker.product.container(asker.agent), "sh", "-c", script)
    flood = asker.running.enter_context(asker.product.machine.popen(*line, stdout=subprocess.PIPE))
    asker.running.callback(flood.kill)
    asker.product.machine.wait_for(lambda: len(asker.pending()) == 8, within_s=30)

    curl = asker.curl("/x", agent=agents[2])
    ((other,),) = [asker.product.machine.wait_for(lambda: asker.pending(agents[2]), within_s=30)]
    asker.say("allow", other["id"])

    assert asker.end(curl)[1] == "200"
    assert len(asker.pending()) == 8
    for approval in asker.pending():
        asker.say("deny", approval["id"])
    statuses = flood.communicate(timeout=60)[0].split()
    # The session has 16 connections, of which 8 wait; others come as they end.
    assert len(statuses) == 31
    assert set(statuses) <= {"403", "429"} and "429" in statuses


def test_url_cannot_hide_anything(asker: Asker) -> None:
    asker.curl("/" + "a" * 7000 + "/end?%1b[2J%E2%80%AEx", "--globoff")
    id = asker.waiting()

    shown = asker.product.ctl("approval", "show", id).stdout
    assert "a" * 7000 + "/end?%1b[2J%E2%80%AEx" in shown
    assert "…" in asker.product.ctl("approval", "list").stdout  # a list says that it shortens
    asker.say("deny", id, "--once")
    curl = asker.curl("/x", "--data-binary", "\x1b[2Jhello\u202eolleh", "-H", "X-Mine: \x1b]0;x\x07")
    shown = asker.product.ctl("approval", "show", asker.waiting(), "--json").stdout
    assert "\x1b" not in shown and "\u202e" not in shown
    shown = asker.product.ctl("approval", "show", asker.waiting()).stdout
    assert "\x1b" not in shown and "\u202e" not in shown and "<U+202E>" in shown
    asker.say("deny", asker.waiting(), "--once")
    asker.end(curl)


def test_what_nobody_is_asked_about(asker: Asker) -> None:
    asker.product.ctl("policy", "deny", asker.agent, f"http://{asker.host}/x")
    for url in ("http://10.0.0.1/", "http://169.254.169.254/", "http://11.0.0.1/", f"http://{asker.host}/x"):
        assert asker.end(asker.curl(url))[1] == "403"
    assert asker.end(asker.curl("/y", "--data-binary", "x" * 20_000))[1] == "413"
    assert not asker.pending()
