"""The sandbox of a session, line by line, as a program inside of it and the person outside meet it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.machine import ROOT, Machine

UNIT = "nanoclaw-probe@s1.service"
STATE = ".local/state/nanoclaw/agents/probe"
UNITS = "$HOME/.config/containers/systemd"
RUNTIME = "/run/user/1000/nanoclaw/agents/probe/s1"
INSTALL = """
import asyncio
from pathlib import Path
from nanoclawd import paths, quadlet
from nanoclawd.agents import parse_agent
from nanoclawd.mounts import BindMount

config = parse_agent('memory_max = "300M"\\ntasks_max = 64\\ncpu_quota = "80%"', Path("probe.toml"))
shown = BindMount(source=Path.home() / "what is shown", target="/mnt/shown", read_only=True)
spec = quadlet.UnitSpec(config=config, index=7, mounts=(shown,))
print(asyncio.run(quadlet.install_units([spec])))
"""
LISTEN = """
import json, os, socket, struct, sys
with socket.socket(socket.AF_UNIX) as abstract, socket.socket(socket.AF_UNIX) as sock:
    abstract.bind("\\0nanoclaw-test")
    abstract.listen()
    sock.bind(sys.argv[1])
    os.chmod(sys.argv[1], 0o666)
    sock.listen()
    print("listening", flush=True)
    peer, _ = sock.accept()
    _, uid, gid = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    print(json.dumps([uid, gid]), flush=True)
