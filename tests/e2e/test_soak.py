"""The short form of tests/soak/run: a few seconds of what that does for an hour."""

from __future__ import annotations

from tests.support.machine import Machine

SECONDS = 15
#: What systemd says of what was killed, and we of the turns that it cost and of those that fail on purpose.
KILLED = r"code=killed, status=9/KILL|code=exited, status=137|Failed with result '(signal|exit-code)'"
FAILED = r"message-failed: .*retrying|message-dead: |gateway-away: .*retrying"


def test_mixed_traffic_with_restarts_and_kills_loses_and_repeats_nothing(machine: Machine) -> None:
    machine.expect_journal(rf"nanoclaw\S* <\d> .*({KILLED})|{FAILED}")

    soak = ("python3", "-m", "tests.soak", "--minutes", str(SECONDS / 60), "--seed", "7")
    done = machine.run(*soak, cwd=machine.project, check=False, timeout_s=600)

    said = done.stdout + done.stderr
    assert "0 lost, 0 repeated, 0 out of order, 0 left in the queue" in said, said
    assert done.returncode == 0, said
