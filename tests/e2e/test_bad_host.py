"""A host that fails: a full disk, no subordinate uids, a lost database, a second router, no credential."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.machine import ROOT, NestedMachine
from tests.support.product import Product, unique_prefix

DATABASE = ".local/state/nanoclaw/nanoclaw.db"
REFUSING_API = """
import http.server

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        body = b'{"type":"error","error":{"type":"authentication_error","message":"invalid x-api-key"}}'
        self.send_response(401)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""
CALL = """
import socket, sys
with socket.socket(socket.AF_UNIX) as sock:
    sock.settimeout(20)
    sock.connect(sys.argv[1])
    sock.sendall(b'{"method":"io.nanoclaw.Control.Status"}\\0')
    print(sock.makefile().read())
"""


@pytest.fixture(scope="module")
def installed(store: str) -> Iterator[NestedMachine]:
    """A machine for these tests alone: what they do to it, no other test should meet."""
    machine = NestedMachine(f"bad-{os.getpid()}")
    machine.up("--project", str(ROOT), "--store", store)
    try:
        machine.run("./install.sh", "--yes", "--no-demo", "--no-image", cwd=machine.project, timeout_s=120)
        machine.check_journal()
        yield machine
    finally:
        machine.down()


@pytest.fixture
def host(installed: NestedMachine) -> Iterator[NestedMachine]:
    yield installed
    installed.check_journal()


@pytest.fixture
def product(host: NestedMachine) -> Iterator[Product]:
    product = Product(host, unique_prefix())
    yield product
    product.close()


@contextmanager
def full_disk(host: NestedMachine, directory: str) -> Iterator[None]:
    """Put a directory of the person on a disk of its own; it is full until the block ends."""
    path, disk = f"{host.home}/{directory}", "/run/full"
    as_root = (
        f"mkdir -p {disk} && mount -t tmpfs -o size=2M,uid=1000,gid=1000,mode=700 none {disk} && "
        f"cp -a {path}/. {disk}/ && mount --bind {disk} {path}"
    )
    host.systemctl("stop", "nanoclaw.service", "nanoclaw-*@*.service")
    host.sh(as_root, user="root")
    try:
        host.systemctl("start", "nanoclaw.service")
        host.sh(f"cat /dev/zero > {path}/ballast || true")
        yield
        host.run("rm", "-f", f"{path}/ballast")
    finally:
        host.systemctl("stop", "nanoclaw.service", "nanoclaw-*@*.service")
        host.sh(f"cp -a {path}/. /run/kept 2>/dev/null; umount {path}", user="root")
        host.sh(f"rm -f /run/kept/ballast; cp -a /run/kept/. {path}/; rm -r /run/kept", user="root")
        host.sh(f"umount {disk}", user="root")
        host.systemctl("start", "nanoclaw.service")


def test_a_full_disk_under_the_units_leaves_the_old_ones(product: Product, host: NestedMachine) -> None:
    agent = product.add()
    with full_disk(host, ".config/containers/systemd"):
        before = product.ask("agent", "show", agent)
        text = host.read(before["unitFile"])

        changed = product.ctl("agent", "set", agent, "--memory-max", "2G", check=False)
        added = product.ctl("agent", "add", f"{agent}x", check=False)

        directory = os.path.dirname(before["unitFile"])
        assert (changed.returncode, changed.stdout, changed.stderr) == (
            1,
            "",
            f"error: {before['unitFile']}: cannot be written: No space left on device\n"
            f"hint: make room: 'df -h {directory}' shows how much there is\n",
        )
        assert added.returncode == 1 and "No space left on device" in added.stderr
        assert product.ask("agent", "show", agent) == before
        assert host.read(before["unitFile"]) == text
        assert product.ctl("agent", "show", f"{agent}x", check=False).returncode == 4
        assert not host.exists(f"{host.home}/.config/nanoclaw/agents/{agent}x.toml")
        assert product.send(agent, "still there") == "still there"


def test_a_full_disk_under_the_configuration_leaves_the_old_one(
    product: Product, host: NestedMachine
) -> None:
    agent = product.add()
    with full_disk(host, ".config/nanoclaw"):
        before = product.ask("agent", "show", agent)

        changed = product.ctl("agent", "set", agent, "--memory-max", "2G", check=False)

        directory = os.path.dirname(before["file"])
        assert (changed.returncode, changed.stdout, changed.stderr) == (
            1,
            "",
            f"error: {before['file']}: cannot be written: No space left on device\n"
            f"hint: make room: 'df -h {directory}' shows how much there is\n",
        )
        assert product.ask("agent", "show", agent) == before
        assert product.send(agent, "still there") == "still there"
    product.ctl("agent", "set", agent, "--memory-max", "2G")
    assert product.ask("agent", "show", agent)["configuration"]["memoryMax"] == "2G"


