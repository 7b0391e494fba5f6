"""Real tools in a real container, through the gateway, by policy: curl, git, pip, a tunnel, a route."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import pytest

from tests.support.machine import Machine
from tests.support.product import Product, unique_prefix
from tests.support.web_server import ADDRESS

PORT, TLS_PORT = 8381, 8382
WEB = f"http://{ADDRESS}:{PORT}"
UNIT = "web-server.service"
KEY = "ghp-canary-5e0b7b0e"
ROUTE = f'[[routes]]\nname = "garden"\nendpoint = "{WEB}/echo"\ncredential = "garden"\n'
#: A package index with one package in it. Usage: DIRECTORY
INDEX = """
import os, sys, zipfile
name = "thing-1.0-py3-none-any.whl"
os.makedirs(f"{sys.argv[1]}/simple/thing")
with open(f"{sys.argv[1]}/simple/thing/index.html", "w") as page:
    page.write(f'<a href="/files/{name}">{name}</a>')
os.makedirs(f"{sys.argv[1]}/files")
with zipfile.ZipFile(f"{sys.argv[1]}/files/{name}", "w") as wheel:
    wheel.writestr("thing.py", "GREETING = 'hello from the index'\\n")
    wheel.writestr("thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: thing\\nVersion: 1.0\\n")
    wheel.writestr("thing-1.0.dist-info/WHEEL",
                   "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
    wheel.writestr("thing-1.0.dist-info/RECORD", "thing.py,,\\nthing-1.0.dist-info/RECORD,,\\n")
"""

MAKE_REPOSITORY = """
git init -q garden
cd garden
echo roses > bed
git add bed
git -c user.name=a -c user.email=a@localhost commit -qm first
git clone -q --bare . ../garden.git
git -C ../garden.git update-server-info
"""
MAKE_CERTIFICATE = """
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=garden.test \
  -keyout /tmp/key -out /tmp/certificate 2> /dev/null
cat /tmp/key /tmp/certificate
"""


class Tools:
    """What an agent has at hand, and what a person says it may do with it."""

    def __init__(self, product: Product, agent: str) -> None:
        self.product, self.agent = product, agent

    def policy(self, verb: str, *arguments: str) -> None:
        self.product.ctl("policy", verb, self.agent, *arguments)

    def forget_policy(self) -> None:
        """Take all rules away, as a person does with an editor."""
        file = self.product.ask("agent", "show", self.agent)["file"]
        text = self.product.machine.read(file)
        self.product.machine.write(file, text.partition("[[policy]]")[0], mode="600")
        self.product.machine.systemctl("reload", "nanoclaw")

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.product.inside(self.agent, *command, check=check)

    def status(self, url: str, *options: str) -> str:
        """Return the status that curl gets."""
        return self.run(
            "curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", *options, url, check=False
        ).stdout

    def tested(self, url: str, method: str = "GET") -> tuple[bool, int | None]:
        """Return what `nanoclawctl policy test` says."""
        line = ("policy", "test", self.agent, url, "--method", method, "--json")
        found = json.loads(self.product.ctl(*line, check=False).stdout)
        return found["allowed"], found["rule"]


@pytest.fixture(scope="module")
def agent(_installed: Machine) -> Iterator[tuple[Product, str]]:
    """An agent with a running container, and a web server that only the machine itself reaches."""
    machine, product = _installed, Product(_installed, unique_prefix())
    name = product.add()
    product.write(f"{machine.home}/.config/nanoclaw/nanoclaw.toml", ROUTE)
    product.ctl("secret", "set", "garden", input=KEY)
    machine.systemctl("reload", "nanoclaw")
    product.send(name, "hello")
    served = f"{machine.home}/web/served"
    machine.run("mkdir", "-p", served)
    machine.run("python3", "-c", INDEX, served)
    # git over plain HTTP: files that "git update-server-info" has listed.
    product.inside(name, "sh", "-euc", MAKE_REPOSITORY)
    workspace = product.ask("agent", "show", name)["workspace"]
    machine.run("cp", "-r", f"{workspace}/garden.git", served)
    certificate = product.inside(name, "sh", "-euc", MAKE_CERTIFICATE).stdout
    machine.write(f"{machine.home}/web/key.pem", certificate)
    machine.run(
        *("systemd-run", "--user", "--quiet", "--collect", f"--unit={UNIT}", "--description=web"),
        f"--working-directory={machine.project}",
        *("python3", "-m", "tests.support.web_server", served, str(PORT), str(TLS_PORT)),
    )
    machine.wait_for(
        lambda: machine.run("bash", "-c", f": < /dev/tcp/{ADDRESS}/{TLS_PORT}", check=False).returncode == 0
    )
    yield product, name
    machine.systemctl("stop", UNIT)
    machine.run("rm", "-rf", f"{machine.home}/web")
    product.ctl("secret", "remove", "garden", "--yes")
    product.close()


@pytest.fixture
def tools(agent: tuple[Product, str], machine: Machine) -> Iterator[Tools]:
    """The agent's tools, with a policy that allows nothing."""
    tools = Tools(*agent)
    yield tools
    tools.forget_policy()


def test_without_a_rule_nothing_gets_out(tools: Tools) -> None:
    assert tools.status(f"{WEB}/echo") == "403"
    refused = tools.run("curl", "-sSk", f"https://{ADDRESS}:{TLS_PORT}/echo", check=False)
    assert "403" in refused.stderr
    # Not by leaving the proxy out either: there is nothing but loopback.
    assert tools.run("curl", "-sS", "--noproxy", "*", f"{WEB}/echo", check=False).returncode == 7
    assert tools.tested(f"{WEB}/echo") == (False, None)


def test_curl_gets_what_a_rule_allows_and_no_more(tools: Tools) -> None:
    tools.policy("allow", f"{WEB}/echo", "--method", "GET", "--max-up", "1K")

    assert json.loads(tools.run("curl", "-sS", f"{WEB}/echo/x?y=z").stdout)["path"] == "/echo/x?y=z"
    assert tools.tested(f"{WEB}/echo/x") == (True, 1)
    assert tools.status(f"{WEB}/files/") == "403"
    assert tools.status(f"{WEB}/echo/../files/", "--path-as-is") == "400"
    assert tools.status(f"{WEB}/echo", "--data", "x") == "403"
    assert tools.status(f"{WEB}/echo", "-H", "X: " + "x" * 2000) == "413"
    tunnel = tools.run("curl", "-sS", "--proxytunnel", f"{WEB}/echo", check=False)
    assert "403" in tunnel.stderr

    tools.policy("deny", f"{WEB}/echo", "--method", "GET")
    assert tools.status(f"{WEB}/echo") == "403"
    assert tools.tested(f"{WEB}/echo") == (False, 1)


def test_upload_ends_at_its_bytes(tools: Tools) -> None:
    tools.policy("allow", WEB, "--method", "POST", "--max-up", "1M")
    tools.run("sh", "-c", "head -c 2000000 /dev/zero > /tmp/large; head -c 900000 /dev/zero > /tmp/small")

    assert (
        json.loads(tools.run("curl", "-sS", "--data-binary", "@/tmp/small", f"{WEB}/x").stdout)["bytes"]
        == 900000
    )
    assert tools.status(f"{WEB}/x", "--data-binary", "@/tmp/large") == "413"
    assert (
        tools.status(f"{WEB}/x", "-H", "Transfer-Encoding: chunked", "--data-binary", "@/tmp/large") == "413"
    )


def test_curl_tunnels_through(tools: Tools) -> None:
    tools.policy("allow", f"{ADDRESS}:{TLS_PORT}")

    seen = json.loads(tools.run("curl", "-sSk", f"https://{ADDRESS}:{TLS_PORT}/echo").stdout)

    assert seen["path"] == "/echo"


def test_pip_installs_from_an_index(tools: Tools) -> None:
    tools.policy("allow", f"{WEB}/simple")
    pip = (
        "pip",
        "install",
        "--user",
        "--index-url",
        f"{WEB}/simple/",
        "--trusted-host",
        ADDRESS,
        "--retries=0",
    )

    assert tools.run(*pip, "thing", check=False).returncode != 0  # the file is elsewhere
    tools.policy("allow", f"{WEB}/files")
    tools.run(*pip, "thing")

    assert (
        tools.run("python3", "-c", "import thing; print(thing.GREETING)").stdout == "hello from the index\n"
    )


def test_git_clones(tools: Tools) -> None:
    assert "403" in tools.run("git", "clone", f"{WEB}/garden.git", "/tmp/denied", check=False).stderr
    tools.policy("allow", f"{WEB}/garden.git", "--method", "GET")

    tools.run("git", "clone", "-q", f"{WEB}/garden.git", "/tmp/garden")

    assert tools.run("cat", "/tmp/garden/bed").stdout == "roses\n"


def test_name_that_leads_to_this_host_needs_its_addresses_in_the_rule(tools: Tools) -> None:
    url, proxied = f"http://localhost:{PORT}/echo", ("--noproxy", "")
    tools.policy("allow", url)
    assert tools.status(url, *proxied) == "403"

    tools.policy("allow", url, "--address", "127.0.0.1", "--address", "::1")
    assert tools.status(url, *proxied) == "200"


def test_route_lends_its_credential_and_covers_it(tools: Tools) -> None:
    url = "http://127.0.0.1:3128/r/garden/x"
    assert tools.status(url) == "403"
    tools.policy("allow", "/r/garden/x", "--method", "GET")

    seen = tools.run("curl", "-sS", "-H", "Authorization: own", url).stdout

    assert json.loads(seen)["path"] == "/echo/x"
    assert json.loads(seen)["headers"]["authorization"] == "Bearer " + "*" * len(KEY)
    assert KEY not in seen
    assert tools.status(f"{WEB}/echo/x") == "403"  # not by its host's name


def test_policy_is_there_again_after_a_restart_of_the_gateway(tools: Tools, machine: Machine) -> None:
    tools.policy("allow", f"{WEB}/echo")

    machine.systemctl("restart", "nanoclaw-gateway")

    machine.wait_for(lambda: tools.status(f"{WEB}/echo") == "200")


def test_file_that_breaks_allows_nothing(tools: Tools, machine: Machine) -> None:
    tools.policy("allow", f"{WEB}/echo")
    file = tools.product.ask("agent", "show", tools.agent)["file"]
    text = machine.read(file)
    assert tools.status(f"{WEB}/echo") == "200"
    machine.expect_journal("agent-broken")

    machine.write(file, text + "nonsense = 1\n", mode="600")
    machine.systemctl("reload", "nanoclaw")
    machine.wait_for(lambda: tools.status(f"{WEB}/echo") == "403")

    machine.write(file, text, mode="600")
    machine.systemctl("reload", "nanoclaw")
    machine.wait_for(lambda: tools.status(f"{WEB}/echo") == "200")
