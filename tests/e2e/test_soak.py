"""The short form of tests/soak/run: a few seconds of what that does for an hour."""

from __future__ import annotations

from tests.support.machine import Machine

SECONDS = 15


def test_mixed_traffic_with_restarts_and_kills_loses_and_repeats_nothing(machine: Machine) -> None:
    machine.expect_journal("")  # what is killed says so

    table = machine.sh(
        f"cd /srv/project && /usr/bin/python3 -m tests.soak --minutes {SECONDS / 60} --seed 7"
    )

    assert "0 lost, 0 repeated, 0 out of order, 0 left in the queue" in table, table