def test_a_full_disk_under_the_database_is_told_and_loses_nothing(
    product: Product, host: NestedMachine
) -> None:
    agent = product.add()
    product.send(agent, "before")
    answered = product.status()["queue"]["answered"]
    with full_disk(host, ".local/state/nanoclaw"):
        pid = product.status()["pid"]

        waiting = product.ctl("send", agent, "hello", "--wait", check=False)
        stored = product.ctl("send", agent, "hello", check=False, timeout_s=60)

        for answer in (waiting, stored):
            assert (answer.returncode, answer.stdout) == (3, "")
            assert "error: the database cannot be written: database or disk is full\n" in answer.stderr
            assert "hint: is the disk full? see 'df -h ~'\n" in answer.stderr
        assert product.ask("agent", "show", agent)["runtime"]["state"] == "ready"
        assert product.status()["queue"]["answered"] == answered
        host.sh("rm ~/.local/state/nanoclaw/ballast")
        assert product.send(agent, "after") == "after"
        assert product.status()["pid"] == pid
    host.expect_journal("<3> database-write-failed: .*nothing of it was acknowledged")


def test_a_disk_that_is_full_at_the_start_is_told_until_there_is_room(
    product: Product, host: NestedMachine
) -> None:
    agent = product.add()
    with full_disk(host, ".local/state/nanoclaw"):
        host.systemctl("stop", "nanoclaw.service")
        host.sh("cat /dev/zero >> ~/.local/state/nanoclaw/ballast || true")  # the router's own room, too
        host.systemctl("start", "nanoclaw.service", check=False)

        answers = [
            product.ctl(*command, check=False, timeout_s=20)
            for command in (("status",), ("send", agent, "hello", "--wait"))
        ]
        host.sh("rm ~/.local/state/nanoclaw/ballast")

        for answer in answers:
            assert (answer.returncode, answer.stdout) == (3, "")
            assert "error: the router cannot start: the database '" in answer.stderr
            assert answer.stderr.endswith("hint: is the disk full? see 'df -h ~'\n")
        assert product.send(agent, "there is room") == "there is room"
    host.expect_journal("nanoclaw.service <[34]> ")


def test_missing_subordinate_uids_are_told_at_once(product: Product, host: NestedMachine) -> None:
    agent = product.add()
    product.send(agent, "hello")
    host.sh("cp -a /etc/subuid /etc/subgid /root/; sed -i /claw/d /etc/subuid /etc/subgid", user="root")
    try:
        product.ctl("agent", "stop", agent)
        product.ctl("agent", "start", agent)
        answer = product.ctl("send", agent, "hello", "--wait", check=False)
    finally:
        host.sh("cp -a /root/subuid /root/subgid /etc/", user="root")

    assert (answer.returncode, answer.stdout) == (
        1,
        "Your message could not be answered: /etc/subuid gives 'claw' no subordinate uids, or too few, "
        "for its container; run: sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 claw; "
        "podman system migrate\n",
    )
    assert product.send(agent, "repaired") == "repaired"
    host.expect_journal(f"nanoclaw-{agent}@.* <[34]> ")


def test_a_second_router_by_hand_says_who_starts_it(product: Product, host: NestedMachine) -> None:
    agent = product.add()
    program = f"{host.home}/.local/bin/nanoclawd"

    alone = host.run(program, check=False)
    create = host.run(program, "--create-database", check=False)

    assert (alone.returncode, alone.stdout, alone.stderr) == (
        78,
        "",
        "<3>exit: no sockets were passed in "
        "(nanoclawd is started by systemd: 'systemctl --user start nanoclaw')\n",
    )
    pid = product.status()["pid"]
    assert (create.returncode, create.stdout, create.stderr) == (
        1,
        "",
        f"error: another nanoclawd (pid {pid}) has the database '{host.home}/{DATABASE}'\n"
        "hint: stop it first: 'systemctl --user stop nanoclaw.service'\n",
    )
    assert product.send(agent, "still there") == "still there"


def test_a_second_router_with_sockets_of_its_own_tells_who_calls(
    product: Product, host: NestedMachine
) -> None:
    agent = product.add()
    activate = ("systemd-socket-activate", "-l", "/tmp/a", "-l", "/tmp/b", "--fdname=control:channel")
    with host.popen(*activate, f"{host.home}/.local/bin/nanoclawd", stderr=-1) as second:
        host.wait_for(lambda: host.exists("/tmp/b"), what="it listens")
        answer = host.run("python3", "-c", CALL, "/tmp/a").stdout
        assert second.wait(timeout=20) == 1

    reason = f"another nanoclawd (pid {product.status()['pid']}) has the database '{host.home}/{DATABASE}'"
    assert '"error":"io.nanoclaw.Control.Unavailable"' in answer
    assert f'"message":"the router cannot start: {reason}"' in answer
    assert product.send(agent, "still there") == "still there"


