"""The message, dead letter and database commands, against a double of the router."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Run, fake_program
from tests.unit.cli.double import DELIVERY, MESSAGE, RouterDouble


def calls(router: RouterDouble, method: str) -> list[object]:
    return [parameters for name, parameters in router.calls if name == method]


def test_messages_are_listed_in_a_line_each(router: RouterDouble, run: Run) -> None:
    router.message = MESSAGE | {"text": "a\n" + "b" * 500}

    shown = run("message", "list", "berta", "--state", "dead", "--limit", "7").stdout.splitlines()

    assert calls(router, "ListMessages") == [{"agent": "berta", "state": "dead", "limit": 7}]
    assert shown[0].split() == ["MESSAGE", "STATE", "RECEIVED", "AGENT", "CHAT", "TRIES", "TEXT"]
    assert shown[1].startswith("m0123456789abcdef  dead ") and shown[1].endswith("a bbbbb" + "b" * 52 + "…")
    assert len(shown) == 2


def test_a_message_is_shown_with_its_text_its_deliveries_and_its_journal(
    router: RouterDouble, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "UTC")
    shown = run("message", "show", "m0123")

    assert calls(router, "ShowMessage") == [{"id": "m0123"}]
    message, _, delivery = shown.stdout.partition("\n\nKey: ")
    for line in (
        *("Id:               m0123456789abcdef", "State:            dead", "Reason:           it broke"),
        *("Attempts:         4", "Deferrals:        2", "Ended at:         1970-01-01 00:00:02"),
        "What is␛ new?",
    ):
        assert line in message.splitlines()
    assert "m0123456789abcdef.notice" in delivery
    assert not {"Receipt", "Dropped", "Lease"} & {
        line.partition(":")[0] for line in shown.stdout.splitlines()
    }
    assert "journalctl --user NANOCLAWD_MESSAGE=m0123456789abcdef" in shown.stderr


def test_a_message_as_json_has_all_fields_of_the_interface(router: RouterDouble, run: Run) -> None:
    shown = json.loads(run("message", "show", "m0123", "--json").stdout)

    assert shown == {"message": MESSAGE, "deliveries": [DELIVERY]}


def test_dead_letters_are_listed_with_their_reasons(router: RouterDouble, run: Run) -> None:
    shown = run("deadletter", "list").stdout.splitlines()

    assert shown[1].split()[:2] == ["m0123456789abcdef", "message"]
    assert shown[1].endswith("it broke")
    assert shown[2].split()[:2] == ["m0123456789abcdef.notice", "notice"]


@pytest.mark.parametrize(
    ("verb", "method", "says"),
    [("retry", "RetryDeadLetter", "is tried again."), ("drop", "DropDeadLetter", "is dropped.")],
)
def test_all_dead_letters_are_seen_to(
    router: RouterDouble, run: Run, verb: str, method: str, says: str
) -> None:
    done = run("deadletter", verb, "--all")

    ids = [MESSAGE["id"], DELIVERY["key"]]
    assert calls(router, method) == [{"id": id} for id in ids]
    assert done.stderr == "".join(f"{id} {says}\n" for id in ids)


def test_without_dead_letters_there_is_nothing_to_do(router: RouterDouble, run: Run) -> None:
    router.letters = []

    assert run("deadletter", "list").stderr == "There are no dead letters.\n"
    assert run("deadletter", "retry", "--all").stderr == "There are no dead letters.\n"


def test_a_dead_letter_that_is_refused_does_not_keep_the_others(router: RouterDouble, run: Run) -> None:
    done = run("deadletter", "retry", "m1", "gone", "m2")

    assert done.returncode == 5
    assert done.stderr.splitlines() == [
        "m1 is tried again.",
        "m2 is tried again.",
        "error: there is no agent 'gone' any more",
        "hint: add it",
    ]


def test_a_backup_is_moved_to_where_the_person_wants_it(router: RouterDouble, run: Run, home: Path) -> None:
    router.backup = home / "made"
    router.backup.write_bytes(b"all of it")

    assert run("backup", "kept").returncode == 0

    assert (home / "kept").read_bytes() == b"all of it"
    assert (home / "kept").stat().st_mode & 0o777 == 0o600
    assert not router.backup.exists()


@pytest.mark.parametrize(("target", "code"), [("there", 5), ("nowhere/x", 1)])
def test_a_backup_that_cannot_be_written_leaves_nothing_and_overwrites_nothing(
    router: RouterDouble, run: Run, home: Path, target: str, code: int
) -> None:
    (home / "there").write_text("something else")
    router.backup = home / "made"
    router.backup.write_bytes(b"all of it")

    assert run("backup", target).returncode == code

    assert (home / "there").read_text() == "something else"
    assert not router.backup.exists()


def test_a_backup_is_restored_while_nothing_runs(run: Run, home: Path, programs: Path) -> None:
    fake_program(programs, "systemctl", "exit 3")

    done = run("restore", "none")

    assert done.returncode == 4
    assert "none: there is no such file" in done.stderr


def test_restore_is_refused_while_the_router_runs(run: Run, home: Path, programs: Path) -> None:
    log = fake_program(programs, "systemctl", "exit 0")

    done = run("restore", "none")

    assert done.returncode == 5
    units = "nanoclaw.service nanoclaw.socket nanoclaw-channel.socket"
    assert f"systemctl --user stop {units}" in done.stderr
    assert log.read_text() == f"--user is-active --quiet {units}\n"
