"""nanoclawctl selftest, as far as it goes without an agent that runs; the rest is in tests/containment."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Run
from tests.unit.cli.double import RUNTIME, STATUS, RouterDouble

MADE = {"AddAgent", "RemoveAgent", "Deliver"}


def asked(router: RouterDouble) -> set[str]:
    return {name for name, _ in router.calls} & MADE


def test_nothing_is_begun_while_all_agents_are_stopped(router: RouterDouble, run: Run) -> None:
    router.status = {**STATUS, "held": True}

    done = run("selftest")

    assert (done.returncode, asked(router)) == (5, set())
    assert "nanoclawctl start --all" in done.stderr


@pytest.mark.parametrize("name", ["selftest", "selftest_other"])
def test_an_agent_of_the_person_keeps_its_name(router: RouterDouble, run: Run, name: str) -> None:
    router.agents[name] = dict(RUNTIME)

    done = run("selftest")

    assert (done.returncode, asked(router)) == (5, set())
    assert f"an agent of yours named '{name}'" in done.stderr


def test_only_one_runs_at_a_time(router: RouterDouble, run: Run, home: Path) -> None:
    with open(home / "run/nanoclaw/selftest.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = run("selftest")

    assert (done.returncode, asked(router)) == (5, set())
    assert "another selftest is running" in done.stderr
