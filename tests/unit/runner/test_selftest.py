"""The program of selftest: how it judges an attempt, and the provider that runs it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

import pytest

from runner.containment import gateway, router, suite
from tests.unit.runner.conftest import AGENT_IMAGE, Runner

LAYERS = {
    *("namespace", "mount", "seccomp", "capability", "uid", "kernel", "limit", "podman"),
    *("gateway", "router"),
}
#: Each in a process of its own, as the program itself runs; "attempt" is what Python does there.
JUDGE = """
import json, os, signal, sys, time
from runner.containment import suite
from runner.containment.probe import Held, Probe, Untried
suite.PROBE_S = 0.5
def refuse(number): raise OSError(number, "")
def say(exc): raise exc
attempt = lambda _: eval(sys.argv[1])
row = suite.run(Probe("name", "tries", sys.argv[2], attempt, "need"), {"absent": json.loads(sys.argv[3])})
print(json.dumps([row["result"], row["by"], row["detail"]]))
"""


def judge(attempt: str, by: str = "mount", absent: str = "{}") -> list[str]:
    command = [sys.executable, "-c", JUDGE, attempt, by, absent]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=AGENT_IMAGE)
    found: list[str] = json.loads(done.stdout)
    return found


def test_rows_have_names_of_their_own_and_a_layer() -> None:
    names = [probe.name for probe in suite.PROBES]

    assert len(names) == len(set(names)) >= 120
    assert {probe.by for probe in suite.PROBES} <= LAYERS
    assert all(probe.tries for probe in suite.PROBES)


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


PARAMETERS = {"token": "token", "tcp": 1, "allowed": 2, "turn": "t", "agent": "berta", "absent": {}}
PASSES = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\ntoken"


@contextmanager
def answering(path: Path, answer: bytes, end: bytes) -> Iterator[None]:
    """A listener that answers everything with `answer`, after what ends with `end`."""

    def serve() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:  # closed
                return
            with peer, suppress(OSError):
                peer.settimeout(0.05)
                while True:
                    data = b""
                    with suppress(TimeoutError):
                        while not data.endswith(end) and (piece := peer.recv(1 << 22)):
                            data += piece
                    if not data:
                        break
                    peer.sendall(answer)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = Thread(target=serve)
        thread.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("probe", gateway.PROBES, ids=lambda probe: probe.name)
def test_a_gateway_that_lets_all_pass_is_noticed(
    probe: suite.Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "GATEWAY", str(tmp_path / "sock"))

    with answering(tmp_path / "sock", PASSES, b"\r\n\r\n"):
        row = suite.run(probe, PARAMETERS)

    assert (row["result"], row["detail"]) == ("through", "the host answered through it")


@pytest.mark.parametrize("probe", router.PROBES, ids=lambda probe: probe.name)
def test_a_router_that_obeys_is_noticed(
    probe: suite.Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router, "HOST", str(tmp_path / "sock"))

    with answering(tmp_path / "sock", b'{"parameters": {}}\0', b"\0"):
        row = suite.run(probe, PARAMETERS)

    assert row["result"] == "through", row


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
