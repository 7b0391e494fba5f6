"""nanoclawctl send: once stored however often it is tried, and what counts as an answer."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from nanoclawd import limits
from nanoclawd.errors import Refused
from nanoclawd.wire import Json
from tests.unit.cli.conftest import Run
from tests.unit.cli.double import RouterDouble, activity, reply


def test_without_waiting_the_id_is_printed(router: RouterDouble, run: Run) -> None:
    done = run("send", "berta", "hello")

    assert (done.returncode, done.stdout, done.stderr) == (0, "m0123456789abcdef\n", "")
    (message,) = router.messages.values()
    assert (message["chat"], message["agent"]) == ("berta", "berta")
    assert router.reports == []


@pytest.mark.parametrize("arguments", [["-"], []], ids=["dash", "no text"])
def test_text_comes_from_a_pipe(router: RouterDouble, run: Run, arguments: list[str]) -> None:
    done = run("send", "berta", *arguments, "--wait", stdin="two\nlines\n")

    assert (done.returncode, done.stdout, done.stderr) == (0, "echo: two\nlines\n", "")


@pytest.mark.parametrize("arguments", [["--wait", "hello"], ["hello", "--wait"], ["--wait", "--", "hello"]])
def test_options_may_stand_anywhere(router: RouterDouble, run: Run, arguments: list[str]) -> None:
    assert run("send", "berta", *arguments).stdout == "echo: hello\n"


def test_text_that_looks_like_an_option_follows_two_dashes(router: RouterDouble, run: Run) -> None:
    assert run("send", "--wait", "--", "berta", "--help").stdout == "echo: --help\n"


def test_chat_of_its_own(router: RouterDouble, run: Run) -> None:
    assert run("send", "berta", "hello", "--chat", "work", "--wait").stdout == "echo: hello\n"
    assert [message["chat"] for message in router.messages.values()] == ["berta/work"]


def test_files_go_with_the_message(router: RouterDouble, run: Run, tmp_path: Path) -> None:
    for name in ("a.txt", "b.png"):
        (tmp_path / name).write_text(f"in {name}")

    done = run("send", "berta", "--file", str(tmp_path / "a.txt"), "--file", str(tmp_path / "b.png"))

    assert done.returncode == 0, done.stderr
    (message,) = router.messages.values()
    names = [(file["name"], file["mediaType"], file["bytes"]) for file in message["files"]]
    assert names == [("a.txt", "text/plain", 8), ("b.png", "image/png", 8)]
    assert (message["text"], router.received) == ("", [b"in a.txt", b"in b.png"])


@pytest.mark.parametrize("path", ["/nowhere", "/dev/zero", "/", "large"])
def test_what_is_no_file_to_send_is_refused(
    router: RouterDouble, run: Run, tmp_path: Path, path: str
) -> None:
    if path == "large":
        path = str(tmp_path / "large")
        with open(path, "wb") as file:
            file.truncate(limits.FILE_BYTES + 1)

    done = run("send", "berta", "hello", "--file", path)

    assert done.returncode == 5 and path in done.stderr
    assert not router.messages


def test_replies_are_reported_and_in_json(router: RouterDouble, run: Run) -> None:
    router.answer = lambda message: [
        reply("first", event=message["event"], key="a", kind="message"),
        reply("of another", event="another", key="b"),
        reply("second", event=message["event"], key="c"),
        activity("idle", event=message["event"]),
    ]

    done = run("send", "berta", "hello", "--wait", "--json")

    (event,) = router.messages
    assert json.loads(done.stdout) == {
        "message": "m0123456789abcdef",
        "event": event,
        "replies": [
            {"kind": "message", "text": "first", "key": "a"},
            {"kind": "reply", "text": "second", "key": "c"},
        ],
    }
    assert router.reports == ["a", "c"]


def test_notice_is_a_failure(router: RouterDouble, run: Run) -> None:
    router.answer = lambda message: [
        activity("idle", event=message["event"]),
        reply("the model is away", event=message["event"], kind="notice"),
    ]

    done = run("send", "berta", "hello", "--wait")

    assert (done.returncode, done.stdout) == (1, "the model is away\n")


def test_why_it_waits_is_told_where_it_is_known(router: RouterDouble, run: Run) -> None:
    router.answer = lambda message: [
        activity("queued", event=message["event"]),
        activity("queued", "'berta' is stopped\x07", event=message["event"]),
        reply("done", event=message["event"]),
        activity("idle", event=message["event"]),
    ]

    done = run("send", "berta", "hello", "--wait")

    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "'berta' is stopped␇\n")


def test_reply_after_a_notice_is_an_answer(router: RouterDouble, run: Run) -> None:
    router.answer = lambda message: [
        reply("it takes longer", event=message["event"], kind="notice"),
        activity("thinking", event=message["event"]),
    ]

    def finish() -> None:
        (event,) = router.messages
        router.send(reply("done", event=event), activity("idle", event=event))

    # Long after the grace that a notice alone would have had: the thinking says that it goes on.
    timer = threading.Timer(2.5, finish)
    timer.start()
    done = run("send", "berta", "hello", "--wait")
    timer.join()

    assert (done.returncode, done.stdout) == (0, "it takes longer\ndone\n")


def test_missing_idle_does_not_keep_it_waiting(router: RouterDouble, run: Run) -> None:
    router.answer = lambda message: [reply("hello", event=message["event"])]

    done = run("send", "berta", "hello", "--wait")

    assert (done.returncode, done.stdout) == (0, "hello\n")


def test_turn_without_a_reply_is_a_failure(router: RouterDouble, run: Run) -> None:
    router.answer = lambda message: [activity("idle", event=message["event"])]

    done = run("send", "berta", "hello", "--wait")

    assert (done.returncode, done.stdout) == (1, "")
    assert "without a reply" in done.stderr


def test_time_out_says_where_the_reply_will_be(router: RouterDouble, run: Run) -> None:
    router.answer = lambda _: []

    done = run("send", "berta", "hello", "--wait", "--timeout", "1", "--chat", "my work")

    assert (done.returncode, done.stdout) == (1, "")
    assert "nanoclawctl chat berta --chat 'my work'" in done.stderr


def test_broken_connection_is_tried_again_and_stored_once(router: RouterDouble, run: Run) -> None:
    router.hang_up_after_storing = True

    done = run("send", "berta", "hello", "--wait")

    assert (done.returncode, done.stdout) == (0, "echo: hello\n")
    delivered = [parameters["event"] for name, parameters in router.calls if name == "Deliver"]
    assert len(delivered) == 2
    assert len(set(delivered)) == 1


def test_restart_of_the_router_while_waiting(router: RouterDouble, run: Run) -> None:
    def hang_up(message: Json) -> list[Json]:
        router.hang_up()
        router.pending.append(reply("later", event=message["event"])["delivery"])
        return []

    router.answer = hang_up

    assert run("send", "berta", "hello", "--wait").stdout == "later\n"


def test_refusal_of_the_router_is_exit_code_5(router: RouterDouble, run: Run) -> None:
    router.fail["Deliver"] = Refused("too many messages wait", hint="later")

    done = run("send", "berta", "hello", "--wait")

    assert (done.returncode, done.stdout) == (5, "")


@pytest.mark.parametrize(
    "text",
    [b"x" * (limits.TEXT_BYTES + 1), "ü".encode() * (limits.TEXT_BYTES // 2) + b"xy", b"a\0b", b"\xff"],
    ids=["long", "long and cut in a character", "NUL", "no UTF-8"],
)
def test_text_that_no_message_can_hold_is_refused(router: RouterDouble, run: Run, text: bytes) -> None:
    done = run("send", "berta", stdin=text)

    assert (done.returncode, done.stdout) == (5, "")
    assert router.messages == {}


def test_hostile_reply_is_shown_and_not_obeyed(router: RouterDouble, run: Run) -> None:
    text = "\x1b[2J\x9b31m\r\nline\u2028\u202eevil\x00\x7f\ud800"
    router.answer = lambda message: [
        reply(text.replace("\ud800", "").replace("\x00", ""), event=message["event"]),
        activity("idle", event=message["event"]),
    ]

    plain = run("send", "berta", "hello", "--wait").stdout
    document = run("send", "berta", "hello", "--wait", "--json").stdout

    assert not set(plain + document) & set("\x1b\x9b\r\u2028\u202e\x7f")
    assert json.loads(document)["replies"][0]["text"].startswith("\x1b[2J\x9b31m\r\nline\u2028\u202eevil")