"""
# The person's own drop-in: the probe in place of the runner.
DROP_IN = "[Container]\nEntrypoint=/usr/bin/python3\nExec=/workspace/probe.py\n"

_seen: dict[str, Any] = {}


@pytest.fixture
def seen(machine: Machine) -> dict[str, Any]:
    """Return what the probe saw, and what was seen of it; one container for all tests here."""
    if not _seen:
        _seen.update(observe(machine))
    return _seen


def observe(machine: Machine) -> dict[str, Any]:
    config = f"{UNITS}/nanoclaw-probe@.container.d"
    shown = f"'{machine.home}/what is shown'"
    machine.sh(
        f"mkdir -p ~/{STATE}/workspace ~/{STATE}/sessions/s1 {RUNTIME} {shown} && "
        f"chmod 2770 ~/{STATE}/workspace ~/{STATE}/sessions/s1 && chmod 711 {RUNTIME} && "
        f"echo secret > ~/{STATE}/workspace/private && chmod 600 ~/{STATE}/workspace/private && "
        f"echo shown > {shown}/file"
    )
    machine.write(
        f"{machine.home}/{STATE}/workspace/probe.py", (ROOT / "tests/support/sandbox_probe.py").read_text()
    )
    machine.sh(f"mkdir -p {config} && printf %s '{DROP_IN}' > {config}/50-local.conf")
    assert machine.run("python3", "-c", INSTALL, cwd=machine.project).stdout == "{'probe': None}\n"
    machine.systemctl("daemon-reload")
    with machine.popen("python3", "-c", LISTEN, f"{RUNTIME}/host.sock", stdout=-1) as listener:
        assert listener.stdout is not None
        assert listener.stdout.readline() == "listening\n"
        try:
            machine.systemctl("start", UNIT, timeout_s=90)
            seen: dict[str, Any] = json.loads(machine.read(f"{machine.home}/{STATE}/sessions/s1/facts.json"))
            seen["peer"] = json.loads(listener.stdout.readline())
            seen["unit"] = machine.unit(
                UNIT, "ControlGroup", "TasksMax", "MemoryMax", "CPUQuotaPerSecUSec", "ActiveState"
            )
            seen["file"] = machine.sh(f"stat -c '%u %g %a' ~/{STATE}/workspace/made-by-agent")
            seen["container"] = machine.sh("podman ps --format '{{.Names}}'")
            machine.systemctl("stop", "nanoclaw-agents.slice", timeout_s=60)
            seen["after the kill switch"] = machine.unit(UNIT, "ActiveState")["ActiveState"]
        finally:
            listener.terminate()
            machine.systemctl("stop", UNIT, timeout_s=60)
            machine.sh(f"rm -rf {config} {RUNTIME} {UNITS}/nanoclaw/?/nanoclaw-probe@.container")
            machine.sh(f"podman unshare rm -rf ~/{STATE} {shown}")
            machine.systemctl("daemon-reload")
            machine.systemctl("start", "nanoclaw-agents.slice")  # agents may run again
    return seen


def test_runs_as_a_uid_of_its_own_with_the_persons_group(seen: dict[str, Any]) -> None:
    assert seen["ids"] == [2007, 1000, [1000]]
    assert seen["peer"] == [102006, 1000]
    assert seen["file"] == "102006 1000 664"


def test_has_no_capability_no_new_privileges_and_a_filter(seen: dict[str, Any]) -> None:
    assert {key: seen["status"][key] for key in seen["status"] if key.startswith("Cap")} == dict.fromkeys(
        ("CapEff", "CapBnd", "CapPrm", "CapInh", "CapAmb"), "0" * 16
    )
    assert seen["status"]["NoNewPrivs"] == "1"
    assert seen["status"]["Seccomp"] == "2"


def test_makes_no_namespaces_and_no_mounts(seen: dict[str, Any]) -> None:
    assert (seen["unshare"], seen["mount"], seen["clone"]) == ("EPERM", "EPERM", "ENOSYS")
    assert (seen["thread"], seen["child"]) == (True, 0)


def test_has_no_network_but_its_sockets(seen: dict[str, Any]) -> None:
    assert seen["interfaces"] == ["lo"]
    assert seen["connect"] == {
        "internet": "ENETUNREACH",
        "internet6": "ENETUNREACH",
        "abstract": "ECONNREFUSED",
        "host.sock": "ok",
    }
    assert seen["unlink host.sock"] == "EROFS"
    assert {family for family, result in seen["families"].items() if result == "ok"} == {
        *("AF_UNIX", "AF_INET", "AF_INET6")
    }


def test_cannot_make_a_socket_whose_close_takes_long(seen: dict[str, Any]) -> None:
    assert seen["linger"] == ["ENOSYS", "ENOSYS"]
    # All others pass the filter, whatever the kernel says to them.
    assert set(seen["options"]) <= {"ok", "ENOTSUP"}


def test_writes_only_where_it_may(seen: dict[str, Any]) -> None:
    writable = {place for place, result in seen["write"].items() if result == "ok"}

    assert writable == {"/tmp", "/workspace", "/session"}
    assert set(seen["write"].values()) <= {"ok", "EROFS", "EACCES"}
    for place in ("/workspace", "/session", "/tmp", "/run/nanoclaw", "/mnt/shown"):
        assert {"nosuid", "nodev"} <= set(seen["mounts"][place].split(",")), place
    assert {"ro", "noexec"} <= set(seen["mounts"]["/run/nanoclaw"].split(","))


def test_reads_only_what_is_shown_to_it(seen: dict[str, Any]) -> None:
    assert seen["read shown"] == "ok"
    assert seen["read private"] == "EACCES"
    assert seen["read masked"] == 0


def test_sees_only_itself(seen: dict[str, Any]) -> None:
    assert (seen["pid"], seen["processes"], seen["hostname"]) == (1, 1, "probe")
    assert set(seen["environment"]) <= {
        *(
            "PATH",
            "HOME",
            "HOSTNAME",
            "LANG",
            "TERM",
            "container",
            "NOTIFY_SOCKET",
            "PYTHONDONTWRITEBYTECODE",
            "PIP_BREAK_SYSTEM_PACKAGES",
            "PIP_NO_CACHE_DIR",
            *("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
        )
    }
    assert seen["limits"] == [[0, 0], [4096, 4096]]


def test_is_bounded_by_its_unit_and_ended_by_the_kill_switch(seen: dict[str, Any]) -> None:
    assert "/nanoclaw.slice/nanoclaw-agents.slice/" in seen["unit"]["ControlGroup"]
    assert seen["unit"]["TasksMax"] == "64"
    assert seen["unit"]["MemoryMax"] == str(300 << 20)
    assert seen["unit"]["CPUQuotaPerSecUSec"] == "800ms"
    assert seen["unit"]["ActiveState"] == "active"
    assert "nanoclaw-probe-s1" in seen["container"].split()
    assert seen["after the kill switch"] in ("inactive", "failed")
