"""Real tools in a real container, through the gateway, by policy: curl, git, pip, npm, a tunnel, a route."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.machine import Machine, NestedMachine
from tests.support.product import Product, unique_prefix
from tests.support.web_server import ADDRESS, LOGIN

PORT, TLS_PORT = 8381, 8382
WEB = f"http://{ADDRESS}:{PORT}"
SERVER = "web-server"
KEY = "ghp-canary-5e0b7b0e"
ROUTES = f"""
[[routes]]
name = "garden"
endpoint = "{WEB}/echo"
credential = "garden"

[[routes]]
name = "git"
endpoint = "{WEB}/private"
credential = "git"
scheme = "basic"
methods = ["GET", "POST"]
"""
BY_ROUTE = "http://127.0.0.1:3128/r/git/garden.git"
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
git -C ../garden.git config http.receivepack true
"""
#: More than git sends at once: it then asks first whether it may, and sends in chunks.
COMMIT = """
cd "$1"
head -c 3000000 /dev/urandom > "$2"
git add "$2"
git -c user.name=a -c user.email=a@localhost commit -qm "$2"
"""
#: A registry with one package in it, which npm has packed itself. Usage: DIRECTORY URL
REGISTRY = """
import base64, hashlib, json, os, sys
directory, url = sys.argv[1:]
data = open(f"{directory}/files/thing-1.0.0.tgz", "rb").read()
integrity = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
version = {"name": "thing", "version": "1.0.0",
           "dist": {"tarball": f"{url}/files/thing-1.0.0.tgz", "integrity": integrity}}
os.makedirs(f"{directory}/npm")
with open(f"{directory}/npm/thing", "w") as file:
    json.dump({"name": "thing", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}}, file)
"""
#: A name server. moving.test leads to 127.0.0.2 once, then elsewhere; both.test to two addresses at once.
NAME_SERVER = """
import socket, struct
asked = {}
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
    server.bind(("127.0.0.54", 53))
    while True:
        query, client = server.recvfrom(512)
        end = query.index(b"\\0", 12) + 1
        name, kind = query[12:end], query[end:end + 2]
        found = []
        if kind == b"\\0\\1":
            asked[name] = asked.get(name, 0) + 1
            found = [2, 3] if name.startswith(b"\\4both") else [2] if asked[name] == 1 else [3]
        record = b"\\xc0\\x0c" + struct.pack(">HHIH", 1, 1, 0, 4)
        answers = b"".join(record + bytes([127, 0, 0, last]) for last in found)
        head = query[:2] + struct.pack(">5H", 0x8180, 1, len(found), 0, 0)
        server.sendto(head + query[12:end + 4] + answers, client)
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

    def run(self, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.product.inside(self.agent, *command, **options)

    def commits(self) -> str:
        """Return what git's server has."""
        machine = self.product.machine
        return machine.run(
            "podman", "exec", SERVER, "git", "-C", "/web/git/garden.git", "log", "--format=%s"
        ).stdout

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
    product.write(f"{machine.home}/.config/nanoclaw/nanoclaw.toml", ROUTES)
    product.ctl("secret", "set", "garden", input=KEY)
    product.ctl("secret", "set", "git", input=LOGIN)
    machine.systemctl("reload", "nanoclaw")
    product.send(name, "hello")
    served = f"{machine.home}/web/served"
    machine.run("mkdir", "-p", served, f"{machine.home}/web/git")
    machine.run("python3", "-c", INDEX, served)
    product.inside(name, "sh", "-euc", MAKE_REPOSITORY)
    workspace = product.ask("agent", "show", name)["workspace"]
    machine.run("cp", "-r", f"{workspace}/garden.git", f"{machine.home}/web/git")
    certificate = product.inside(name, "sh", "-euc", MAKE_CERTIFICATE).stdout
    machine.write(f"{machine.home}/web/key.pem", certificate)
    image = product.ask("agent", "show", name)["configuration"]["image"]
    machine.run(
        *("podman", "run", "--detach", f"--name={SERVER}", "--network=host", "--entrypoint=python3"),
        *(
            f"--volume={machine.project}:/project:ro",
            f"--volume={machine.home}/web:/web",
            "--workdir=/project",
        ),
        # The image has git.
        *("--user=0", image, "-m", "tests.support.web_server", "/web/served", str(PORT), str(TLS_PORT)),
    )
    machine.wait_for(
        lambda: machine.run("bash", "-c", f": < /dev/tcp/{ADDRESS}/{TLS_PORT}", check=False).returncode == 0
    )
    yield product, name
    machine.run("podman", "rm", "--force", "--time=0", SERVER)
    machine.run("rm", "-rf", f"{machine.home}/web")
    for secret in ("garden", "git"):
        product.ctl("secret", "remove", secret, "--yes")
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


