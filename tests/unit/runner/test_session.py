"""The life of a runner: work, stop, good-bye, and a router that comes and goes."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.unit.runner.conftest import Runner
from tests.unit.runner.router_double import WAIT_S

MakeRunner = Callable[..., Runner]


def test_message_is_answered(make_runner: MakeRunner) -> None:
    runner = make_runner()

    runner.router.give("hello\0 there \ud83d")

    finish = runner.router.wait("FinishTurn")
    assert finish == {
        "turn": "t1",
        "outcome": "answered",
        "replies": ["hello there ?"],
        "answers": ["m-t1"],
        "last": "m-t1",
    }


def test_ready_is_said_after_hello(make_runner: MakeRunner) -> None:
    runner = make_runner()

    first = runner.notification()

    assert first.startswith("READY=1\nSTATUS=provider ")
    assert runner.router.count("Hello") >= 1


def test_turn_that_waits_is_taken_at_start(make_runner: MakeRunner) -> None:
    runner = make_runner()
    runner.router.give("one", id="a")
    runner.router.wait("FinishTurn")

    runner.router.give("two", id="b")

    assert runner.router.wait("FinishTurn", 2)["replies"] == ["two"]


def test_lease_is_renewed_while_the_turn_runs(make_runner: MakeRunner) -> None:
    runner = make_runner(heartbeatSeconds=0.3)

    runner.router.give("/sleep 30")

    assert runner.router.wait("RenewTurn", 3) == {"turn": "t1"}
    assert runner.router.count("FinishTurn") == 0


def test_turn_whose_lease_is_lost_is_dropped(make_runner: MakeRunner) -> None:
    runner = make_runner(heartbeatSeconds=0.3)
    runner.router.give("/sleep 30")
    runner.router.wait_activity("thinking")

    runner.router.turn = None
    runner.router.wait("RenewTurn", 1)
    runner.router.give("next", id="t2")

    assert runner.router.wait("FinishTurn")["turn"] == "t2"


def test_stop_ends_the_turn(make_runner: MakeRunner) -> None:
    runner = make_runner()
    runner.router.give("/sleep 30\nnever")
    runner.router.wait_activity("thinking")

    runner.router.stop()

    finish = runner.router.wait("FinishTurn")
    assert finish == {"turn": "t1", "outcome": "stopped", "replies": [], "last": "m-t1"}


def test_stop_of_another_turn_is_ignored(make_runner: MakeRunner) -> None:
    runner = make_runner()
    runner.router.give("/sleep 0.3\nsaid")
    runner.router.wait_activity("thinking")

    runner.router.stop("t0")

    assert runner.router.wait("FinishTurn")["replies"] == ["said"]


def test_message_in_mid_turn_is_sent_with_its_key(make_runner: MakeRunner) -> None:
    runner = make_runner()

    runner.router.give("/send one\n/send two")

    assert runner.router.wait("SendMessage", 2) == {"turn": "t1", "key": "m-t1.2", "text": "two"}


def test_message_that_arrives_in_mid_turn_joins_it(make_runner: MakeRunner) -> None:
    runner = make_runner()
    runner.router.joining = [{"id": "m-2", "sender": "Bob", "receivedAt": 1.0, "text": "two", "context": []}]

    runner.router.give("one")

    finish = runner.router.wait("FinishTurn")
    assert (finish["replies"], finish["answers"]) == (["one", "two"], ["m-t1", "m-2"])
    assert finish["last"] == "m-2"
    taken = [parameters for method, parameters in runner.router.calls if method == "TakeMessages"]
    assert [parameters["last"] for parameters in taken] == ["m-t1", "m-2"]


def test_agent_sees_what_became_of_what_it_said(make_runner: MakeRunner) -> None:
    runner = make_runner()
    runner.router.deliveries = [
        {"kind": "reply", "text": "one", "state": "sent", "attempts": 1, "reason": ""},
        {"kind": "message", "text": "two", "state": "failed", "attempts": 36, "reason": "no such room"},
    ]

    runner.router.give("/deliveries")

    assert runner.router.wait("FinishTurn")["replies"] == ["sent: one\nfailed: two"]


def test_later_attempt_knows_what_was_sent(make_runner: MakeRunner) -> None:
    runner = make_runner()

    runner.router.give("/sent", attempt=2, sent={"k": "one"})

    assert runner.router.wait("FinishTurn")["replies"] == ["attempt 2, already sent: 'one'"]


def test_failure_is_reported_with_its_code(make_runner: MakeRunner) -> None:
    runner = make_runner()

    runner.router.give("/fail rate_limit 7")

    finish = runner.router.wait("FinishTurn")
    assert finish["outcome"] == "failed"
    assert finish["error"] == {
        "code": "rate_limit",
        "message": "The echo provider was told to fail.",
        "retryable": True,
        "retryAfterSeconds": 7.0,
    }


def test_bug_in_a_provider_fails_the_turn_only(make_runner: MakeRunner) -> None:
    runner = make_runner()

    runner.router.give("/sleep much")
    error = runner.router.wait("FinishTurn")["error"]
    runner.router.give("again", id="t2")

    assert error["code"] == "internal"
    assert "Traceback" not in error["message"]
    assert runner.router.wait("FinishTurn", 2)["replies"] == ["again"]


def test_turn_goes_on_when_the_router_restarts(make_runner: MakeRunner) -> None:
    runner = make_runner()
    runner.router.give("/send once\n/sleep 0.5\ndone")
    runner.router.wait("SendMessage")

    up = runner.router.restart()
    up()

    assert runner.router.wait("FinishTurn")["replies"] == ["done"]
    assert runner.router.count("SendMessage") == 1


def test_finish_waits_for_a_router_that_is_away(make_runner: MakeRunner) -> None:
    runner = make_runner()
    runner.router.give("/sleep 0.2\ndone")
    runner.router.wait_activity("thinking")

    up = runner.router.restart()
    assert runner.process is not None
    assert runner.router.count("FinishTurn") == 0
    up()

    assert runner.router.wait("FinishTurn")["replies"] == ["done"]


def test_finish_is_repeated_until_it_is_answered(make_runner: MakeRunner) -> None:
    runner = make_runner()
    runner.router.finish_is_lost = True

    runner.router.give("hello")

    assert runner.router.wait("FinishTurn", 2) == runner.router.wait("FinishTurn", 1)


def test_finish_of_an_unknown_turn_is_dropped(make_runner: MakeRunner) -> None:
    runner = make_runner()
    runner.router.errors["FinishTurn"] = ("NoSuchTurn", {"turn": "t1"})
    runner.router.give("hello")
    runner.router.wait("FinishTurn")

    del runner.router.errors["FinishTurn"]
    runner.router.give("again", id="t2")

    assert runner.router.wait("FinishTurn", 2)["turn"] == "t2"


def test_reply_over_the_limit_is_shortened(make_runner: MakeRunner) -> None:
    runner = make_runner()

    runner.router.give("x" * 170_000)  # more would not fit into the socket of our one-lock double

    (reply,) = runner.router.wait("FinishTurn")["replies"]
    assert len(reply) < 161_000
    assert reply.endswith("[10000 more bytes were cut off]")


def test_nothing_to_say_back_is_said(make_runner: MakeRunner) -> None:
    runner = make_runner()

    runner.router.give(" \n ")

    assert runner.router.wait("FinishTurn")["replies"] == ["done"]


def test_other_attempt_of_the_running_turn_takes_over(make_runner: MakeRunner) -> None:
    runner = make_runner()
    runner.router.give("/sleep 30\nfirst")
    runner.router.wait_activity("thinking")

    runner.router.give("second", attempt=2)

    assert runner.router.wait("FinishTurn")["replies"] == ["second"]


def test_idle_runner_says_goodbye(make_runner: MakeRunner) -> None:
    runner = make_runner(idleSeconds=0)

    status = runner.wait_exit()

    assert status == 0
    assert runner.router.count("Goodbye") == 1


def test_goodbye_can_be_declined(make_runner: MakeRunner) -> None:
    runner = make_runner(idleSeconds=0.1)
    runner.router.stay = True
    runner.router.wait("Goodbye", 2)

    runner.router.give("hello")

    assert runner.router.wait("FinishTurn")["replies"] == ["hello"]
    runner.router.stay = False
    assert runner.wait_exit() == 0


def test_goodbye_comes_after_the_turn(make_runner: MakeRunner) -> None:
    runner = make_runner(idleSeconds=0.2)

    runner.router.give("/sleep 0.5\nhello")

    assert runner.wait_exit() == 0
    names = [name for name, _ in runner.router.calls if name in ("FinishTurn", "Goodbye")]
    assert names == ["FinishTurn", "Goodbye"]


def test_sigterm_ends_it_without_finishing(make_runner: MakeRunner) -> None:
    runner = make_runner()
    runner.router.give("/sleep 30")
    runner.router.wait_activity("thinking")
    assert runner.process is not None

    asked_at = time.monotonic()
    runner.process.send_signal(signal.SIGTERM)

    assert runner.wait_exit() == 0
    assert time.monotonic() - asked_at < WAIT_S / 2  # no time-out was waited for
    assert runner.router.count("FinishTurn") == 0


def test_other_protocol_ends_it(make_runner: MakeRunner, place: Path) -> None:
    runner = Runner(place)
    runner.router.errors["Hello"] = ("ProtocolMismatch", {"supported": 2})

    runner.start()

    try:
        assert runner.wait_exit() == 1
    finally:
        runner.close()


def test_unknown_provider_ends_it(make_runner: MakeRunner) -> None:
    runner = make_runner(provider="no_such")

    assert runner.wait_exit() == 1


def test_end_of_a_turn_is_said_again_while_the_router_cannot_write(make_runner: MakeRunner) -> None:
    runner = make_runner()
    runner.router.errors["FinishTurn"] = ("Unavailable", {"message": "the disk is full", "hint": ""})

    runner.router.give("hello")

    assert runner.router.wait("FinishTurn", 3) == runner.router.wait("FinishTurn", 1)
