"""nanoclawctl approval: what is shown of a request, and what an answer says to the router."""

from __future__ import annotations

import base64
import json

import pytest

from nanoclawd import limits
from nanoclawd.errors import Refused
from nanoclawd.policy import Unknown
from nanoclawd.wire import Json
from tests.unit.cli.conftest import Run
from tests.unit.cli.double import APPROVAL, RouterDouble


def test_list_shows_what_waits_and_says_what_it_shortens(router: RouterDouble, run: Run) -> None:
    router.approvals.append({**APPROVAL, "id": "a9", "state": "used", "scope": "once", "decidedBy": "ada"})

    lines = run("approval", "list").stdout.splitlines()
    every = json.loads(run("approval", "list", "--all", "--json").stdout)["approvals"]

    assert len(lines) == 2
    assert lines[1].split()[:2] == ["a0123abcd", "pending"]
    assert "POST http://a.example/xxx" in lines[1] and "x…" in lines[1]
    assert [approval["id"] for approval in every] == ["a0123abcd", "a9"]
    router.approvals.clear()
    assert run("approval", "list").stderr == "Nothing waits for your answer.\n"


def test_show_hides_and_obeys_nothing(router: RouterDouble, run: Run) -> None:
    shown = run("approval", "show", "a0").stdout

    assert f"http://a.example/{'x' * 300}/end\n" in shown
    assert "x-mine: 1␛[2J Host: b.example" in shown
    assert "11 bytes\n  | a␛<U+202E>b\n  | Why:" in shown
    assert "\x1b" not in shown and "\u202e" not in shown
    for words in ("5" * 64, "berta", "No rule decides.", "allow --once:", "this request"):
        assert words in shown
    document = json.loads(run("approval", "show", "a0", "--json").stdout)
    assert document["approval"]["request"] == APPROVAL["request"]


def test_show_of_what_has_no_text(router: RouterDouble, run: Run) -> None:
    request = {**APPROVAL["request"], "body": base64.b64encode(b"\xff\xfe").decode()}
    router.approvals = [{**APPROVAL, "request": request}]
    assert "2 bytes, no text: 'nanoclawctl approval show --json'" in run("approval", "show", "a0").stdout

    tunnel = {**request, "way": "tunnel", "method": "CONNECT", "url": "a.example:443", "body": ""}
    router.approvals = [{**APPROVAL, "request": tunnel}]
    shown = run("approval", "show", "a0").stdout
    assert "a.example:443, of which nothing else can be seen: it is a tunnel (https)" in shown
    assert "Body" not in shown

    router.approvals = [{**APPROVAL, "request": None}]
    assert "Somebody has changed what was asked for" in run("approval", "show", "a0").stdout
    assert "(changed by somebody)" in run("approval", "list").stdout


@pytest.mark.parametrize(
    ("words", "scope", "seconds"),
    [
        (["allow"], "once", None),
        (["allow", "--once"], "once", None),
        (["allow", "--always"], "always", None),
        (["allow", "--for", "1h"], "for", 3600),
        (["deny"], "for", int(limits.DENIAL_S)),
        (["deny", "--once"], "once", None),
        (["deny", "--for", "2d"], "for", 2 * 86_400),
        (["deny", "--always"], "always", None),
    ],
)
def test_answer_names_what_was_shown(
    router: RouterDouble, run: Run, words: list[str], scope: str, seconds: int | None
) -> None:
    done = run("approval", words[0], "a0", *words[1:])

    wanted: Json = {"id": "a0123abcd", "sha256": "5" * 64, "answer": words[0]}
    assert router.calls[-1] == ("AnswerApproval", {**wanted, "scope": scope, "seconds": seconds})
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith(
        f"a0123abcd of 'berta' is {'allowed' if words[0] == 'allow' else 'denied'}"
    )


def test_answer_says_whether_it_still_waited(router: RouterDouble, run: Run) -> None:
    assert run("approval", "allow", "a0").stderr.endswith("this once: it waited, and goes on.\n")
    router.sent = False
    assert (
        "does not wait any more: the agent has to ask for it again until"
        in run("approval", "allow", "a0").stderr
    )
    assert "by the rule 'allow a.example:80'." in run("approval", "deny", "a0", "--always").stderr
    assert json.loads(run("approval", "allow", "a0", "--json").stdout)["sent"] is False


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["allow"], 2),
        (["allow", "a0", "--once", "--always"], 2),
        (["allow", "a0", "--for", "1h", "--always"], 2),
        (["allow", "a0", "--for", "soon"], 2),
        (["allow", "b0"], 4),
        (["show", "b0"], 4),
        (["deny", "b0"], 4),
    ],
)
def test_what_cannot_be_meant_is_refused(
    router: RouterDouble, run: Run, words: list[str], code: int
) -> None:
    done = run("approval", *words)

    assert (done.returncode, done.stdout) == (code, "")
    assert not any(method == "AnswerApproval" for method, _ in router.calls)


def test_refusal_of_the_router_is_told(router: RouterDouble, run: Run) -> None:
    router.fail["AnswerApproval"] = Refused("approval a0123abcd has expired", hint="ask again")

    done = run("approval", "allow", "a0")

    assert (done.returncode, done.stdout) == (5, "")
    assert "has expired" in done.stderr and "hint: ask again" in done.stderr


def test_policy_says_what_becomes_of_the_rest(router: RouterDouble, run: Run) -> None:
    router.unknown = Unknown.ASK
    assert run("policy", "test", "berta", "https://a.example").returncode == 5
    run("policy", "allow", "berta", "b.example")

    assert "waits for your answer" in run("policy", "show", "berta").stderr
    assert json.loads(run("policy", "show", "berta", "--json").stdout)["unknown"] == "ask"
    found = run("policy", "test", "berta", "https://a.example")
    assert (found.returncode, "a person is asked" in found.stdout) == (5, True)
    assert "2 wait for your answer" in run("status").stdout


def test_ids_are_completed(router: RouterDouble, run: Run) -> None:
    assert run("_complete", "approval", "allow", "a").stdout == "a0123abcd\tberta\n"
    assert "--always" in run("_complete", "approval", "allow", "a0", "--").stdout