def test_git_fetches_and_may_not_push(tools: Tools) -> None:
    url = f"{WEB}/git/garden.git"
    assert "403" in tools.run("git", "clone", url, "/tmp/denied", check=False).stderr
    tools.policy("allow", url, "--method", "GET")
    assert "403" in tools.run("git", "clone", url, "/tmp/denied", check=False).stderr  # it posts what it has
    tools.policy("allow", f"{url}/git-upload-pack", "--method", "POST")

    tools.run("git", "clone", "-q", url, "/tmp/plain")
    tools.run("sh", "-euc", COMMIT, "sh", "/tmp/plain", "tulips")
    pushed = tools.run("git", "-C", "/tmp/plain", "push", check=False)

    assert tools.run("cat", "/tmp/plain/bed").stdout == "roses\n"
    assert pushed.returncode != 0 and "403" in pushed.stderr
    assert "tulips" not in tools.commits()

    tools.policy("allow", f"{url}/git-receive-pack", "--method", "POST")
    tools.run("git", "-C", "/tmp/plain", "push")
    assert "tulips" in tools.commits()


def test_git_fetches_and_pushes_through_a_tunnel(tools: Tools) -> None:
    git, url = ("git", "-c", "http.sslVerify=false"), f"https://{ADDRESS}:{TLS_PORT}/git/garden.git"
    assert "403" in tools.run(*git, "clone", url, "/tmp/denied", check=False).stderr
    tools.policy("allow", f"{ADDRESS}:{TLS_PORT}")

    tools.run(*git, "clone", "-q", url, "/tmp/secure")
    tools.run("sh", "-euc", COMMIT, "sh", "/tmp/secure", "lilies")
    tools.run(*git, "-C", "/tmp/secure", "push")

    assert "lilies" in tools.commits()


def test_git_works_through_a_route_that_has_the_login(tools: Tools) -> None:
    tools.policy("allow", "/r/git/garden.git", "--method", "GET")
    tools.policy("allow", "/r/git/garden.git/git-upload-pack", "--method", "POST")

    tools.run("git", "clone", "-q", BY_ROUTE, "/tmp/routed")
    tools.run("sh", "-euc", COMMIT, "sh", "/tmp/routed", "daisies")
    pushed = tools.run("git", "-C", "/tmp/routed", "push", check=False)
    assert pushed.returncode != 0 and "403" in pushed.stderr

    tools.policy("allow", "/r/git/garden.git/git-receive-pack", "--method", "POST")
    traced = tools.run("env", "GIT_CURL_VERBOSE=1", "git", "-C", "/tmp/routed", "push")
    assert "daisies" in tools.commits()
    assert LOGIN not in traced.stderr and "authorization:" not in traced.stderr.lower()


