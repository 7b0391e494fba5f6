"""The interfaces, as systemd's varlinkctl and as hostile clients see them."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.machine import ROOT, Machine
from tests.support.product import CHANNEL, CONTROL, GATEWAY, Json, Product, unique_prefix

SOCKETS = {
    "io.nanoclaw.Control": CONTROL,
    "io.nanoclaw.Channel": CHANNEL,
    "io.nanoclaw.Gateway": GATEWAY,
}
FILES = sorted((ROOT / "nanoclawd/interfaces").glob("*.varlink"))
HOST_SOCK = "/run/nanoclaw/host.sock"  # in a container
GROWTH_KB = 8 << 10  #: what the router may take for a message that is too long: a few times its limit


def varlinkctl(machine: Machine, *arguments: str) -> subprocess.CompletedProcess[str]:
    return machine.run("varlinkctl", *arguments, check=False)


def lines(text: str) -> list[str]:
    """Return the documents that varlinkctl printed: with --more each begins with RFC 7464's separator."""
    return text.replace("\x1e", "").splitlines()


def call(machine: Machine, method: str, parameters: Json, *options: str) -> list[Json]:
    """Return the parameters of all replies to a call that must succeed."""
    socket = SOCKETS[method.rpartition(".")[0]]
    done = varlinkctl(machine, "call", "--json=short", *options, socket, method, json.dumps(parameters))
    assert done.returncode == 0, done
    return [json.loads(line) for line in lines(done.stdout)]


def error_of(machine: Machine, method: str, parameters: Json, *options: str) -> tuple[str, Json]:
    """Return error and parameters of a call that must fail, as varlinkctl shows them; its status is 1."""
    socket = SOCKETS.get(method.rpartition(".")[0], CONTROL)
    done = varlinkctl(machine, "call", "--json=short", *options, socket, method, json.dumps(parameters))
    assert done.returncode == 1, done
    name = re.search(r"failed: (\S+)$", done.stderr, re.MULTILINE)
    assert name is not None, done
    return name[1], json.loads(lines(done.stderr + done.stdout)[-1])


# --- what varlinkctl shows -----------------------------------------------------------------------------


@pytest.mark.parametrize("interface", SOCKETS)
def test_services_describe_themselves(machine: Machine, interface: str) -> None:
    socket = SOCKETS[interface]

    info = varlinkctl(machine, "info", socket).stdout
    interfaces = varlinkctl(machine, "list-interfaces", socket).stdout.split()
    methods = varlinkctl(machine, "list-methods", socket, interface).stdout.split()
    shown = varlinkctl(machine, "introspect", socket, interface).stdout

    assert "Product: nanoclaw\n" in info
    assert interfaces == [interface, "org.varlink.service"]
    text = (ROOT / f"nanoclawd/interfaces/{interface}.varlink").read_text()
    assert methods == sorted(
        f"{interface}.{name}" for name in re.findall(r"^method (\w+)", text, re.MULTILINE)
    )
    # varlinkctl sets it anew; each comment is there all the same.
    shown = shown.replace("\t", "  ")
    assert [line for line in re.findall(r"^\s*# .*$", text, re.MULTILINE) if line not in shown] == []


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_systemd_takes_our_interface_files(machine: Machine, file: Path) -> None:
    done = varlinkctl(machine, "validate-idl", f"{machine.project}/nanoclawd/interfaces/{file.name}")

    assert (done.returncode, done.stderr) == (0, "")


def test_a_call_is_answered(product: Product, machine: Machine) -> None:
    agent = product.add()

    (reply,) = call(machine, "io.nanoclaw.Control.ShowAgent", {"name": agent})

    assert (reply["configuration"]["name"], reply["runtime"]["state"]) == (agent, "ready")


def test_more_streams_a_reply_an_agent(product: Product, machine: Machine) -> None:
    agents = {product.add("a"), product.add("b")}

    replies = call(machine, "io.nanoclaw.Control.ListAgents", {}, "--more")

    assert agents <= {reply["name"] for reply in replies}


