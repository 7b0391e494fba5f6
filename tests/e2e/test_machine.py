"""The nested machine: it is what the other tests believe it to be, and leaves nothing behind."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.machine import ROOT, Machine, MachineError, NestedMachine

IMAGE = "localhost/nanoclaw-agent:latest"
GENERATOR = "/usr/lib/systemd/user-generators/podman-user-generator"


@pytest.fixture(scope="module")
def root() -> None:
    if os.geteuid() != 0:
        pytest.skip("a nested machine needs root")


@pytest.fixture(scope="module")
def nested(root: None) -> Iterator[NestedMachine]:
    machine = NestedMachine(f"bare-{os.getpid()}")
    machine.up("--project", str(ROOT))
    yield machine
    machine.down()


@pytest.fixture
def second(root: None) -> Iterator[NestedMachine]:
    machine = NestedMachine(f"second-{os.getpid()}")
    yield machine
    machine.down()


def traces_of(machine: NestedMachine) -> list[str]:
    """Return what of a machine can be seen out here: mounts, its cgroup, its state, its processes."""
    traces = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if machine.name in line]
    cgroups = Path("/sys/fs/cgroup").glob(f"**/nanoclaw-machine-{machine.name}")
    traces += [str(path) for path in (*cgroups, *Path("/run/nanoclaw-machine").glob(machine.name))]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            # A zombie has no command line any more: it is dead, and for somebody else to reap.
            command = (process / "cmdline").read_text()
            if command and f"nanoclaw-machine-{machine.name}" in (process / "cgroup").read_text():
                traces.append(f"{process}: {command}")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
    return traces


def test_boots_to_a_running_user_manager(nested: NestedMachine) -> None:
    assert nested.sh("ps -p 1 -o comm=") == "systemd"
    assert nested.sh("id -un") == "claw"
    assert nested.systemctl("is-system-running").stdout.strip() == "running"
    assert nested.sh("loginctl show-user claw --property=Linger") == "Linger=yes"


def test_has_only_loopback(nested: NestedMachine) -> None:
    assert nested.sh("ls /sys/class/net") == "lo"
    assert nested.sh("ip -o route", user="root") == ""


def test_quadlet_makes_a_unit(nested: NestedMachine) -> None:
    nested.write(
        f"{nested.home}/.config/containers/systemd/trial.container",
        "[Container]\nImage=localhost/none:latest\nPull=never\n",
    )

    nested.systemctl("daemon-reload")

    assert nested.exists(GENERATOR)
    assert nested.unit("trial.service", "LoadState") == {"LoadState": "loaded"}


def test_container_of_the_agent_image_runs(fresh_machine: NestedMachine) -> None:
    line = (
        "podman",
        "run",
        "--rm",
        "--network=none",
        "--pull=never",
        "--userns=keep-id",
        "--entrypoint=cat",
        IMAGE,
    )

    shown = fresh_machine.run(*line, "/proc/self/uid_map").stdout

    assert len(shown.splitlines()) == 3  # keep-id: below the user, the user, above


def test_exec_passes_status_stdin_and_directory(nested: NestedMachine) -> None:
    assert nested.run("bash", "-c", "exit 7", check=False).returncode == 7
    assert nested.run("bash", "-c", "exit 8", check=False, unit=True).returncode == 8
    assert nested.run("cat", input="über\n").stdout == "über\n"
    assert nested.run("pwd", cwd="/srv").stdout == "/srv\n"
    assert ".service" in nested.run("cat", "/proc/self/cgroup", unit=True, cwd="/srv").stdout


def test_failed_command_says_what_and_why(nested: NestedMachine) -> None:
    with pytest.raises(MachineError, match=r"(?s)\$ ls '/no such'\nexit status 2\n.*No such file"):
        nested.run("ls", "/no such")


def test_two_side_by_side_share_nothing(nested: NestedMachine, second: NestedMachine) -> None:
    second.up()
    second.write("/tmp/mark", "second")

    assert not nested.exists("/tmp/mark")
    assert nested.sh("hostname; cat /etc/machine-id") != second.sh("hostname; cat /etc/machine-id")
    second.down()
    assert nested.systemctl("is-system-running").stdout.strip() == "running"


@pytest.mark.parametrize("options", [(), ("--graceful",)])
def test_down_leaves_nothing_and_up_is_pristine(second: NestedMachine, options: tuple[str, ...]) -> None:
    second.up("--project", str(Path(__file__).parent))
    second.write(f"{second.home}/mark", "mine")
    second.write("/etc/mark", "mine", user="root")
    second.write("/srv/project/mark", "mine", user="root")
    second.run("systemd-run", "--user", "--quiet", "sleep", "1000")
    assert traces_of(second)

    second.down(*options)

    assert traces_of(second) == []
    second.up("--project", str(Path(__file__).parent))
    for path in (f"{second.home}/mark", "/etc/mark", "/srv/project/mark"):
        assert not second.exists(path)
    assert not Path(__file__).with_name("mark").exists()


def test_survives_a_killed_init(second: NestedMachine) -> None:
    second.up()
    init = os.pidfd_open(second.pid())
    signal.pidfd_send_signal(init, signal.SIGKILL)
    assert select.select([init], [], [], 10)[0]  # it has ended
    os.close(init)

    second.up()

    assert second.systemctl("is-system-running").stdout.strip() == "running"


def log_as(machine: Machine, unit: str, text: str) -> None:
    """Let a user unit write one line to stderr. It stays until journald has seen whose line that is."""
    script = 'echo "$1" >&2; exec sleep infinity'
    machine.run("systemd-run", "--user", "--quiet", f"--unit={unit}", "bash", "-c", script, "log", text)
    machine.wait_for(lambda: text[3:] in [entry["MESSAGE"] for entry in machine.journal(f"{unit}.service")])
    machine.systemctl("stop", unit)


def test_journal_warning_of_our_unit_fails_a_test(nested: NestedMachine) -> None:
    nested.check_journal()
    log_as(nested, "nanoclaw-trial", "<4>the disk is getting full")

    with pytest.raises(AssertionError, match="disk is getting full"):
        nested.check_journal()

    nested.check_journal()  # judged once


def test_journal_accepts_what_was_expected_or_is_not_ours(nested: NestedMachine) -> None:
    nested.check_journal()
    log_as(nested, "nanoclaw-trial", "<3>expected trouble")
    log_as(nested, "nanoclaw-trial", "<6>all is well")
    log_as(nested, "other", "<3>trouble of somebody else")
    nested.expect_journal("expected trouble")

    nested.check_journal()


def test_crash_fails_a_test(nested: NestedMachine) -> None:
    nested.check_journal()
    nested.run("systemd-run", "--user", "--wait", "--quiet", "bash", "-c", "kill -SEGV $$$$", check=False)

    with pytest.raises(AssertionError, match="SEGV"):
        nested.check_journal()


def test_wait_for_gives_up_with_the_journal(nested: NestedMachine) -> None:
    assert nested.wait_for(lambda: nested.exists("/etc/machine-id"), what="a file")
    with pytest.raises(MachineError, match="a unicorn did not come true"):
        nested.wait_for(lambda: nested.exists("/etc/unicorn"), within_s=0.2, what="a unicorn")


def test_local_machine_is_the_session_of_an_ordinary_user(nested: NestedMachine) -> None:
    script = """
from tests.support.machine import LocalMachine
assert LocalMachine.is_possible()
machine = LocalMachine()
machine.run("systemd-run", "--user", "--wait", "--unit=nanoclaw-local", "sh", "-c", "echo '<4>look' >&2")
print(machine.user, machine.home, machine.run("pwd", cwd="/srv", unit=True).stdout.strip())
try:
    machine.check_journal()
except AssertionError as exc:
    print(exc)
"""
    log_as(nested, "nanoclaw-trial", "<3>trouble from before the tests")

    said = nested.run("python3", "-c", script, cwd=nested.project).stdout
    nested.expect_journal("look|trouble from before")

    assert said.splitlines()[0] == "claw /home/claw /srv"
    (line,) = said.splitlines()[2:]
    assert line.endswith(" <4> look")  # of nanoclaw-local.service, if journald looked before it had ended