def test_npm_installs_from_a_registry(tools: Tools) -> None:
    bring_npm(tools)
    npm = ("/workspace/npm/bin/node", "/workspace/npm/lib/npm-cli.js", f"--registry={WEB}/npm/")
    tools.run("mkdir", "-p", "/tmp/thing", "/tmp/user")
    tools.run("sh", "-c", "cat > /tmp/thing/package.json", input='{"name": "thing", "version": "1.0.0"}')
    tools.run("sh", "-c", "cat > /tmp/thing/index.js", input='module.exports = "hello from the registry"')
    tools.run("sh", "-c", 'cd /tmp/thing && "$@"', "sh", *npm, "pack", "--pack-destination=/workspace")
    workspace = tools.product.ask("agent", "show", tools.agent)["workspace"]
    served = f"{tools.product.home}/web/served"
    machine = tools.product.machine
    machine.run("cp", f"{workspace}/thing-1.0.0.tgz", f"{served}/files/")
    machine.run("python3", "-c", REGISTRY, served, WEB)
    fresh = ("--cache=/tmp/npm",)  # its own has what was packed
    install = (
        "sh",
        "-c",
        'cd /tmp/user && "$@"',
        "sh",
        *npm,
        "install",
        "--fetch-retries=0",
        *fresh,
        "thing",
    )

    tools.policy("allow", f"{WEB}/npm", "--method", "GET")
    assert "403" in tools.run(*install, check=False).stderr  # the file is elsewhere
    tools.policy("allow", f"{WEB}/files", "--method", "GET")
    tools.run(*install)

    shown = tools.run("/workspace/npm/bin/node", "-p", 'require("/tmp/user/node_modules/thing")')
    assert shown.stdout == "hello from the registry\n"


def bring_npm(tools: Tools) -> None:
    """Put this machine's npm into the workspace: Node.js is larger than the whole image of agents."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        pytest.skip("needs npm")
    cli = Path(npm).resolve()
    with tempfile.TemporaryFile() as packed:
        with tarfile.open(fileobj=packed, mode="w") as archive:
            archive.add(Path(node).resolve(), "npm/bin/node")
            archive.add(cli.parent.parent, "npm/package")
        packed.seek(0)
        line = ("podman", "exec", "-i", tools.product.container(tools.agent), "tar", "-xC", "/workspace")
        assert tools.product.machine.popen(*line, stdin=packed).wait(60) == 0
    tools.run("ln", "-s", "package/bin", "/workspace/npm/lib")
    if tools.run(
        "/workspace/npm/bin/node", "/workspace/npm/lib/npm-cli.js", "--version", check=False
    ).returncode:
        pytest.skip("this machine's npm needs more than its own directory")


def test_name_that_leads_to_this_host_needs_its_addresses_in_the_rule(tools: Tools) -> None:
    url, proxied = f"http://localhost:{PORT}/echo", ("--noproxy", "")
    tools.policy("allow", url)
    assert tools.status(url, *proxied) == "403"

    tools.policy("allow", url, "--address", "127.0.0.1", "--address", "::1")
    assert tools.status(url, *proxied) == "200"


@pytest.fixture
def names(machine: Machine) -> Iterator[None]:
    """A name server that changes its mind."""
    if not isinstance(machine, NestedMachine):
        pytest.skip("needs root, for a name server")
    before = machine.read("/etc/resolv.conf")
    machine.run(
        *("systemd-run", "--quiet", "--collect", "--unit=names", "python3", "-c", NAME_SERVER), user="root"
    )
    machine.write("/etc/resolv.conf", "nameserver 127.0.0.54\n", user="root")
    machine.wait_for(lambda: "127.0.0.2" in machine.run("getent", "ahosts", "both.test", check=False).stdout)
    yield
    machine.write("/etc/resolv.conf", before, user="root")
    machine.run("systemctl", "stop", "names", user="root")


@pytest.mark.usefixtures("names")
def test_name_that_is_rebound_leads_nowhere_else(tools: Tools) -> None:
    for name in ("moving.test", "both.test"):
        tools.policy("allow", f"http://{name}:{PORT}/echo", "--address", ADDRESS)

    # Looked up once: a second time would lead elsewhere.
    assert tools.status(f"http://moving.test:{PORT}/echo") == "200"
    assert tools.status(f"http://moving.test:{PORT}/echo") == "403"
    assert tools.status(f"http://both.test:{PORT}/echo") == "403"


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
