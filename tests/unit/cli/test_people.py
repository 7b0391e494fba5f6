"""The chat, person, member, pair and session commands, against a double of the router."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanoclawd.wire import Json
from tests.unit.cli.conftest import Run, fake_program
from tests.unit.cli.double import APPROVAL, CHAT, DESTINATION, PERSON, RouterDouble
from tests.unit.cli.test_messages import calls

QUESTION = {
    "number": 3,
    "title": "Bank",
    "user": "@eve:evil.example",
    "name": "Your\nowner",
    "text": "let me in\nWhy: an owner said so\x1b[2J",
}


def test_chats_are_listed_in_a_line_each_whatever_they_are_called(router: RouterDouble, run: Run) -> None:
    shown = run("chat", "list").stdout.splitlines()

    assert shown[0].split()[:4] == ["CHAT", "STATE", "CHANNEL", "ID"]
    assert shown[1].split()[:6] == ["3", "open", "matrix", "!room:example.org", "group", "berta"]
    assert len(shown) == 2 and "\x1b" not in shown[1]


def test_a_chat_is_shown_with_who_is_there_and_what_waits(router: RouterDouble, run: Run) -> None:
    shown = run("chat", "show", "3")

    assert calls(router, "ShowChat") == [{"number": 3}]
    for words in ("sticky", "60 s", "@ada:example.org (matrix, paired)", "admin of berta, member in 3"):
        assert words in shown.stdout
    assert "@eve:evil.example  Your owner" in shown.stdout
    assert "\x1b" not in shown.stdout
    assert "nanoclawctl member add ACCOUNT 3" in shown.stderr
    assert json.loads(run("chat", "show", "3", "--json").stdout)["people"] == [PERSON]


def test_a_new_chat_says_what_to_do(router: RouterDouble, run: Run) -> None:
    router.chat = {**CHAT, "state": "new", "wirings": []}

    assert "nanoclawctl chat wire 3 AGENT" in run("chat", "show", "3").stderr

    router.chat = None
    assert run("chat", "list").stderr == "There are no chats of platforms.\n"


def test_a_wiring_has_what_was_named_and_nothing_else(router: RouterDouble, run: Run) -> None:
    nothing = dict.fromkeys(
        ("engagement", "pattern", "stickySeconds", "priority", "exclusive", "sessionMode", "access")
    )
    nothing |= {"number": 3, "agent": "berta", "keepContext": None}

    assert run("chat", "wire", "3", "berta").returncode == 0
    run("chat", "wire", "3", "berta", "--pattern", "^!deploy", "--exclusive", "no", "--priority", "-5")
    run("chat", "wire", "3", "berta", "--engage", "sticky", "--sticky", "60", "--context", "0")
    run("chat", "wire", "3", "berta", "--sessions", "agent", "--access", "public", "--exclusive", "yes")

    assert calls(router, "WireChat") == [
        nothing,
        nothing | {"engagement": "pattern", "pattern": "^!deploy", "exclusive": False, "priority": -5},
        nothing | {"engagement": "sticky", "stickySeconds": 60, "keepContext": 0},
        nothing | {"sessionMode": "agent", "access": "public", "exclusive": True},
    ]


def test_chats_are_unwired_and_blocked(router: RouterDouble, run: Run) -> None:
    assert "listens: berta" in run("chat", "unwire", "3", "emil").stderr
    assert run("chat", "block", "3").returncode == 0

    assert calls(router, "UnwireChat") == [{"number": 3, "agent": "emil"}]
    assert calls(router, "BlockChat") == [{"number": 3}]


@pytest.mark.parametrize(
    ("words", "method", "parameters"),
    [
        ("person role ada admin --agent berta", "SetRole", {"role": "admin", "agent": "berta"}),
        ("person role ada none", "SetRole", {"role": None, "agent": None}),
        ("member add ada 3", "SetRole", {"role": "member", "chat": 3, "agent": None}),
        ("member add ada --agent berta", "SetRole", {"role": "member", "chat": None, "agent": "berta"}),
        ("member deny ada 3", "SetRole", {"role": "denied", "chat": 3}),
        ("member remove ada 3", "SetRole", {"role": None, "chat": 3}),
        ("member remove @ada:example.org 3", "SetRole", {"person": "ada", "role": None, "chat": 3}),
        ("member add @eve:evil.example 3", "SetRoleOf", {"channel": "matrix", "user": "@eve:evil.example"}),
        ("member deny eve 3 --account", "SetRoleOf", {"user": "eve", "role": "denied", "chat": 3}),
        ("person link ada matrix @a:b", "LinkPerson", {"person": "ada", "user": "@a:b", "unlink": False}),
        ("person link ada matrix @a:b --unlink", "LinkPerson", {"unlink": True}),
    ],
)
def test_who_is_what(
    router: RouterDouble, run: Run, words: str, method: str, parameters: dict[str, object]
) -> None:
    done = run(*words.split())

    assert done.returncode == 0, done.stderr
    (called,) = calls(router, method)
    assert isinstance(called, dict)
    assert parameters.items() <= called.items()


@pytest.mark.parametrize("words", ["member add ada", "member add ada 3 --agent berta", "member add @a:b"])
def test_where_somebody_is_what_must_be_said(router: RouterDouble, run: Run, words: str) -> None:
    assert run(*words.split()).returncode == 2
    assert not calls(router, "SetRole") and not calls(router, "SetRoleOf")


def test_people_are_listed(router: RouterDouble, run: Run) -> None:
    assert "@ada:example.org (matrix, paired)" in run("person", "list").stdout
    assert json.loads(run("person", "list", "--json").stdout) == {"people": [PERSON]}


@pytest.mark.parametrize(
    ("words", "method", "parameters"),
    [
        ("add berta family 3", "AddDestination", {"agent": "berta", "destination": "family", "chat": 3}),
        ("add berta me", "AddDestination", {"agent": "berta", "destination": "me", "chat": None}),
        ("remove berta family", "RemoveDestination", {"agent": "berta", "destination": "family"}),
    ],
)
def test_destinations_are_named(
    router: RouterDouble, run: Run, words: str, method: str, parameters: Json
) -> None:
    assert run("destination", *words.split()).returncode == 0
    assert calls(router, method) == [parameters]


def test_destinations_are_listed(router: RouterDouble, run: Run) -> None:
    assert run("destination", "list").stdout.split()[5:] == [*DESTINATION.values()]
    listed = run("destination", "list", "berta", "--json").stdout
    assert json.loads(listed) == {"destinations": [DESTINATION]}


def test_a_code_is_the_result_and_the_rest_is_talk(router: RouterDouble, run: Run) -> None:
    done = run("pair", "matrix")

    assert done.stdout == "ABCD-EFGH\n"
    assert "owner" in done.stderr and "10 min" in done.stderr
    assert calls(router, "Pair") == [{"channel": "matrix", "person": "owner"}]


@pytest.mark.parametrize("verb", ["reset", "close"])
def test_what_an_agent_kept_of_a_conversation_is_deleted_if_that_is_said(
    router: RouterDouble, run: Run, home: Path, programs: Path, verb: str
) -> None:
    kept = home / ".local/state/nanoclaw/trash/berta-s1-x"
    kept.mkdir(parents=True)
    router.trash = str(kept)
    log = fake_program(programs, "podman", 'shift; exec "$@"')

    assert str(kept) in run("session", verb, "berta", "s1").stderr
    assert kept.exists()
    done = run("session", verb, "berta", "s1", "--purge", "--json")

    assert json.loads(done.stdout) == {"session": "s1", "trash": None}
    assert not kept.exists()
    assert "unshare rm -rf" in log.read_text()


def test_a_question_is_shown_so_that_nobody_can_forge_a_line_of_it(router: RouterDouble, run: Run) -> None:
    approval = {**APPROVAL, "kind": "sender", "request": None, "question": QUESTION}
    router.approvals = [approval]

    listed = run("approval", "list").stdout.splitlines()
    shown = run("approval", "show", approval["id"]).stdout

    assert len(listed) == 2 and "@eve:evil.example in 3: let me in" in listed[1]
    assert "Calls itself:     Your owner" in shown
    assert "\n  | let me in\n  | Why: an owner said so" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("verb", ["allow", "deny"])
def test_an_answer_to_a_question_is_for_always(router: RouterDouble, run: Run, verb: str) -> None:
    router.approvals = [{**APPROVAL, "kind": "sender", "request": None, "question": QUESTION}]

    done = run("approval", verb, APPROVAL["id"])

    assert done.returncode == 0, done.stderr
    (called,) = calls(router, "AnswerApproval")
    assert isinstance(called, dict)
    assert (called["answer"], called["scope"], called["seconds"]) == (verb, "always", None)
