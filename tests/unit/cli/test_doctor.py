"""nanoclawctl doctor: each thing that can be missing, and that nothing of ours is needed to say so."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from nanoclawd import credentials
from nanoclawd.cli import doctor
from nanoclawd.cli.doctor import MISSING, OK, WARNING
from tests.unit.cli.conftest import ROOT, Run, fake_program
from tests.unit.cli.double import CONFIGURATION, RUNTIME, RouterDouble

GOOD_SYSTEMCTL = """case "$*" in
  --version) echo "systemd 257 (257.13-1)";;
  *Version*) echo 257.13-1;;
  *is-active*) echo active;;
  *is-enabled*) echo enabled;;
esac"""


@pytest.fixture
def good(programs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs of a machine on which nothing is missing."""
    fake_program(programs, "systemctl", GOOD_SYSTEMCTL)
    fake_program(programs, "podman", '[ "$1" = image ] || echo "podman version 5.4.2"')
    fake_program(programs, "getsubids", 'echo "0: ada 100000 65536"')
    fake_program(programs, "newuidmap", "")
    fake_program(programs, "newgidmap", "")
    return programs


def test_floor_can_be_read_by_an_old_python() -> None:
    source = (ROOT / "nanoclawd/cli/doctor.py").read_text()

    ast.parse(source, feature_version=(3, 7))


def test_floor_imports_nothing_that_must_be_installed() -> None:
    code = "import sys; from nanoclawd.cli import doctor; print(*sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)

    ours = {name for name in done.stdout.split() if name.startswith("nanoclawd")}
    assert ours == {"nanoclawd", "nanoclawd.cli", "nanoclawd.cli.doctor"}


