"""Units of agents, judged by the real generator, systemd and Podman: no text gets out of its place."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.machine import Machine

PRELUDE = """
import os, sys
os.chdir(sys.argv[1])
sys.path.insert(0, ".")
from tests.support.quadlet_peer import main
main()
"""
# The router's own sandbox, as far as it concerns the programs that a check runs. See units/nanoclaw.service.
SANDBOX = """
    NoNewPrivileges=yes PrivateUsers=yes ProtectSystem=strict ProtectHome=read-only PrivateTmp=yes
    PrivateNetwork=yes PrivateDevices=yes PrivateIPC=yes PrivatePIDs=yes ProtectKernelTunables=yes
    ProtectKernelModules=yes ProtectKernelLogs=yes ProtectControlGroups=yes ProtectClock=yes
    ProtectHostname=yes RestrictNamespaces=yes RestrictAddressFamilies=AF_UNIX RestrictRealtime=yes
    RestrictSUIDSGID=yes LockPersonality=yes MemoryDenyWriteExecute=yes SystemCallArchitectures=native
    SystemCallFilter=@system-service CapabilityBoundingSet= UMask=0077 PrivateMounts=yes
    ProtectProc=invisible ProcSubset=pid
"""

#: Said by systemd, at times with no unit's name to it.
GENERATOR_FAILED = r"<3> .*podman-user-generator failed"


def agent(name: str = "berta", *, toml: str = "", **more: Any) -> dict[str, Any]:
    return {"name": name, "toml": toml, **more}


class Peer:
    """tests/support/quadlet_peer.py in the machine, one request at a time."""

    def __init__(self, machine: Machine, *options: str) -> None:
        self.process = machine.popen(
            *(*options, "python3", "-c", PRELUDE, machine.project),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, op: str, *agents: dict[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"op": op, "agents": agents}) + "\n")
        self.process.stdin.flush()
        reply = json.loads(self.process.stdout.readline())
        assert "crash" not in reply, reply
        return reply

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


@pytest.fixture
def peer(machine: Machine) -> Iterator[Peer]:
    """Return a peer; at the end nothing of it is left in the machine."""
    peer = Peer(machine)
    yield peer
    peer.close()
    machine.sh(
        "cd ~/.config && rm -rf ~/argv systemd/user/dump@.service containers/systemd/nanoclaw*.container.d"
        " containers/systemd/nanoclaw/?/nanoclaw-{berta,anna}@.container"
    )
    machine.systemctl("daemon-reload")


def drop_in(machine: Machine, directory: str, text: str) -> str:
    path = f"{machine.home}/.config/containers/systemd/{directory}/50-local.conf"
    machine.write(path, text)
    return path


def test_a_plain_agent_passes(peer: Peer) -> None:
    assert peer.ask("check", agent()) == {"berta": None}


def test_the_check_works_in_the_routers_sandbox(machine: Machine, peer: Peer) -> None:
    path = drop_in(machine, "nanoclaw-anna@.container.d", "[Service]\nMemoryMax=lots\n")
    options = [argument for line in SANDBOX.split() for argument in ("--property", line)]
    writable = f"ReadWritePaths={machine.home}/.config/containers/systemd"
    run = (
        "systemd-run",
        "--user",
        "--quiet",
        "--collect",
        "--pipe",
        "--wait",
        *options,
        "--property",
        writable,
    )
    sandboxed = Peer(machine, *run)

    answer = sandboxed.ask("install", agent("berta"), agent("anna"))
    sandboxed.close()

    assert answer["berta"] is None
    assert answer["anna"].startswith(f"{path}:2: Invalid memory limit 'lots'")
    assert machine.sh("ls ~/.config/containers/systemd/nanoclaw/0") == "nanoclaw-berta@.container"


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("[Container]\n# mine\nBogus=1\n", 3, "unsupported key 'Bogus'"),
        ("[Container]\nthis is no line\n", 2, "not a key-value pair"),
        ("[Service]\nKillMode=none\n", 2, "invalid KillMode"),
        ("[Service]\nMemoryMx=1G\n", 2, "Unknown key 'MemoryMx'"),
        ("[Service]\nMemoryMax=lots\n", 2, "Invalid memory limit"),
        ("[Container]\nImage=\n", None, "no Image or Rootfs"),
    ],
)
@pytest.mark.parametrize("shared", [False, True])
def test_a_broken_drop_in_is_named_and_harms_only_its_agents(
    machine: Machine, peer: Peer, text: str, line: int | None, says: str, shared: bool
) -> None:
    assert peer.ask("install", agent("berta"), agent("anna", index=1)) == {"berta": None, "anna": None}
    path = drop_in(machine, "nanoclaw-.container.d" if shared else "nanoclaw-berta@.container.d", text)
    before = machine.sh("sha256sum ~/.config/containers/systemd/nanoclaw/*/*")

    answer = peer.ask("install", agent("berta", toml="tasks_max = 99"), agent("anna", index=1))

    assert f"{path}:{line}: " in answer["berta"] if line else path in answer["berta"]
    assert says in answer["berta"]
    assert (answer["anna"] is None) is not shared
    assert machine.sh("sha256sum ~/.config/containers/systemd/nanoclaw/*/*") == before
    assert machine.read(path) == text


def test_a_good_drop_in_reaches_podman(machine: Machine, peer: Peer) -> None:
    drop_in(machine, "nanoclaw-berta@.container.d", "[Container]\nHostName=mine\n[Service]\nMemoryMax=2G\n")

    assert peer.ask("install", agent()) == {"berta": None}
    machine.systemctl("daemon-reload")

    assert "--hostname mine " in machine.unit("nanoclaw-berta@s1.service", "ExecStart")["ExecStart"]
    assert machine.unit("nanoclaw-berta@s1.service", "MemoryMax") == {"MemoryMax": str(2 << 30)}


def test_a_damaged_unit_harms_only_its_directory(machine: Machine, peer: Peer) -> None:
    assert set(peer.ask("install", agent("berta"), agent("anna", index=1)).values()) == {None}
    machine.sh("echo garbage > ~/.config/containers/systemd/nanoclaw/0/nanoclaw-berta@.container")
    machine.systemctl("daemon-reload")
    machine.expect_journal(GENERATOR_FAILED)

    assert machine.unit("nanoclaw-anna@s1.service", "LoadState") == {"LoadState": "loaded"}
    assert machine.unit("nanoclaw-berta@s1.service", "LoadState") == {"LoadState": "not-found"}


def test_a_unit_that_was_cut_off_is_no_unit(machine: Machine, peer: Peer) -> None:
    assert peer.ask("install", agent()) == {"berta": None}
    machine.sh(
        "cd ~/.config/containers/systemd/nanoclaw/0 && sed -i '/^Image=/,$d' nanoclaw-berta@.container"
    )
    machine.systemctl("daemon-reload")
    machine.expect_journal(GENERATOR_FAILED)

    assert machine.unit("nanoclaw-berta@s1.service", "LoadState") == {"LoadState": "not-found"}


# --- what a person writes arrives unchanged, or is refused ----------------------------------------------

SYNTAX = st.sampled_from(
    " %$\"'\\;#=,[]{}()*?~!`&|<>@iInhtSx0"
)  # what means something to a program on the way
PRINTABLE = st.text(
    SYNTAX | st.characters(codec="utf-8").filter(lambda char: char.isprintable() and char != ":"),
    max_size=200,
)
# Not what this Python's Unicode does not assign: a newer one in the machine may find it printable.
ANY = st.text(
    SYNTAX | st.sampled_from(":\n\t\0\r") | st.characters(codec="utf-8", exclude_categories=["Cn"]),
    max_size=200,
)
real_programs = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@real_programs
@given(paths=st.lists(PRINTABLE, min_size=1, max_size=8))
def test_hostile_paths_arrive_unchanged(peer: Peer, paths: list[str]) -> None:
    mounts = [["/" + path.lstrip("/"), f"/mnt/a {number}"] for number, path in enumerate(paths)]

    argv = peer.ask("argv", agent(mounts=mounts))["argv"]

    volumes = [value for flag, value in itertools.pairwise(argv) if flag == "-v"]
    volumes += [value.removeprefix("--volume=") for value in argv if value.startswith("--volume=")]
    expected = {f"{_normal(source)}:{target}:ro,nosuid,nodev,z" for source, target in mounts}
    assert expected == {volume for volume in volumes if ":/mnt/" in volume}
    assert argv[-1] == "localhost/nanoclaw-agent:latest"


@real_programs
@given(path=ANY)
def test_paths_that_cannot_stand_in_a_unit_are_refused(peer: Peer, path: str) -> None:
    answer = peer.ask("check", agent(mounts=[["/" + path, "/mnt/a"]]))

    assert (answer["berta"] is None) == (path.isprintable() and ":" not in path)


def _normal(path: str) -> str:
    """Return the path as pathlib has it: without empty parts and single dots."""
    return "/" + "/".join(part for part in path.split("/") if part not in ("", "."))


@real_programs
@given(
    st.dictionaries(
        st.sampled_from(["description", "provider", "model", "image", "memory_max", "cpu_quota"]),
        ANY | st.from_regex(r"[A-Za-z0-9._:/@%-]{1,40}", fullmatch=True),
    )
)
def test_hostile_values_are_refused_or_make_a_unit_without_complaint(
    peer: Peer, values: dict[str, str]
) -> None:
    problem = peer.ask("check", agent(toml=tomli_w.dumps(values)))["berta"]

    # Refused where it was written, never by a program further on.
    assert problem is None or "/agents/berta.toml:" in problem
    assert problem is None or "unit" not in problem


def test_a_description_never_reaches_the_unit(peer: Peer) -> None:
    argv = peer.ask("argv", agent(toml='description = "%n $HOME"\nmodel = "secret-model"'))["argv"]

    assert not any(
        "HOME" in argument.replace("HOME=/workspace", "") or "secret" in argument for argument in argv
    )
