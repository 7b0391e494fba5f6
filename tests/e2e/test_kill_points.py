"""Any process of the installed product dies, and nothing is lost, repeated, out of order or left behind."""

from __future__ import annotations

from tests.support.machine import CRASH, Machine

POINTS = 20


def test_whoever_dies_nothing_is_lost_or_repeated(machine: Machine) -> None:
    # All kinds of warnings, but of no crash.
    machine.expect_journal(rf"^(?!.*({CRASH.pattern}))(nanoclaw|-)")

    done = machine.run(
        *("/usr/bin/python3", "-m", "tests.crash.real", "--points", str(POINTS), "--seed", "1"),
        cwd=machine.project,
        check=False,
        timeout_s=300,
    )

    assert done.returncode == 0, done.stdout + done.stderr