def test_floor_as_a_program_names_what_is_missing(home: Path, programs: Path) -> None:
    fake_program(programs, "podman", 'echo "podman version 4.9.3"')

    done = subprocess.run(
        [sys.executable, "-m", "nanoclawd.cli.doctor", "--floor"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 1
    assert "missing: podman: podman version 4.9.3\n  -> podman 5.3 or newer" in done.stderr


def podman() -> doctor.Check:
    (check,) = (check for check in doctor.check_floor() if check.name == "podman")
    return check


@pytest.mark.parametrize(
    ("version", "state"),
    [
        ("podman version 4.9.3", MISSING),
        ("podman version 5.2.9", MISSING),
        ("podman version 5.3.0", OK),
        ("podman version 5.10.1", OK),
        ("podman version 6.1.0-dev", OK),
        ("gibberish", MISSING),
    ],
)
def test_podman_version(programs: Path, version: str, state: str) -> None:
    fake_program(programs, "podman", f'echo "{version}"')

    assert podman().state == state


@pytest.mark.parametrize(("version", "state"), [("252 (252.39-1)", MISSING), ("254 (254.1)", OK)])
def test_systemd_version(programs: Path, version: str, state: str) -> None:
    fake_program(programs, "systemctl", f'echo "systemd {version}"')

    (check,) = (check for check in doctor.check_floor() if check.name == "systemd")
    assert check.state == state


def test_program_that_is_not_there_is_missing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(home))

    assert podman().state == MISSING


def test_program_that_hangs_is_given_up(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROGRAM_S", 0.2)
    fake_program(programs, "podman", "exec sleep 60")

    assert "no answer" in podman().found


def test_user_manager_that_does_not_answer(home: Path, programs: Path) -> None:
    fake_program(programs, "systemctl", 'echo "Failed to connect to bus" >&2; exit 1')

    check = doctor.check_user_manager()

    assert (check.state, check.found) == (MISSING, "Failed to connect to bus")


def test_runtime_directory_that_is_not_set(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")

    assert "PAM" in doctor.check_user_manager().todo


@pytest.mark.parametrize(("rows", "state"), [("100000 65536", OK), ("100000 1000", MISSING), ("", MISSING)])
def test_subordinate_ids(good: Path, rows: str, state: str) -> None:
    fake_program(good, "getsubids", f'[ -z "{rows}" ] || echo "0: ada {rows}"')

    assert doctor.check_subordinate_ids("uid").state == state
    assert doctor.check_subordinate_ids("gid").state == state


def test_subordinate_ranges_add_up(good: Path) -> None:
    fake_program(good, "getsubids", 'echo "0: ada 100000 30000"; echo "1: ada 300000 40000"')

    assert doctor.count_subordinate_ids("uid") == 70000


def test_cgroups_of_version_1_are_missing_and_lost_controllers_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor.check_cgroups(str(tmp_path)).state == MISSING

    (tmp_path / "cgroup.controllers").write_text("cpu memory pids\n")
    monkeypatch.setattr(doctor, "_own_cgroup", lambda root: root)
    assert doctor.check_cgroups(str(tmp_path)).state == OK

    (tmp_path / "cgroup.controllers").write_text("memory\n")
    check = doctor.check_cgroups(str(tmp_path))
    assert (check.state, "cpu, pids" in check.found) == (WARNING, True)


def test_all_is_shown_and_in_json(router: RouterDouble, run: Run, good: Path) -> None:
    document = json.loads(run("doctor", "--json").stdout)
    shown = run("doctor").stdout

    names = [check["name"] for check in document["checks"]]
    assert {
        "python",
        "podman",
        "nanoclaw.socket",
        "router",
        "gateway sandbox",
        "image localhost/nanoclaw-agent:latest",
    } <= {*names}
    assert [
        line.split(": ")[0].split(maxsplit=1)[1] for line in shown.splitlines() if "→" not in line
    ] == names
    assert document["ok"] is not any(check["state"] == MISSING for check in document["checks"])


def test_works_without_the_router_and_fails(run: Run, good: Path) -> None:
    done = run("doctor")

    assert done.returncode == 1
    assert "missing router: cannot connect" in " ".join(done.stdout.split())


@pytest.mark.parametrize(("state", "expected"), [("inactive", MISSING), ("active", OK)])
def test_socket_unit(good: Path, state: str, expected: str) -> None:
    fake_program(good, "systemctl", f'case "$*" in *is-active*) echo {state};; *) echo enabled;; esac')

    assert doctor.check_socket("nanoclaw.socket").state == expected


def test_socket_unit_that_is_not_enabled_is_a_warning(good: Path) -> None:
    fake_program(good, "systemctl", 'case "$*" in *is-active*) echo active;; *) echo disabled;; esac')

    assert doctor.check_socket("nanoclaw.socket").state == WARNING


def test_credential_counts_only_if_its_provider_is_used() -> None:
    routes = [{"name": "anthropic", "endpoint": "", "credential": "anthropic", "credentialState": "absent"}]
    thinker = {"name": "a", "configuration": {**CONFIGURATION, "provider": "anthropic"}, "runtime": RUNTIME}

    assert list(doctor.check_credentials(routes, [])) == []
    (check,) = doctor.check_credentials(routes, [thinker])
    assert (check.state, check.todo) == (MISSING, "nanoclawctl secret set anthropic")


def test_credential_that_is_not_encrypted_is_a_standing_warning() -> None:
    state = f"usable, but {credentials.UNENCRYPTED}"
    routes = [{"name": "github", "endpoint": "", "credential": "github", "credentialState": state}]

    (check,) = doctor.check_credentials(routes, [])

    assert (check.state, "without encryption" in check.found) == (WARNING, True)


def test_sandbox_that_is_not_active_is_missing() -> None:
    check = doctor.check_sandbox("router", [{"name": "network", "active": False, "detail": "connected"}])

    assert (check.state, "network (connected)" in check.found) == (MISSING, True)


def test_image_that_is_not_there(programs: Path) -> None:
    fake_program(programs, "podman", "exit 1")
    agent = {"name": "a", "configuration": CONFIGURATION, "runtime": RUNTIME}

    (check,) = doctor.check_agents([agent])

    assert (check.state, check.todo) == (MISSING, "nanoclawctl image build")


def test_long_runtime_directory_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", f"/run/{'x' * 90}")

    (check,) = doctor.check_router()

    assert (check.state, "XDG_RUNTIME_DIR" in check.found + check.todo) == (MISSING, True)
