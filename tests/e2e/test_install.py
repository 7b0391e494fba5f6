"""install.sh: from a bare machine to an answer, twice, over a reboot, and away without a trace."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.machine import ROOT, NestedMachine
from tests.support.product import Product

INSTALL_S = 300
#: Podman's own: it makes these at its first start, whoever starts it.
PODMANS = ("./.local", "./.local/share", "./.local/share/containers")


def install(machine: NestedMachine, *options: str) -> str:
    """Run install.sh in the machine and return what it said."""
    return machine.run("./install.sh", "--yes", *options, cwd=machine.project, timeout_s=INSTALL_S).stdout


def files_of(machine: NestedMachine) -> set[str]:
    """Return all files and directories of the user, but Podman's storage."""
    script = "find . -path ./.local/share/containers -prune -o -print"
    found = machine.sh(script, cwd=machine.home, user="root")  # an agent's directories are its own
    return set(found.splitlines()) - set(PODMANS)


def traces_of(machine: NestedMachine) -> dict[str, str]:
    """Return what an installation may leave besides files."""
    return {
        "units": machine.sh("systemctl --user list-units --all --no-legend --plain 'nanoclaw*'"),
        "unit files": machine.sh("systemctl --user list-unit-files --no-legend 'nanoclaw*' || true"),
        "enabled": machine.sh("systemctl --user list-unit-files --state=enabled --no-legend"),
        "containers": machine.sh("podman ps --all --quiet"),
        "runtime": machine.sh("ls -d /run/user/*/nanoclaw 2>/dev/null || true"),
    }


@dataclass(frozen=True, kw_only=True)
class Installed:
    """A machine that was bare, and what install.sh said on it."""

    machine: NestedMachine
    said: str


@pytest.fixture(scope="module")
def bare(store: str) -> Iterator[NestedMachine]:
    """A machine without anything of ours; tests that change it change it back."""
    machine = NestedMachine(f"bare-install-{os.getpid()}")
    machine.up("--project", str(ROOT))
    machine.sh("podman info > /dev/null")  # makes what is Podman's own
    yield machine
    machine.down()


@pytest.fixture(scope="module")
def installed(store: str) -> Iterator[Installed]:
    """A machine on which install.sh has done all that it does, the image included."""
    base = (
        Path(os.environ.get("NANOCLAW_CACHE", "/var/cache/nanoclaw")) / "agent-base"
    )  # as tests/machine/store
    machine = NestedMachine(f"install-{os.getpid()}")
    machine.up("--project", str(ROOT), "--bind-ro", f"{base}:/srv/base")
    try:
        yield Installed(machine=machine, said=install(machine, "--base-directory", "/srv/base"))
        machine.check_journal()
    finally:
        machine.down()


# --- what is there afterwards --------------------------------------------------------------------------


def test_ends_with_an_answer_and_with_what_to_do_next(installed: Installed) -> None:
    assert "nanoclaw.service is active" in installed.said
    assert "demo: Hello from claw!\n" in installed.said
    assert "What to do next" in installed.said


def test_units_are_enabled(installed: Installed) -> None:
    for unit in (
        "nanoclaw.service",
        "nanoclaw.socket",
        "nanoclaw-channel.socket",
        "nanoclaw-gateway.socket",
        "podman.socket",
    ):
        assert installed.machine.systemctl("is-enabled", unit).stdout == "enabled\n", unit
        assert installed.machine.systemctl("is-active", unit).stdout == "active\n", unit


def test_a_new_shell_finds_the_command_its_completion_and_its_manual(installed: Installed) -> None:
    path = {"PATH": "/usr/bin:/bin"}  # what a login begins with

    found = installed.machine.run("bash", "-lc", "command -v nanoclawctl", env=path)
    pages = installed.machine.run("bash", "-lc", "man -w nanoclawctl nanoclawd nanoclaw.toml", env=path)
    completes = installed.machine.run(
        "bash",
        "-lc",
        "source /usr/share/bash-completion/bash_completion; "
        "{ _comp_load nanoclawctl || __load_completion nanoclawctl; } && complete -p nanoclawctl",
        env=path,
    )

    assert found.stdout == f"{installed.machine.home}/.local/bin/nanoclawctl\n"
    assert len(pages.stdout.splitlines()) == 3
    assert "nanoclawctl" in completes.stdout


