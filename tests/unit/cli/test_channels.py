"""nanoclawctl channel: what it asks of the router, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanoclawd.cli.doctor import MISSING, OK, WARNING, check_channels
from nanoclawd.wire import Json
from tests.unit.cli.conftest import Run
from tests.unit.cli.double import CHANNEL, CHECK, RouterDouble


def calls(router: RouterDouble, method: str) -> list[Json]:
    return [parameters for name, parameters in router.calls if name == method]


def test_settings_are_values_of_toml_or_else_texts(router: RouterDouble, run: Run) -> None:
    settings = (
        "server=https://example.org",
        "port=8008",
        "encrypted=true",
        'rooms=["a"]',
        "empty=",
        "a=b=c",
    )

    done = run("channel", "add", "home", "--kind", "matrix", *settings)

    assert "nanoclawctl channel login home" in done.stderr
    values = {"server": "https://example.org", "port": 8008, "encrypted": True, "rooms": ["a"]}
    assert calls(router, "AddChannel") == [
        {"name": "home", "kind": "matrix", "settings": {**values, "empty": "", "a": "b=c"}}
    ]


@pytest.mark.parametrize(
    "words", ["channel add home", "channel add home --kind matrix server", "channel add home --kind m a.b=1"]
)
def test_what_cannot_be_understood_is_not_asked(router: RouterDouble, run: Run, words: str) -> None:
    assert run(*words.split()).returncode == 2
    assert not calls(router, "AddChannel")


@pytest.mark.parametrize(
    ("how", "state"),
    [
        ({}, "connected"),
        ({"problem": "home.toml:1: is broken"}, "broken"),
        ({"activeState": "failed"}, "failed"),
        ({"activeState": "activating", "subState": "auto-restart"}, "auto-restart"),
        ({"health": ""}, "active"),
        ({"healthAge": 600.0}, "silent for 10 min"),
    ],
)
def test_list_says_how_each_is(router: RouterDouble, run: Run, how: Json, state: str) -> None:
    router.channel |= how

    assert state in run("channel", "list").stdout
    assert json.loads(run("channel", "list", "--json").stdout) == {"channels": [router.channel]}


def test_status_shows_what_is_known(router: RouterDouble, run: Run) -> None:
    router.channel |= {"lastError": "busy\x1b[2J", "sandbox": [{**CHECK, "active": False}]}

    shown = run("channel", "status", "home").stdout

    for words in ("connected", "2 deliveries wait", "busy", "@bot:example.org", "threads, textBytes 4000"):
        assert words in shown
    assert "sandbox not active" in shown and "\x1b" not in shown


def test_login_waits_for_what_the_adapter_says(router: RouterDouble, run: Run) -> None:
    connecting = {"health": "connecting"}
    router.channel_turns = [{}, {"health": ""}, connecting, {"health": "connected"}]

    done = run("channel", "login", "home", stdin="s3cret\n")

    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "Logged in as @bot:example.org.")
    assert [name for name, _ in router.calls if name in ("NoteSecret", "RestartChannel")] == [
        "NoteSecret",
        "RestartChannel",
    ]
    assert "s3cret" not in json.dumps(router.calls) + done.stdout + done.stderr


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"health": "login", "healthText": "wrong password"}, "cannot log in: wrong password"),
        ({"health": "failed", "healthText": "no such server"}, "cannot log in: no such server"),
        ({"health": "", "activeState": "failed"}, "has ended"),
    ],
)
def test_login_that_fails_says_why(router: RouterDouble, run: Run, said: Json, words: str) -> None:
    router.channel_turns = [{}, said]

    done = run("channel", "login", "home", stdin="wrong")

    assert (done.returncode, words in done.stderr) == (1, True), done.stderr


def test_login_is_removed_with_the_channel(router: RouterDouble, run: Run, home: Path) -> None:
    router.channel_turns = [{}, {}]
    run("channel", "login", "home", stdin="s3cret")
    asked = run("channel", "remove", "home")
    removed = run("channel", "remove", "home", "--yes")

    assert (asked.returncode, removed.returncode) == (2, 0), removed.stderr
    assert calls(router, "RemoveChannel") == [{"name": "home"}]
    assert json.loads(run("secret", "list", "--json").stdout) == {"secrets": []}


@pytest.mark.parametrize(
    ("how", "state"),
    [
        ({}, OK),
        ({"problem": "it is broken"}, MISSING),
        ({"activeState": "failed"}, MISSING),
        ({"health": "login"}, MISSING),
        ({"health": "degraded"}, WARNING),
        ({"health": ""}, WARNING),
    ],
)
def test_doctor_looks_at_each(how: Json, state: str) -> None:
    (check,) = check_channels([{**CHANNEL, **how}])

    assert check.state == state
    assert (check.todo == "") == (state == OK)
