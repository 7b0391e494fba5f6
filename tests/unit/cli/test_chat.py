"""nanoclawctl chat on a real terminal."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nanoclawd.errors import Refused
from tests.unit.cli.double import RouterDouble, activity, reply
from tests.unit.cli.terminal import Terminal

Open = Callable[..., Terminal]


@pytest.fixture
def chat(router: RouterDouble) -> Iterator[Open]:
    terminals = []

    def open_chat(*arguments: str, columns: int = 80) -> Terminal:
        terminal = Terminal("chat", "berta", *arguments, columns=columns)
        terminals.append(terminal)
        return terminal

    yield open_chat
    for terminal in terminals:
        terminal.close()


def test_question_and_answer(router: RouterDouble, chat: Open) -> None:
    terminal = chat()
    terminal.wait("you> ")

    terminal.type("hello\r")

    terminal.wait("berta>")
    terminal.wait(" echo: hello\r\n")
    terminal.wait("you> ")
    (message,) = router.messages.values()
    assert (message["chat"], message["text"]) == ("berta", "hello")
    router.wait(lambda: len(router.reports) == 1)
    terminal.type("\x04")
    assert terminal.end() == 0


def test_reply_is_on_the_screen_once_though_its_pieces_came_before(router: RouterDouble, chat: Open) -> None:
    router.answer = lambda message: []
    terminal = chat()
    terminal.wait("you> ")
    terminal.type("hello\r")
    router.wait(lambda: router.messages)
    (event,) = router.messages

    router.send(activity("text", "one two ", event=event))
    terminal.wait("one two")
    router.send(activity("tool", "bash: ls", event=event))
    terminal.wait("bash: ls")
    router.send(reply("one two three", event=event), activity("idle", event=event))

    # The preview is erased, down to the end of the screen, before the reply is printed.
    assert terminal.wait("one two three\r\n").endswith("\r\x1b[J\x1b[1mberta>\x1b[0m ")
    assert "three" not in terminal.wait("you> ")


def test_unread_replies_come_before_the_first_prompt(router: RouterDouble, chat: Open) -> None:
    router.pending.append(reply("from yesterday", event="old", key="k-old")["delivery"])

    terminal = chat()

    terminal.wait("from yesterday\r\n")
    terminal.wait("you> ")
    router.wait(lambda: router.reports == ["k-old"])


def test_message_that_comes_while_typing_leaves_the_line_alone(router: RouterDouble, chat: Open) -> None:
    terminal = chat()
    terminal.wait("you> ")
    terminal.type("half a sen")
    terminal.wait("half a sen")

    router.send(reply("by the way", event=None, kind="message"))

    terminal.wait("by the way\r\n")
    terminal.wait("half a sen")
    terminal.type("tence\r")
    terminal.wait("echo: half a sentence")


def test_many_messages_while_typing_lose_no_key(router: RouterDouble, chat: Open) -> None:
    terminal = chat()
    terminal.wait("you> ")

    for number in range(26):
        router.send(reply(f"message {number}.", event=None, kind="message"))
        terminal.type(chr(ord("a") + number))
        terminal.wait(f"message {number}.")
    terminal.type("\r")

    terminal.wait("echo: abcdefghijklmnopqrstuvwxyz\r\n")


def test_ctrl_c_stops_the_turn_and_not_the_chat(router: RouterDouble, chat: Open) -> None:
    router.answer = lambda message: [activity("thinking", event=message["event"])]
    terminal = chat()
    terminal.wait("you> ")
    terminal.type("hello\r")
    terminal.wait("berta thinks")

    terminal.type("\x03")

    terminal.wait("stopped")
    terminal.wait("you> ")
    assert router.stops == 1


def test_second_ctrl_c_goes_on_without_waiting(router: RouterDouble, chat: Open) -> None:
    router.answer = lambda message: [activity("thinking", event=message["event"])]
    router.stop_answered = False
    terminal = chat()
    terminal.wait("you> ")
    terminal.type("hello\r")
    terminal.wait("berta thinks")

    terminal.type("\x03")
    terminal.wait("stopping")
    terminal.type("\x03")

    terminal.wait("It goes on")
    terminal.wait("you> ")


def test_ctrl_c_twice_at_an_empty_prompt_leaves(chat: Open) -> None:
    terminal = chat()
    terminal.wait("you> ")

    terminal.interrupt()
    terminal.wait("Ctrl-C again")
    terminal.wait("you> ")
    terminal.interrupt()

    assert terminal.end() == 130


def test_ctrl_c_drops_what_was_typed_first(router: RouterDouble, chat: Open) -> None:
    terminal = chat()
    terminal.wait("you> ")
    terminal.type("rubbish")
    terminal.wait("rubbish")

    terminal.interrupt()
    terminal.wait("you> ")
    terminal.interrupt()
    terminal.wait("Ctrl-C again")
    terminal.wait("you> ")
    terminal.type("hello\r")

    terminal.wait("echo: hello")
    assert [message["text"] for message in router.messages.values()] == ["hello"]


def test_pasted_lines_are_one_message(router: RouterDouble, chat: Open) -> None:
    terminal = chat()
    terminal.wait("you> ")

    terminal.type("\x1b[200~one\rtwo\rthree\x1b[201~")
    terminal.type("\r")

    terminal.wait("berta>")
    assert [message["text"] for message in router.messages.values()] == ["one\ntwo\nthree"]


def test_lines_that_come_at_once_are_one_message(router: RouterDouble, chat: Open) -> None:
    """As a terminal pastes that knows no bracketed paste."""
    terminal = chat()
    terminal.wait("you> ")

    terminal.type("one\rtwo\rthree\r")

    terminal.wait("berta>")
    assert [message["text"] for message in router.messages.values()] == ["one\ntwo\nthree"]


def test_backslash_continues_a_line(router: RouterDouble, chat: Open) -> None:
    terminal = chat()
    terminal.wait("you> ")

    terminal.type("one\\\r")
    terminal.wait("… ")
    terminal.type("two\r")

    terminal.wait("berta>")
    assert [message["text"] for message in router.messages.values()] == ["one\ntwo"]


def test_keys_typed_while_the_agent_works_are_for_the_next_line(router: RouterDouble, chat: Open) -> None:
    router.answer = lambda message: [activity("thinking", event=message["event"])]
    terminal = chat()
    terminal.wait("you> ")
    terminal.type("hello\r")
    terminal.wait("berta thinks")
    assert not terminal.is_echoing()
    (event,) = router.messages

    terminal.type("next")
    router.send(reply("done", event=event), activity("idle", event=event))

    terminal.wait("done")
    terminal.wait("you> ")
    terminal.wait("next")


def test_restart_of_the_router_while_the_agent_works(router: RouterDouble, chat: Open) -> None:
    router.answer = lambda message: [activity("thinking", event=message["event"])]
    terminal = chat()
    terminal.wait("you> ")
    terminal.type("hello\r")
    terminal.wait("berta thinks")
    (event,) = router.messages

    router.hang_up()
    router.wait(lambda: [name for name, _ in router.calls].count("Attach") == 2)
    router.send(reply("after all", event=event), activity("idle", event=event))

    terminal.wait("after all\r\n")
    terminal.wait("you> ")
    router.wait(lambda: len(router.reports) == 1)


def test_restart_of_the_router_while_a_message_is_sent_stores_it_once(
    router: RouterDouble, chat: Open
) -> None:
    router.hang_up_after_storing = True
    terminal = chat()
    terminal.wait("you> ")

    terminal.type("hello\r")

    terminal.wait("echo: hello\r\n")
    assert len(router.messages) == 1
    assert [name for name, _ in router.calls].count("Deliver") == 2


def test_delivery_that_comes_again_is_reported_and_not_shown(router: RouterDouble, chat: Open) -> None:
    terminal = chat()
    terminal.wait("you> ")
    twice = reply("only once", event=None, kind="message")

    router.send(twice, twice, reply("the end", event=None, kind="message"))

    terminal.wait("only once")
    assert "only once" not in terminal.wait("the end")
    router.wait(lambda: router.reports.count(twice["delivery"]["key"]) == 2)


def test_what_a_killed_terminal_showed_is_not_shown_again(router: RouterDouble, chat: Open) -> None:
    delivery = reply("only once", event=None, kind="message", key="k-once")
    router.fail["ReportSent"] = Refused("not now")
    first = chat()
    first.wait("you> ")
    router.send(delivery)
    first.wait("only once")
    router.wait(lambda: "ReportSent" in dict(router.calls))
    first.close()
    del router.fail["ReportSent"]

    second = chat()
    assert "only once" not in second.wait("you> ")

    router.wait(lambda: router.reports == ["k-once"])


def test_refusal_gives_the_text_back(router: RouterDouble, chat: Open) -> None:
    router.fail["Deliver"] = Refused("too many messages wait", hint="wait a little")
    terminal = chat()
    terminal.wait("you> ")

    terminal.type("hello\r")

    terminal.wait("too many messages wait")
    terminal.wait("you> ")
    terminal.wait("hello")
    del router.fail["Deliver"]
    terminal.type("\r")
    terminal.wait("echo: hello")


def test_agent_cannot_drive_the_terminal(router: RouterDouble, chat: Open) -> None:
    hostile = "\x1b]52;c;ZXZpbA==\x07\x1b[2J\x9b2J\rover\u202e"
    router.answer = lambda message: [
        activity("tool", hostile, event=message["event"]),
        activity("text", hostile, event=message["event"]),
    ]
    terminal = chat()
    terminal.wait("you> ")
    terminal.type("hello\r")
    terminal.wait("over")
    (event,) = router.messages

    router.send(reply(hostile, event=event, kind="notice"), activity("idle", event=event))
    terminal.wait("notice:")
    terminal.wait("you> ")

    for forbidden in ("\x1b]", "\x1b[2J", "\x9b", "\x07", "\rover", "\u202e"):
        assert forbidden not in terminal.output


def test_rows_of_a_preview_fit_the_terminal(router: RouterDouble, chat: Open) -> None:
    router.answer = lambda message: [activity("text", "漢字" * 40 + "end", event=message["event"])]
    terminal = chat(columns=20)
    terminal.wait("you> ")
    terminal.type("hello\r")

    drawn = terminal.wait("end").rpartition("\x1b[J")[2]

    for row in drawn.split("\n"):
        assert sum(2 if char in "漢字" else 0 for char in row) <= 20


def test_history_is_kept_private_and_read_again(router: RouterDouble, chat: Open, home: Path) -> None:
    first = chat()
    first.wait("you> ")
    first.type("a back\\slash\\n\r")
    first.wait("berta>")
    first.wait("you> ")
    first.type("\x04")
    first.end()
    history = home / ".local/state/nanoclaw/terminal/history"

    second = chat()
    second.wait("you> ")
    second.type("\x1b[A\r")
    second.wait("berta>")

    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert [message["text"] for message in router.messages.values()] == ["a back\\slash\\n"] * 2


def test_stopped_agent_is_told_of(router: RouterDouble, chat: Open) -> None:
    router.agents["berta"] |= {"state": "held", "problem": "'berta' is stopped; 'nanoclawctl start --all'"}

    terminal = chat()

    terminal.wait("'berta' is stopped; 'nanoclawctl start --all'")
    terminal.wait("you> ")


def test_why_a_message_waits_is_told_where_it_is_known(router: RouterDouble, chat: Open) -> None:
    router.answer = lambda message: [
        activity("queued", "'berta' is stopped", event=message["event"]),
        activity("queued", event=message["event"]),
    ]
    terminal = chat()
    terminal.wait("you> ")

    terminal.type("hello\r")

    terminal.wait("· 'berta' is stopped")
    terminal.wait("· waits until berta has time")


def test_unknown_agent_is_told_before_anything_is_typed(router: RouterDouble) -> None:
    terminal = Terminal("chat", "bertha")

    code = terminal.end()

    terminal.close()
    assert code == 4
    assert "did you mean 'berta'?" in terminal.output