def test_doctor_finds_nothing_missing(installed: Installed) -> None:
    shown = installed.machine.run(f"{installed.machine.home}/.local/bin/nanoclawctl", "doctor")

    assert "missing" not in shown.stdout


def test_twice_is_harmless_and_running_agents_go_on(installed: Installed) -> None:
    machine = installed.machine
    product = Product(machine, "demo")
    product.send("demo", "hello")
    runner = product.runner_pid("demo")
    file = product.ask("agent", "show", "demo")["file"]
    machine.sh(f"echo '# mine' >> {file}")
    before = files_of(machine)

    said = install(machine, "--base-directory", "/srv/base")

    assert "demo: Hello from claw!\n" in said
    assert product.runner_pid("demo") == runner
    assert "# mine" in machine.read(file)
    assert files_of(machine) == before
    # The former image stays as long as a container runs on it, and no longer.
    assert len(machine.sh("podman images --quiet --filter dangling=true").splitlines()) <= 1


def test_all_comes_back_with_the_user_manager(installed: Installed) -> None:
    machine = installed.machine
    product = Product(machine, "demo")
    product.ctl("agent", "stop", "demo")
    product.ctl("send", "demo", "before the reboot")

    # As at a boot: everything of the user ends, and its runtime directory goes.
    machine.sh("systemctl stop user@1000.service user-runtime-dir@1000.service", user="root")
    assert not machine.exists("/run/user/1000/nanoclaw")
    machine.sh("systemctl start user@1000.service", user="root")

    machine.wait_for(lambda: product.state("nanoclaw.service") == "active", within_s=30)
    assert product.ask("agent", "show", "demo")["runtime"]["queued"] == 1
    product.ctl("agent", "start", "demo")
    product.wait_event("message-answered", agent="demo")
    assert product.send("demo", "after the reboot") == "after the reboot"


# --- away again ----------------------------------------------------------------------------------------


def test_uninstall_keeps_data_and_purge_leaves_nothing(fresh_machine: NestedMachine) -> None:
    machine = fresh_machine
    machine.sh("podman info > /dev/null")  # makes what is Podman's own
    before, traces_before = files_of(machine), traces_of(machine)
    install(machine, "--no-image")
    product = Product(machine, "demo")
    product.ctl("secret", "set", "anthropic", input="sk-ant-test")
    product.inside("demo", "sh", "-c", "umask 077; mkdir /workspace/mine; echo kept > /workspace/mine/file")

    install(machine, "--uninstall")

    left = files_of(machine) - before
    assert traces_of(machine) == traces_before
    kept = ("./.config/nanoclaw", "./.config/credstore.encrypted", "./.local/state", "./.config")
    assert [path for path in left if not path.startswith(kept)] == []
    assert "./.config/nanoclaw/agents/demo.toml" in left
    assert any("credstore.encrypted/nanoclaw." in path for path in left)

    # What was kept is what a new installation finds.
    install(machine, "--no-image")
    assert product.inside("demo", "cat", "/workspace/mine/file").stdout == "kept\n"
    assert product.status()["queue"]["answered"] == 2

    install(machine, "--uninstall", "--purge")
    assert files_of(machine) == before
    assert traces_of(machine) == traces_before


def test_purge_asks_before_anything_is_removed(installed: Installed) -> None:
    machine = installed.machine
    before = files_of(machine)

    refused = machine.run(
        "./install.sh", "--uninstall", "--purge", check=False, cwd=machine.project, timeout_s=INSTALL_S
    )

    assert refused.returncode == 1
    assert "Delete configuration" in refused.stderr and "--yes" in refused.stderr
    assert files_of(machine) == before


def test_uninstall_takes_the_images_too(installed: Installed) -> None:
    install(installed.machine, "--uninstall")

    assert installed.machine.sh("podman images --quiet; podman ps --all --quiet") == ""

    install(installed.machine, "--base-directory", "/srv/base")  # as it was


# --- what is missing is named --------------------------------------------------------------------------

OLD_PODMAN = "install -m 755 /dev/stdin /usr/bin/podman <<< $'#!/bin/sh\\necho podman version 4.9.3'"


