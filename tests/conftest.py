"""Fixtures of all tests: the machine with the installed product, a pristine one, and where the time went."""

from __future__ import annotations

import os
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.machine import ROOT, STORE_TOOL, LocalMachine, Machine, NestedMachine

INSTALL_S = 600
PREPARE_S = 1800

#: What tests/run keeps of an earlier run: a line for each file of tests, "SECONDS PATH".
SECONDS_FILE = "seconds"

_seconds: dict[str, float] = defaultdict(float)  #: by file of tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a machine, and run it last: tests/run prepares it beside the other tests. Of the rest,
    the file that took longest the last time comes first: one that begins last keeps all others waiting.
    """
    for item in items:
        if any(Path(item.path).is_relative_to(ROOT / place) for place in ("tests/e2e", "tests/containment")):
            item.add_marker(pytest.mark.machine)
    before = _read_seconds()
    items.sort(
        key=lambda item: (
            item.get_closest_marker("machine") is not None,
            -before.get(_file_of(item.nodeid), 0),
        )
    )


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up the time of each file of tests."""
    _seconds[_file_of(report.nodeid)] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the times to tests/run, which prints them by directory and keeps them by file."""
    times = os.environ.get("NANOCLAW_TEST_LOGS")
    if (
        times is None or "PYTEST_XDIST_WORKER" in os.environ
    ):  # the reports of all workers come to one process
        return
    workers = session.config.getoption("numprocesses") or 1
    directories: dict[str, float] = defaultdict(float)
    for name, seconds in _seconds.items():
        directories[str(Path(name).parent)] += seconds
    with open(f"{times}/times", "a", encoding="utf-8") as file:
        for name, seconds in sorted(directories.items()):
            file.write(f"{seconds * 1000:.0f} {name}, added up over {workers} workers\n")
    known = {**_read_seconds(), **_seconds}
    lines = (f"{seconds:.1f} {name}\n" for name, seconds in sorted(known.items()))
    Path(times, f"{SECONDS_FILE}.new").write_text("".join(lines), encoding="utf-8")


def _file_of(nodeid: str) -> str:
    return nodeid.split("::")[0]


def _read_seconds() -> dict[str, float]:
    """Return what each file took in an earlier run, if tests/run knows."""
    path = Path(os.environ.get("NANOCLAW_TEST_LOGS", "/nonexistent"), SECONDS_FILE)
    if not path.exists():
        return {}
    lines = (line.split(" ", 1) for line in path.read_text(encoding="utf-8").splitlines())
    return {name: float(seconds) for seconds, name in lines}


@pytest.fixture(scope="session")
def store() -> str:
    """Return the podman storage directory that holds the agent image; made if need be (see tests/run)."""
    if LocalMachine.is_possible():
        pytest.skip("a nested machine needs root; here the tests use the session's own user manager")
    if os.geteuid() != 0:
        pytest.skip("no user manager of systemd here, and a nested machine needs root")
    made = subprocess.run([STORE_TOOL], stdout=subprocess.PIPE, text=True, check=True, timeout=PREPARE_S)
    return made.stdout.strip()


@pytest.fixture(scope="session")
def _installed(request: pytest.FixtureRequest) -> Iterator[Machine]:
    machine: Machine
    if LocalMachine.is_possible():
        if (Path.home() / ".config/nanoclaw").exists():
            pytest.skip("NanoClaw is installed in this session: not testing on somebody's own agents")
        machine = LocalMachine()
        _install(machine)
        yield machine
        return
    machine = NestedMachine(f"e2e-{os.getpid()}")
    machine.up("--project", str(ROOT), "--store", request.getfixturevalue("store"))
    try:
        _install(machine)
        yield machine
    finally:
        machine.down()


def _install(machine: Machine) -> None:
    # The nested machine came with the image; a person's own machine may have to build it.
    image = ["--no-image"] if isinstance(machine, NestedMachine) else []
    machine.run("./install.sh", "--yes", "--no-demo", *image, cwd=machine.project, timeout_s=INSTALL_S)
    machine.check_journal()


@pytest.fixture
def machine(_installed: Machine) -> Iterator[Machine]:
    """The machine with the installed product, shared by all tests: leave it as you found it.

    Fails a test that left warnings of our units or a crash in the journal; see Machine.expect_journal.
    """
    yield _installed
    _installed.check_journal()


@pytest.fixture
def fresh_machine(store: str) -> Iterator[NestedMachine]:
    """A machine of this test's own, just booted: has checkout and agent image, nothing installed."""
    machine = NestedMachine(f"fresh-{os.getpid()}")
    machine.up("--project", str(ROOT), "--store", store)
    try:
        yield machine
        machine.check_journal()
    finally:
        machine.down()