def test_a_person_can_do_without_nanoclawctl(product: Product, machine: Machine) -> None:
    agent = product.add()
    message = {
        "chat": agent,
        "thread": "",
        "event": "e1",
        "revision": 0,
        "sender": "me",
        "text": "hello",
        "agent": agent,
    }

    (first,) = call(machine, "io.nanoclaw.Channel.Deliver", message)
    (again,) = call(machine, "io.nanoclaw.Channel.Deliver", message)
    with machine.popen(
        "varlinkctl",
        "call",
        "--json=short",
        "--more",
        CHANNEL,
        "io.nanoclaw.Channel.Attach",
        json.dumps({"chat": agent}),
        stdout=subprocess.PIPE,
    ) as attached:
        assert attached.stdout is not None
        replies = (json.loads(*lines(line)) for line in attached.stdout)
        delivery = next(reply["delivery"] for reply in replies if reply.get("delivery"))
        attached.terminate()

    assert not first["duplicate"]
    assert again == {**first, "duplicate": True}
    assert (delivery["kind"], delivery["text"], delivery["inReplyTo"]) == ("reply", "hello", "e1")
    call(
        machine,
        "io.nanoclaw.Channel.ReportSent",
        {"key": delivery["key"], "receipt": "r1"},
    )


def test_what_the_handler_refuses_is_an_error_of_the_interface(product: Product, machine: Machine) -> None:
    name, parameters = error_of(machine, "io.nanoclaw.Control.ShowAgent", {"name": "nobody"})
    assert name == "io.nanoclaw.Control.NotFound"
    assert "nobody" in parameters["message"] and parameters["hint"]

    name, parameters = error_of(
        machine, "io.nanoclaw.Control.BuildImage", {"baseDirectory": "/nowhere"}, "--more"
    )
    assert name == "io.nanoclaw.Control.ConfigError"
    assert "/nowhere/base.tar" in parameters["message"]

    name, parameters = error_of(machine, "io.nanoclaw.Gateway.Attach", {"agent": "a", "session": "b"})
    assert name == "io.nanoclaw.Gateway.Refused"


@pytest.mark.parametrize(
    ("method", "parameters", "error", "says"),
    [
        ("io.nanoclaw.Control.Nothing", {}, "MethodNotFound", {"method": "io.nanoclaw.Control.Nothing"}),
        ("io.nanoclaw.Nothing.Status", {}, "InterfaceNotFound", {"interface": "io.nanoclaw.Nothing"}),
        ("io.nanoclaw.Control.ShowAgent", {}, "InvalidParameter", {"parameter": "name"}),
        ("io.nanoclaw.Control.ShowAgent", {"nam": "x"}, "InvalidParameter", {"parameter": "nam"}),
        ("io.nanoclaw.Control.ShowAgent", {"name": 3}, "InvalidParameter", {"parameter": "name"}),
        (
            "io.nanoclaw.Control.AddAgent",
            {"name": "x", "mounts": [{"source": "/a", "target": "/b", "readOnly": "no"}]},
            "InvalidParameter",
            {"parameter": "mounts[0].readOnly"},
        ),
        ("io.nanoclaw.Channel.Attach", {}, "ExpectedMore", {}),
        ("io.nanoclaw.Gateway.Status", {"more": 1}, "InvalidParameter", {"parameter": "more"}),
    ],
)
def test_what_breaks_the_contract_is_an_error_of_varlink(
    machine: Machine, method: str, parameters: Json, error: str, says: Json
) -> None:
    name, shown = error_of(machine, method, parameters)

    assert name == f"org.varlink.service.{error}"
    assert shown == says


# --- hostile clients -----------------------------------------------------------------------------------

