"""The program of selftest: how it judges an attempt, and the provider that runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from runner import containment
from tests.unit.runner.conftest import AGENT_IMAGE, Runner

LAYERS = {
    *("namespace", "mount", "seccomp", "capability", "uid", "kernel", "limit"),
    *("gateway", "router"),
}
#: Each in a process of its own, as containment.py itself runs; "attempt" is what Python does there.
JUDGE = """
import json, os, signal, sys, time
from runner import containment
from runner.containment import Held, Probe, Untried, run
containment.PROBE_S = 0.5
def refuse(number): raise OSError(number, "")
def say(exc): raise exc
attempt = lambda _: eval(sys.argv[1])
row = run(Probe("name", "tries", sys.argv[2], attempt, "need"), {"absent": json.loads(sys.argv[3])})
print(json.dumps([row["result"], row["by"], row["detail"]]))
"""


def judge(attempt: str, by: str = "mount", absent: str = "{}") -> list[str]:
    command = [sys.executable, "-c", JUDGE, attempt, by, absent]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=AGENT_IMAGE)
    found: list[str] = json.loads(done.stdout)
    return found


def test_rows_have_names_of_their_own_and_a_layer() -> None:
    names = [probe.name for probe in containment.PROBES]

    assert len(names) == len(set(names)) >= 120
    assert {probe.by for probe in containment.PROBES} <= LAYERS
    assert all(probe.tries for probe in containment.PROBES)


@pytest.mark.parametrize(
    ("attempt", "by", "wanted"),
    [
        ("'got it'", "mount", ["through", "", "got it"]),
        ("say(Held('how'))", "gateway", ["held", "gateway", "how"]),
        ("refuse(2)", "mount", ["held", "mount", "ENOENT"]),
        ("refuse(13)", "mount", ["held", "uid", "EACCES"]),
        ("refuse(30)", "uid", ["held", "mount", "EROFS"]),
        ("refuse(38)", "capability", ["held", "seccomp", "ENOSYS"]),
        ("say(TimeoutError())", "mount", ["untried", "", "no answer in time"]),
        ("say(Untried('why'))", "mount", ["untried", "", "why"]),
        ("say(KeyError('bug'))", "mount", ["untried", "", "KeyError: 'bug'"]),
        ("os.kill(os.getpid(), signal.SIGSYS)", "mount", ["held", "seccomp", "SIGSYS"]),
        ("os._exit(3)", "mount", ["untried", "", "died: 3"]),
        ("time.sleep(60)", "mount", ["untried", "", "no end within 0.5 s"]),
    ],
)
def test_what_was_not_refused_is_never_held(attempt: str, by: str, wanted: list[str]) -> None:
    assert judge(attempt, by) == wanted


def test_what_this_machine_cannot_tell_is_not_tried() -> None:
    assert judge("'got it'", absent='{"need": "it has none"}') == ["untried", "", "it has none"]


@pytest.mark.parametrize("text", ["hello", "{}", '{"do": 5}'])
def test_a_message_that_is_none_of_selftests_fails(make_runner: Callable[..., Runner], text: str) -> None:
    runner = make_runner(provider="selftest")

    runner.router.give(text)

    assert runner.router.wait("FinishTurn")["error"]["code"] == "invalid_request"


def test_the_provider_replies_what_the_program_prints(make_runner: Callable[..., Runner]) -> None:
    runner = make_runner(provider="selftest")

    runner.router.give('{"do": ["flood", "2097152"]}')

    assert runner.router.wait("FinishTurn")["replies"] == ["survived 2\n"]


def test_a_second_attempt_says_that_the_first_was_ended(make_runner: Callable[..., Runner]) -> None:
    runner = make_runner(provider="selftest")

    runner.router.give('{"do": ["flood", "2097152"]}', attempt=2)

    assert runner.router.wait("FinishTurn")["replies"] == ["ended"]