@pytest.mark.parametrize(
    ("take_away", "give_back", "says"),
    [
        ("sed -i.off s/^claw/other/ /etc/subuid", "mv /etc/subuid.off /etc/subuid", "usermod --add-subuids"),
        ("sed -i.off s/65536/1000/ /etc/subgid", "mv /etc/subgid.off /etc/subgid", "1000 ids"),
        (
            "mv /usr/bin/podman /usr/bin/podman.off",
            "mv /usr/bin/podman.off /usr/bin/podman",
            "missing: podman",
        ),
        (
            f"mv /usr/bin/podman /usr/bin/podman.off; {OLD_PODMAN}",
            "mv /usr/bin/podman.off /usr/bin/podman",
            "podman 5.3 or newer",
        ),
        (
            "mv /usr/bin/newuidmap /usr/bin/newuidmap.off",
            "mv /usr/bin/newuidmap.off /usr/bin/newuidmap",
            "uidmap",
        ),
        (
            "mv /usr/lib/python3/dist-packages/jeepney /srv/jeepney",
            "mv /srv/jeepney /usr/lib/python3/dist-packages/jeepney",
            "missing: python3-jeepney",
        ),
        (
            "rm /var/lib/systemd/linger/claw; mv /usr/bin/loginctl /usr/bin/loginctl.off; "
            "printf '#!/bin/sh\\n[ $1 = show-user ]\\n' > /usr/bin/loginctl; chmod 755 /usr/bin/loginctl",
            "touch /var/lib/systemd/linger/claw; mv /usr/bin/loginctl.off /usr/bin/loginctl",
            "as root: loginctl enable-linger claw",
        ),
    ],
    ids=["no subuids", "few subgids", "no podman", "old podman", "no newuidmap", "no module", "no linger"],
)
def test_a_machine_that_lacks_something_is_told_what_and_stays_as_it_is(
    bare: NestedMachine, take_away: str, give_back: str, says: str
) -> None:
    before = files_of(bare)
    bare.sh(take_away, user="root")
    try:
        failed = bare.run("./install.sh", "--yes", check=False, cwd=bare.project)
    finally:
        bare.sh(give_back, user="root")

    assert failed.returncode == 1
    assert says in failed.stderr, failed.stderr
    assert "error: " in failed.stderr
    assert files_of(bare) == before


def test_root_is_told_to_be_somebody_else(bare: NestedMachine) -> None:
    failed = bare.run("./install.sh", "--yes", check=False, cwd=bare.project, user="root")

    assert failed.returncode == 1
    assert "for an ordinary user" in failed.stderr


def test_a_user_without_a_manager_is_told_how_to_log_in(bare: NestedMachine) -> None:
    failed = bare.run(
        *("env", "-u", "XDG_RUNTIME_DIR", "-u", "DBUS_SESSION_BUS_ADDRESS", "./install.sh", "--yes"),
        check=False,
        cwd=bare.project,
    )

    assert failed.returncode == 1
    assert "no systemd user manager" in failed.stderr and "log in" in failed.stderr


def test_nothing_is_installed_without_a_yes(bare: NestedMachine) -> None:
    bare.sh("mv /usr/bin/podman /usr/bin/podman.off", user="root")
    try:
        failed = bare.run("./install.sh", check=False, cwd=bare.project)
    finally:
        bare.sh("mv /usr/bin/podman.off /usr/bin/podman", user="root")

    assert failed.returncode == 1
    assert "podman" in failed.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--nonsense"], "unknown option '--nonsense'"),
        (["--purge"], "--purge goes with --uninstall"),
        (["--base-directory"], "--base-directory needs a directory"),
    ],
)
def test_wrong_options_are_refused(bare: NestedMachine, options: list[str], says: str) -> None:
    failed = bare.run("./install.sh", *options, check=False, cwd=bare.project)

    assert (failed.returncode, failed.stdout) == (1, "")
    assert says in failed.stderr


def test_help_tells_all_options(bare: NestedMachine) -> None:
    shown = bare.run("./install.sh", "--help", cwd=bare.project).stdout

    for option in ("--yes", "--no-demo", "--no-image", "--base-directory", "--uninstall", "--purge"):
        assert option in shown