#: Sends each kind of hostile bytes to the socket that the argument names; prints what came back.
HOSTILE = r"""
import json, socket, sys
def send(pieces):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(sys.argv[1])
    sent, answer = 0, b""
    try:
        for piece in pieces:
            sock.sendall(piece)
            sent += len(piece)
        sock.shutdown(socket.SHUT_WR)
    except (BrokenPipeError, ConnectionResetError):
        pass
    try:
        while data := sock.recv(65536):
            answer += data
    except ConnectionResetError:
        pass
    sock.close()
    return {"sent": sent, "errors": [json.loads(part).get("error") for part in answer.split(b"\0") if part]}
begin = b'{"method":"org.varlink.service.GetInfo","parameters":'
print(json.dumps({kind: send(pieces) for kind, pieces in {
    "100 MB": (b"x" * (1 << 20) for _ in range(100)),
    "100 MB in a string": (p for p in [b'{"method":"', *[b"y" * (1 << 20)] * 100]),
    "no UTF-8": [b'{"method":"\xff\xfe"}\0'],
    "no JSON": [b"GET / HTTP/1.1\r\n\r\n\0"],
    "too deep": [begin + b"[" * 100000 + b"]" * 100000 + b"}\0"],
    "no object": [b"[]\0"],
    "empty": [b"\0"],
    "no method": [b"{}\0"],
    "a number too large": [begin + b"9" * 5000 + b"}\0"],
}.items()}))
"""


@pytest.fixture(scope="module")
def agent(_installed: Machine) -> Iterator[str]:
    """An agent of all hostile tests, with a container that runs."""
    product = Product(_installed, unique_prefix())
    yield product.add()
    product.close()


def resident_kb(machine: Machine, unit: str, field: str) -> int:
    """Return VmRSS or VmHWM, the largest so far, of a service's process."""
    status = machine.read(f"/proc/{machine.unit(unit, 'MainPID')['MainPID']}/status", user="root")
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize("interface", [*SOCKETS, "io.nanoclaw.Agent"])
def test_hostile_bytes_are_refused_in_bounded_memory(
    product: Product, machine: Machine, agent: str, interface: str
) -> None:
    machine.expect_journal(r"malformed-call: .*hanging up")
    assert product.send(agent, "before") == "before"
    container = machine.sh(f"podman ps --quiet --no-trunc --filter name={agent}")
    services = ("nanoclaw.service", "nanoclaw-gateway.service")
    pids = [machine.unit(unit, "MainPID") for unit in services]
    # man 5 proc: the peak begins anew.
    for pid in pids:
        machine.sh(f"echo 5 > /proc/{pid['MainPID']}/clear_refs", user="root")
    before = [resident_kb(machine, unit, "VmRSS") for unit in services]

    if interface == "io.nanoclaw.Agent":
        results = product.python_inside(agent, HOSTILE, HOST_SOCK)
    else:
        results = json.loads(machine.run("python3", "-c", HOSTILE, SOCKETS[interface]).stdout)

    for kind, result in results.items():
        assert result["errors"] == ["org.varlink.service.InvalidParameter"], kind
        assert result["sent"] <= 4 << 20, kind  # what is too long was cut off, not read to its end
    for unit, kb in zip(services, before, strict=True):
        assert resident_kb(machine, unit, "VmHWM") - kb <= GROWTH_KB, unit
    assert [machine.unit(unit, "MainPID") for unit in services] == pids
    assert product.send(agent, "after") == "after"
    assert machine.sh(f"podman ps --quiet --no-trunc --filter name={agent}") == container


def test_silent_clients_do_not_keep_others_out(product: Product, machine: Machine, agent: str) -> None:
    script = (
        "import socket, sys\n"
        "held = []\n"
        "for path in sys.argv[1:]:\n"
        "    for _ in range(40):\n"
        "        held.append(socket.socket(socket.AF_UNIX)); held[-1].connect(path)\n"
        "        held[-1].send(b'{')\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with machine.popen(
        "python3", "-c", script, CONTROL, CHANNEL, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holding:
        assert holding.stdin is not None and holding.stdout is not None
        assert holding.stdout.readline() == "ready\n"

        assert product.send(agent, "hello") == "hello"

        holding.stdin.close()


def test_an_agent_cannot_use_up_the_connections_of_others(
    product: Product, machine: Machine, agent: str
) -> None:
    product.send(agent, "hello")
    script = (
        "import socket\n"
        "held = [socket.socket(socket.AF_UNIX) for _ in range(100)]\n"
        f"for sock in held: sock.connect({HOST_SOCK!r})\n"
        "print('[]', flush=True)\n"
    )
    other = product.add()

    product.python_inside(agent, script)

    assert product.send(other, "hello") == "hello"
    assert product.send(agent, "hello") == "hello"