@pytest.mark.parametrize("command", [("status",), ("send", "x", "hello", "--wait")], ids=" ".join)
def test_a_socket_path_that_is_too_long_is_told_by_its_length(
    host: NestedMachine, command: tuple[str, ...]
) -> None:
    directory = "/tmp/" + 90 * "l"

    answer = host.run(
        f"{host.home}/.local/bin/nanoclawctl", *command, env={"XDG_RUNTIME_DIR": directory}, check=False
    )

    assert (answer.returncode, answer.stdout) == (1, "")
    assert f"error: the socket path '{directory}/nanoclaw/" in answer.stderr
    assert "' is longer than 107 bytes\n" in answer.stderr
    assert answer.stderr.endswith(
        "hint: set XDG_RUNTIME_DIR to a shorter directory; it is normally /run/user/UID\n"
    )


@pytest.mark.parametrize(
    ("damage", "what", "hint"),
    [
        (
            "mv {db} {db}.kept",
            "the database '{db}' is missing, though there are agents beside it",
            "put a backup in its place with 'nanoclawd --restore-database FILE', or accept the loss of all "
            "queued messages with 'nanoclawd --create-database'",
        ),
        (
            "cp {db} {db}.kept; echo garbage, and more of it than a header > {db}",
            "the database '{db}' cannot be opened: file is not a database",
            "'nanoclawd --salvage-database' takes what can be read of it, "
            "'nanoclawd --restore-database FILE' a backup in its place",
        ),
    ],
    ids=["missing", "damaged"],
)
def test_a_lost_database_is_told_and_never_made_anew(
    product: Product, host: NestedMachine, damage: str, what: str, hint: str
) -> None:
    agent = product.add()
    product.send(agent, "hello")
    database = f"{host.home}/{DATABASE}"
    host.systemctl("stop", "nanoclaw.service")
    host.sh(damage.format(db=database))

    answers = [
        product.ctl(*command, check=False, timeout_s=20)
        for command in (("status",), ("send", agent, "hello", "--wait"))
    ]
    host.sh(f"mv {database}.kept {database}")

    for answer in answers:
        assert (answer.returncode, answer.stdout, answer.stderr) == (
            3,
            "",
            f"error: the router cannot start: {what.format(db=database)}\nhint: {hint}\n",
        )
    assert product.send(agent, "it is back") == "it is back"
    assert product.status()["queue"]["answered"] >= 2
    host.expect_journal("nanoclaw.service <[34]> ")


def test_a_missing_credential_is_named_with_what_to_do(product: Product, host: NestedMachine) -> None:
    agent, other = product.add(provider="anthropic"), product.add("other")

    answer = product.ctl("send", agent, "hello", "--wait", check=False)

    assert answer.returncode == 1
    assert answer.stdout.count("\n") == 1
    assert answer.stdout.startswith("Your message could not be answered: ")
    assert "there is no credential 'anthropic' (run 'nanoclawctl secret set anthropic')" in answer.stdout
    assert len(product.events("message-dead", agent=agent)) == 1
    assert product.send(other, "still there") == "still there"
    host.expect_journal("<3> message-dead|nanoclaw-gateway.service <4> ")


def test_a_refused_credential_is_told_with_the_providers_words(
    product: Product, host: NestedMachine
) -> None:
    agent, other = product.add(provider="anthropic"), product.add("other")
    with host.popen("python3", "-c", REFUSING_API, stdout=-1, stderr=-3) as api:
        try:
            assert api.stdout is not None
            endpoint = f"http://127.0.0.1:{int(api.stdout.readline())}"
            product.write(
                f"{host.home}/.config/nanoclaw/nanoclaw.toml",
                f'[providers.anthropic]\nendpoint = "{endpoint}"\n',
            )
            product.ctl("secret", "set", "anthropic", input="sk-ant-wrong")
            host.systemctl("reload", "nanoclaw.service")

            answer = product.ctl("send", agent, "hello", "--wait", check=False)
        finally:
            api.terminate()
            product.ctl("secret", "remove", "anthropic", "--yes", check=False)

    assert (answer.returncode, answer.stdout) == (
        1,
        "Your message could not be answered: The model provider refuses the credential "
        "(authentication error, 401): invalid x-api-key (authentication)\n",
    )
    assert product.send(other, "still there") == "still there"
    host.expect_journal("<3> message-dead|nanoclaw-gateway.service <4> ")


def test_a_router_that_is_stopped_with_its_sockets_is_started_by_what_the_hint_says(
    product: Product, host: NestedMachine
) -> None:
    agent = product.add()
    host.systemctl("stop", "nanoclaw.socket", "nanoclaw-channel.socket", "nanoclaw.service")

    answers = {
        name: product.ctl(*command, check=False)
        for name, command in {"Control": ("status",), "Channel": ("send", agent, "hello")}.items()
    }

    for name, answer in answers.items():
        path = f"/run/user/1000/nanoclaw/{name.lower()}/io.nanoclaw.{name}"
        assert (answer.returncode, answer.stdout) == (3, "")
        assert answer.stderr.startswith(f"error: cannot connect to '{path}': ")
        assert "hint: try 'systemctl --user start nanoclaw', then 'nanoclawctl doctor'" in answer.stderr
    host.systemctl("start", "nanoclaw")
    assert product.send(agent, "it is back") == "it is back"
