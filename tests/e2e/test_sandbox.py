"""Every line of the sandboxes, looked at from inside and from outside: what it forbids is tried."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.machine import ROOT, Machine
from tests.support.product import Product, unique_prefix

INSIDE = (ROOT / "tests/support/inside.py").read_text()
LISTEN = """
import socket, sys
tcp = socket.create_server(("127.0.0.1", 8079))
abstract = socket.socket(socket.AF_UNIX)
abstract.bind("\\0nanoclaw-test")
abstract.listen()
print("ready", flush=True)
sys.stdin.read()
"""
#: What a process of the agent may write; anything else is read-only for it.
WRITABLE = {"/dev/mqueue", "/session", "/tmp", "/workspace"}
SECRET = re.compile("KEY|TOKEN|SECRET|PASS|CREDENTIAL|ANTHROPIC|DBUS|XDG", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What was found in a running container."""

    agent: str
    report: dict[str, Any]  #: of tests/support/inside.py
    shown: dict[str, Any]  #: of `nanoclawctl agent show`


@pytest.fixture(scope="module")
def seen(_installed: Machine) -> Iterator[Seen]:
    """An agent whose container has run the probe, while the host listened to whatever it might reach."""
    product = Product(_installed, unique_prefix())
    agent = product.add("", "--memory-max", "321M", "--tasks-max", "77", "--cpu-quota", "40%")
    product.send(agent, "hello")
    with _installed.popen(
        "python3", "-c", LISTEN, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as listening:
        assert listening.stdin is not None and listening.stdout is not None
        assert listening.stdout.readline() == "ready\n"
        report = product.python_inside(agent, INSIDE)
        listening.stdin.close()
    yield Seen(agent=agent, report=report, shown=product.ask("agent", "show", agent))
    product.close()


# --- from inside an agent ------------------------------------------------------------------------------


def test_there_is_only_loopback(seen: Seen) -> None:
    assert seen.report["interfaces"] == ["lo"]
    assert [route for route in seen.report["routes"] if not route.endswith(" lo")] == []


def test_no_network_is_shared(seen: Seen, product: Product, machine: Machine) -> None:
    # Counting interfaces is not enough: a machine may have nothing but loopback itself.
    product.send(seen.agent, "hello")

    own, machines = (
        machine.sh(f"readlink /proc/{pid}/ns/net", user="root")
        for pid in (
            product.runner_pid(seen.agent),
            machine.unit("nanoclaw-gateway.service", "MainPID")["MainPID"],
        )
    )

    assert own != machines


def test_every_connect_fails_but_to_the_two_sockets(seen: Seen) -> None:
    worked = {name for name, outcome in seen.report["connects"].items() if outcome == "worked"}

    assert worked == {"host.sock", "gateway.sock"}


def test_no_socket_of_another_session_is_to_be_seen(seen: Seen) -> None:
    # Podman's own for READY=1; of the two that are ours, not even the directory can be listed.
    assert seen.report["sockets"] == ["/run/notify/notify.sock"]
    assert seen.report["tries"]["list the sockets"] == "EACCES"


@pytest.mark.parametrize(
    "attempt",
    ["unlink host.sock", "replace host.sock", "chmod gateway.sock", "bind beside the sockets"],
)
def test_the_sockets_cannot_be_changed(seen: Seen, attempt: str) -> None:
    assert seen.report["tries"][attempt] in ("EROFS", "EACCES", "EPERM", "EXDEV", "EBUSY")
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(seen.report["mounts"]["/run/nanoclaw"])


def test_all_is_read_only_but_what_is_the_agents(seen: Seen) -> None:
    outside = {
        path for path in seen.report["writable"] if not any(Path(path).is_relative_to(w) for w in WRITABLE)
    }

    # Character devices that everybody may write; found because they are writable files.
    assert outside == set()
    assert "ro" in seen.report["mounts"]["/"]
    made = {name: how for name, how in seen.report["tries"].items() if name.startswith("create in")}
    assert set(made.values()) <= {"EROFS", "EACCES"}, made


def test_tmp_workspace_and_session_take_no_setuid_and_no_devices(seen: Seen) -> None:
    mounts = seen.report["mounts"]

    assert mounts["/tmp"][0] == "tmpfs"
    for path in ("/tmp", "/workspace", "/session"):
        assert {"rw", "nosuid", "nodev"} <= set(mounts[path]), path


@pytest.mark.parametrize("process", ["first", "self"])
def test_processes_have_no_privilege(seen: Seen, process: str) -> None:
    status = seen.report[process]

    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert set(status["Uid"].split()) == {status["Uid"].split()[0]} - {"0", "1000"}


def test_no_socket_is_made_whose_close_takes_long(seen: Seen) -> None:
    assert seen.report["linger"] == ["ENOSYS", "ENOSYS"]
    # All others pass the filter, whatever the kernel says to them.
    assert set(seen.report["options"]) <= {"worked", "ENOTSUP"}


def test_there_is_no_setuid_program_and_no_device_that_matters(seen: Seen) -> None:
    assert seen.report["privileged"] == []
    harmless = {"null", "zero", "full", "random", "urandom", "tty", "pts/ptmx"}
    assert {path.removeprefix("/dev/") for path in seen.report["devices"]} <= harmless


def test_no_secret_is_in_the_environment(seen: Seen) -> None:
    assert [name for name in seen.report["environment"] if SECRET.search(name)] == []
    proxies = {f"{scheme}_proxy" for scheme in ("http", "https", "no")}  # the gateway, on loopback
    assert set(seen.report["environment"]) <= {
        *proxies,
        *(name.upper() for name in proxies),
        "PIP_BREAK_SYSTEM_PACKAGES",
        "PIP_NO_CACHE_DIR",
        "HOME",
        "HOSTNAME",
        "LANG",
        "NOTIFY_SOCKET",
        "PATH",
        "PYTHONDONTWRITEBYTECODE",
        "TZ",
        "container",
    }


def test_proc_shows_nothing_of_the_host(seen: Seen) -> None:
    assert set(seen.report["masked"].values()) <= {"", "ENOENT", "EACCES"}
    assert seen.report["firmware"] == []
    assert seen.report["pids"][0] == 1 and len(seen.report["pids"]) <= 4
    assert seen.report["hostname"] == seen.agent


def test_resource_limits_of_processes_are_set(seen: Seen) -> None:
    assert seen.report["limits"] == {"NOFILE": [4096, 4096], "CORE": [0, 0]}


# --- an agent, from the host ---------------------------------------------------------------------------


def test_each_agent_has_a_uid_of_its_own_that_is_not_the_persons(
    seen: Seen, product: Product, machine: Machine
) -> None:
    other = product.add()
    product.send(seen.agent, "hello")
    product.send(other, "hello")

    uids = {agent: host_uids(product, machine, agent) for agent in (seen.agent, other)}

    first, last = subordinate_ids(machine)
    for agent, uid in uids.items():
        assert len(uid) == 1 and first <= min(uid) <= last, uid
        assert {product.ask("agent", "show", agent)["runtime"]["hostUid"]} == uid
    assert uids[seen.agent].isdisjoint(uids[other])


def host_uids(product: Product, machine: Machine, agent: str) -> set[int]:
    """Return all four uids of the agent's first process, as the machine sees them."""
    status = machine.read(f"/proc/{product.runner_pid(agent)}/status")
    return {int(uid) for uid in re.findall(r"^Uid:\s+(.*)$", status, re.MULTILINE)[0].split()}


def subordinate_ids(machine: Machine) -> tuple[int, int]:
    name, start, count = machine.sh("grep ^$(id -un): /etc/subuid").split(":")
    assert name == machine.user
    return int(start), int(start) + int(count) - 1


def test_a_private_file_of_the_person_cannot_be_read_though_it_is_mounted(
    product: Product, machine: Machine
) -> None:
    share = f"{machine.home}/{unique_prefix()}"
    product.write(f"{share}/private", "private\n", mode="600")
    product.write(f"{share}/open", "open\n", mode="644")
    machine.run("chmod", "755", share)
    product.write(
        f"{machine.home}/.config/nanoclaw/nanoclaw.toml", f"[mounts]\nallow = [{{ path = '{share}' }}]\n"
    )
    machine.systemctl("reload", "nanoclaw")
    agent = product.add("", "--mount", f"{share}:/mnt/share")
    product.send(agent, "hello")

    read = product.inside(agent, "cat", "/mnt/share/open", "/mnt/share/private", check=False)
    wrote = product.inside(agent, "touch", "/mnt/share/new", check=False)

    assert read.stdout == "open\n" and "/mnt/share/private: Permission denied" in read.stderr
    assert "Read-only file system" in wrote.stderr
    machine.run("rm", "-r", share)


def test_what_an_agent_writes_stays_in_its_workspace_and_belongs_to_its_uid(
    seen: Seen, product: Product, machine: Machine
) -> None:
    product.send(seen.agent, "hello")
    product.inside(seen.agent, "sh", "-c", "echo mine > /workspace/file && chmod 600 /workspace/file")

    uid = machine.sh(f"stat -c %u {seen.shown['workspace']}/file")

    assert int(uid) == seen.shown["runtime"]["hostUid"]
    assert machine.run("cat", f"{seen.shown['workspace']}/file", check=False).returncode != 0


def test_processes_are_below_the_slice_of_agents(seen: Seen, product: Product, machine: Machine) -> None:
    product.send(seen.agent, "hello")
    unit = product.session(seen.agent)["unit"]

    cgroup = machine.read(f"/proc/{product.runner_pid(seen.agent)}/cgroup")

    assert f"/nanoclaw.slice/nanoclaw-agents.slice/{unit}/" in cgroup


def test_limits_of_the_agent_are_on_its_unit(seen: Seen, product: Product, machine: Machine) -> None:
    names = ("MemoryMax", "MemorySwapMax", "TasksMax", "CPUQuotaPerSecUSec", "OOMPolicy", "Slice")

    shown = machine.unit(product.session(seen.agent)["unit"], *names)

    assert shown == {
        "MemoryMax": str(321 << 20),
        "MemorySwapMax": "0",
        "TasksMax": "77",
        "CPUQuotaPerSecUSec": "400ms",
        "OOMPolicy": "stop",
        "Slice": "nanoclaw-agents.slice",
    }


def test_a_drop_in_of_the_person_is_honoured_and_left_alone(product: Product, machine: Machine) -> None:
    agent = product.add()
    directory = product.ask("agent", "show", agent)["dropInDirectory"]
    text = "[Container]\nEnvironment=MINE=yes\n\n[Service]\nMemoryMax=99M\n"
    product.write(f"{directory}/50-local.conf", text)
    machine.systemctl("daemon-reload")

    product.send(agent, "hello")
    product.ctl("agent", "set", agent, "--description", "new", "--tasks-max", "55")

    assert product.inside(agent, "printenv", "MINE").stdout == "yes\n"
    unit = machine.unit(f"nanoclaw-{agent}@s1.service", "MemoryMax", "TasksMax")
    assert unit == {"MemoryMax": str(99 << 20), "TasksMax": "55"}
    assert machine.read(f"{directory}/50-local.conf") == text
    machine.run("rm", "-r", directory)


# --- the programs on the host --------------------------------------------------------------------------


def test_no_process_of_ours_listens_on_the_network(seen: Seen, product: Product, machine: Machine) -> None:
    product.send(seen.agent, "hello")

    found = json.loads(machine.run("python3", "-c", LISTENERS, user="root").stdout)

    assert {"nanoclawd", "nanoclaw-gateway", "nanoclaw-runner"} <= set(found["programs"]), found
    # The runner's loopback is its container's, which has no other interface.
    assert {(local, inside) for _, _, local, inside in found["sockets"]} == {("0100007F:0C38", True)}


#: Finds the sockets of processes below nanoclaw.slice in the tables of their own network namespaces.
LISTENERS = r"""
import glob, json, os, re
programs, sockets = [], []
for path in glob.glob("/sys/fs/cgroup/**/nanoclaw.slice/**/cgroup.procs", recursive=True):
    for pid in open(path).read().split():
        try:
            programs += [os.path.basename(part) for part in open(f"/proc/{pid}/cmdline").read().split("\0")]
            inodes = {m[1] for fd in os.listdir(f"/proc/{pid}/fd")
                      if (m := re.match(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{fd}")))}
            for table in ("tcp", "tcp6", "udp", "udp6", "udplite", "raw", "raw6"):
                for line in open(f"/proc/{pid}/net/{table}").read().splitlines()[1:]:
                    fields = line.split()
                    if fields[9] in inodes and (not table.startswith("tcp") or fields[3] == "0A"):
                        inside = os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/1/ns/net")
                        sockets.append([pid, table, fields[1], inside])
        except FileNotFoundError:
            continue  # it ended while we looked, or the kernel has no such table
print(json.dumps({"programs": programs, "sockets": sockets}))
"""


def test_the_router_has_a_network_of_its_own_with_nothing_in_it(machine: Machine) -> None:
    pid = machine.unit("nanoclaw.service", "MainPID")["MainPID"]

    # man 5 proc: the counters of its namespace; one header of two lines.
    interfaces = [
        line.split(":")[0].strip() for line in machine.read(f"/proc/{pid}/net/dev").splitlines()[2:]
    ]

    assert interfaces == ["lo"]
    own, machines = (machine.sh(f"readlink /proc/{p}/ns/net", user="root") for p in (pid, "1"))
    assert own != machines


@pytest.mark.parametrize(
    "unit",
    # nanoclaw-podman.service is podman itself, once: any line would stop newuidmap(1).
    [
        path.name
        for path in sorted((ROOT / "units").glob("*.service"))
        if path.name != "nanoclaw-podman.service"
    ],
)
def test_exposure_of_host_units_stays_low(machine: Machine, unit: str) -> None:
    name = unit.replace("@.", "@test.")

    shown = machine.sh(f"systemd-analyze --user security --no-pager {name}")

    level = re.search(r"Overall exposure level for \S+: ([0-9.]+) ", shown)
    assert level is not None and float(level[1]) <= 2.0, shown


def test_every_sandbox_line_of_router_and_gateway_is_active(seen: Seen, product: Product) -> None:
    status = product.status()

    assert len(status["sandbox"]) >= 10 and len(status["gateway"]["sandbox"]) >= 10
    for check in (*status["sandbox"], *status["gateway"]["sandbox"]):
        assert check["active"], check
    assert any("internet" in check["name"] for check in status["sandbox"])
