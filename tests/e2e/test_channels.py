"""Channels of the installed product: an adapter in its unit, from its login to its removal."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.machine import ROOT, Machine
from tests.support.product import RUNTIME, Product

KIT = ROOT / "tests/channel-kit"
EXPOSURE_MAX = 2.0
#: An adapter that notes what it sees, and stays.
PROBE = """#!/usr/bin/python3
import json, os, pathlib, socket, time

def tried(what):
    try:
        return what() or "worked"
    except OSError as exc:
        return exc.strerror

def write(variable, *names):
    pathlib.Path(os.environ[variable], *names).write_text("x")

def connect(path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)

home, runtime = pathlib.Path.home(), pathlib.Path(os.environ["XDG_RUNTIME_DIR"])
seen = [str(path) for top in (home, runtime) for path in top.rglob("*") if not path.is_dir()]
report = {
    "seen": seen,
    "login": pathlib.Path(os.environ["CREDENTIALS_DIRECTORY"], "login").read_text(),
    "environment": sorted(os.environ),
    **{name: tried(lambda path=path: connect(path)) for name, path in json.loads(SOCKETS).items()},
    "write home": tried(lambda: (home / "x").write_text("x") and None),
    "write config": tried(lambda: write("NANOCLAW_CHANNEL_CONFIG")),
    "write state": tried(lambda: write("STATE_DIRECTORY", "x")),
    "inet": tried(lambda: socket.socket(socket.AF_INET).close()),
    "packet": tried(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()),
    "netlink": tried(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()),
}
new = pathlib.Path(os.environ["STATE_DIRECTORY"], "report.new")
new.write_text(json.dumps(report))
new.rename(new.with_suffix(".json"))
time.sleep(600)
"""


class Platform:
    """The kit's platform in the machine, driven as the kit does."""

    def __init__(self, machine: Machine) -> None:
        pipe = subprocess.PIPE
        self._process = machine.popen(
            "python3", f"{machine.project}/tests/channel-kit/example_driver.py", stdin=pipe, stdout=pipe
        )
        self.settings = [
            line.replace(" = ", "=").replace('"', "")
            for line in self.do("start")["config"].splitlines()
            if line.startswith(("host", "port", "user"))
        ]

    def do(self, what: str, **parameters: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": what, **parameters}) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def replies(self, chat: str) -> list[str]:
        messages = self.do("messages", chat=chat)["messages"]
        return [message["text"] for message in messages if message["sender"] == "@bot"]

    def stop(self) -> None:
        self._process.communicate()


@pytest.fixture
def platform(machine: Machine) -> Iterator[Platform]:
    platform = Platform(machine)
    yield platform
    platform.stop()


def install_adapter(product: Product, kind: str, program: str) -> None:
    directory = f"{product.home}/.local/share/nanoclaw/channels/{kind}"
    product.write(f"{directory}/adapter", program, mode="755")


def shown(product: Product, name: str) -> dict[str, Any]:
    channel: dict[str, Any] = product.ask("channel", "status", name)["channel"]
    return channel


def test_a_channel_from_its_login_to_its_removal(
    product: Product, machine: Machine, platform: Platform
) -> None:
    machine.expect_journal("<4> channel-(login|connecting)|nanoclaw.service <[34]> delivery-")
    machine.expect_journal("<4> nanoclaw(-channel@toy)?.service: (Main process exited|Failed)")
    agent, unit = product.add(), "nanoclaw-channel@toy.service"
    install_adapter(product, "example", (KIT / "example_adapter.py").read_text())

    unknown = product.ctl("channel", "add", "toy", "--kind", "nothing", check=False)
    product.ctl("channel", "add", "toy", "--kind", "example", *platform.settings)
    again = product.ctl("channel", "add", "toy", "--kind", "example", check=False)
    wrong = product.ctl("channel", "login", "toy", input="wrong", check=False)
    right = product.ctl("channel", "login", "toy", input="a token\n")

    assert (unknown.returncode, again.returncode, wrong.returncode) == (5, 5, 1)
    assert "there is no adapter of the kind 'nothing'" in unknown.stderr
    assert "the adapter of 'toy' cannot log in: the platform refuses the token" in wrong.stderr
    assert right.stderr == "Logged in as @bot.\n"
    channel = shown(product, "toy")
    assert (channel["health"], channel["attached"], channel["accounts"]) == ("connected", True, ["@bot"])
    assert channel["sandbox"] and all(check["active"] for check in channel["sandbox"]), channel["sandbox"]
    assert "connected" in product.ctl("channel", "list").stdout
    doctor = {check["name"]: check for check in product.ask("doctor", check=False)["checks"]}
    assert doctor["channel toy"]["state"] == doctor["channel toy sandbox"]["state"] == "ok"
    analysed = machine.run("systemd-analyze", "--user", "security", unit, "--no-pager", check=False).stdout
    print(analysed.splitlines()[-1])
    exposure = float(analysed.splitlines()[-1].partition(": ")[2].split()[0])
    assert exposure <= EXPOSURE_MAX, analysed

    # A conversation, in the middle of which the adapter and then the router die.
    chat = platform.do("invite")["chat"]
    number = machine.wait_for(
        lambda: next(
            (str(c["number"]) for c in product.ask("chat", "list")["chats"] if c["chat"] == chat), ""
        )
    )
    product.ctl("person", "link", "owner", "toy", "@ada")
    product.ctl("chat", "wire", number, agent, "--engage", "every")
    machine.wait_for(lambda: platform.do("membership", chat=chat)["membership"] == "joined")
    for text, victim in (("one", unit), ("two", "nanoclaw.service"), ("three", "")):
        platform.do("say", chat=chat, text=text)
        if victim:
            machine.systemctl("kill", "--signal=KILL", victim)
    machine.wait_for(lambda: len(platform.replies(chat)) == 3, within_s=60, what="three replies")
    assert platform.replies(chat) == ["one", "two", "three"]

    # What waits while the platform is away is given up with the channel.
    platform.do("fail", how="retryable")
    platform.do("say", chat=chat, text="four")
    machine.wait_for(lambda: shown(product, "toy")["lastError"] == "busy", within_s=60)
    assert shown(product, "toy")["waiting"] == 1
    removed = product.ctl("channel", "remove", "toy", "--yes", "--purge")
    assert removed.stderr == "Removed 'toy'.\n"
    assert product.ask("channel", "list") == {"channels": []}
    assert product.state(unit) == "inactive"
    assert all(
        chat["state"] == "blocked"
        for chat in product.ask("chat", "list")["chats"]
        if chat["channel"] == "toy"
    )
    assert "@ada" not in product.ctl("person", "list").stdout
    assert "channel-toy" not in product.ctl("secret", "list").stdout
    (letter,) = [each for each in product.ask("deadletter", "list")["deadLetters"] if each["agent"] == agent]
    assert letter["reason"] == "the channel 'toy' was removed"
    product.ctl("deadletter", "drop", letter["key"])
    for path in (f"{RUNTIME}/channels/toy", f"{product.home}/.local/state/nanoclaw/channels/toy"):
        assert not machine.exists(path)


def test_an_adapter_sees_what_is_its_own_and_nothing_else(product: Product, machine: Machine) -> None:
    """With an agent, another channel and another credential there."""
    home, agent = product.home, product.add()
    sockets = {
        "own socket": f"{RUNTIME}/channels/probe/io.nanoclaw.Channel",
        "other socket": f"{RUNTIME}/channels/other/io.nanoclaw.Channel",
        "terminal": f"{RUNTIME}/channel/io.nanoclaw.Channel",
        "control": f"{RUNTIME}/control/io.nanoclaw.Control",
        "gateway": f"{RUNTIME}/gateway/io.nanoclaw.Gateway",
        "bus": "/run/user/1000/bus",
        "system bus": "/run/dbus/system_bus_socket",
        "systemd": "/run/user/1000/systemd/private",
        "podman": "/run/user/1000/podman/podman.sock",
    }
    install_adapter(product, "probe", PROBE.replace("SOCKETS", repr(json.dumps(sockets))))
    for name in ("other", "probe"):
        product.ctl("secret", "set", f"channel-{name}", input=f"a token of {name}")
        product.ctl("channel", "add", name, "--kind", "probe")
    report = f"{home}/.local/state/nanoclaw/channels/probe/report.json"
    machine.wait_for(lambda: machine.exists(report), within_s=30)
    found = json.loads(machine.run("cat", report).stdout)
    for name in ("probe", "other"):
        product.ctl("channel", "remove", name, "--yes", "--purge")

    assert found["login"] == "a token of probe"
    lib, own = f"{home}/.local/lib/nanoclaw/", "/channels/probe"
    strange = [
        path
        for path in found["seen"]
        if not path.startswith((lib, f"{home}/.local/bin/", f"{home}/.local/share/nanoclaw/channels/"))
        and own not in path
        and path
        not in (
            f"{home}/.config/nanoclaw/channels/probe.toml",
            f"{home}/.config/credstore.encrypted/nanoclaw.channel-probe",
            "/run/user/1000/nanoclaw-channel-probe/login",
        )
    ]
    assert strange == []
    assert found["own socket"] == "worked"
    assert {found[name] for name in sockets if name != "own socket"} <= {
        "No such file or directory",
        "Permission denied",
    }
    assert found["write state"] == found["inet"] == "worked"
    assert "worked" not in (found["write home"], found["write config"], found["packet"], found["netlink"])
    assert agent not in json.dumps(found)
