"""What the model's tools have the router do: the real SDK in a real runner, a double of the router."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.messages_api import MessagesApi
from tests.unit.runner.conftest import Runner
from tests.unit.runner.router_double import DONE, Outcome
from tests.unit.runner.test_anthropic import last_user_blocks, user_text

MakeRunner = Callable[..., Runner]
HELD: Outcome = {"outcome": {"state": "held", "delivery": "", "message": "It waits as approval a1."}}


@pytest.fixture
def api(place: Path) -> Iterator[MessagesApi]:
    with MessagesApi([], unix=place / "gateway.sock") as api:
        yield api


@pytest.fixture
def runner(make_runner: MakeRunner, api: MessagesApi) -> Runner:
    return make_runner(provider="anthropic")


def use(api: MessagesApi, tool: str, **input: object) -> None:
    api.add({"tool_use": [{"name": tool, "input": input}]}, {"text": "ok"})


def result(api: MessagesApi) -> str:
    """Return what the model read of its tool."""
    _, second = api.wait_requests(2)
    return str(last_user_blocks(second)[0]["content"])


@pytest.mark.parametrize(
    ("tool", "method", "given"),
    [
        ("edit_message", "EditMessage", {"delivery": "m1/a", "text": "new"}),
        ("react", "React", {"message": "m-t1", "reaction": "👍"}),
        ("send_message", "SendMessage", {"text": "x", "destination": "boss"}),
        ("message_agent", "MessageAgent", {"agent": "emil", "text": "x"}),
        ("create_agent", "CreateAgent", {"name": "emil", "description": "d", "instructions": "i"}),
    ],
)
@pytest.mark.parametrize("outcome", [DONE, HELD], ids=["done", "held"])
def test_tools_are_methods_and_the_model_hears_what_came_of_it(
    runner: Runner, api: MessagesApi, tool: str, method: str, given: dict[str, str], outcome: Outcome
) -> None:
    runner.router.outcomes[method] = outcome
    use(api, tool, **given)

    runner.router.give("do it")

    called = runner.router.wait(method)
    assert given.items() <= called.items() and called["turn"] == "t1"
    assert ("(delivery m-t1/k)" if outcome is DONE else "waits as approval a1") in result(api)


def test_empty_text_takes_a_message_back(runner: Runner, api: MessagesApi) -> None:
    runner.router.outcomes["EditMessage"] = DONE
    use(api, "edit_message", delivery="m1/a", text="")
    runner.router.give("take it back")
    assert runner.router.wait("EditMessage")["text"] is None


def test_what_is_refused_is_told_to_the_model(runner: Runner, api: MessagesApi) -> None:
    runner.router.errors["SendMessage"] = (
        "Refused",
        {"message": "there is no destination 'boss'", "hint": "there are: none"},
    )
    use(api, "send_message", text="x", destination="boss")
    runner.router.give("do it")
    assert "there is no destination 'boss': there are: none" in result(api)


def test_file_is_sent_in_parts_and_goes_on_where_the_router_says(runner: Runner, api: MessagesApi) -> None:
    data = bytes(range(256)) * 5000
    (runner.workspace / "report.pdf").write_bytes(data)
    had: list[bytes] = []
    lost = [True, False, False]

    def put(parameters: dict[str, Any]) -> Outcome:
        part = base64.b64decode(parameters["data"])
        if len(had) == 2 and lost.pop(0):
            had.clear()  # the router was restarted
        if parameters["offset"] == sum(map(len, had)):
            had.append(part)
        return {"received": sum(map(len, had))}

    def send(parameters: dict[str, Any]) -> Outcome:
        whole = sum(map(len, had)) == parameters["bytes"]
        return DONE if whole else {"outcome": None}

    runner.router.outcomes |= {"PutFile": put, "SendFile": send}
    use(api, "send_file", path="report.pdf", caption="the report")

    runner.router.give("send it")

    assert "sent (delivery" in result(api)
    assert b"".join(had) == data
    sent = runner.router.wait("SendFile")
    assert (sent["name"], sent["mediaType"], sent["caption"]) == (
        "report.pdf",
        "application/pdf",
        "the report",
    )
    assert runner.router.count("SendFile") == 2


@pytest.mark.parametrize("path", ["nothing", "/dev/zero", "/", "fifo"])
def test_what_is_no_file_is_told_to_the_model(
    runner: Runner, api: MessagesApi, path: str, tmp_path: Path
) -> None:
    os.mkfifo(runner.workspace / "fifo")
    use(api, "send_file", path=path)
    runner.router.give("send it")
    assert "No such file" in (text := result(api)) or "directory" in text or "regular" in text
    assert runner.router.count("PutFile") == 0


def test_files_of_a_message_are_in_the_inbox(runner: Runner, api: MessagesApi) -> None:
    held = {"f1": b"one" * 400_000, "f2": b"two"}

    def read(parameters: dict[str, Any]) -> Outcome:
        part = held[parameters["id"]][parameters["offset"] :][: 512 * 1024]
        return {"data": base64.b64encode(part).decode()}

    runner.router.outcomes["ReadFile"] = read
    api.add({"text": "ok"})
    files = [
        {"id": id, "name": name, "mediaType": "text/plain", "bytes": len(held[id])}
        for id, name in (("f1", "../../x.txt"), ("f2", "../../x.txt"))
    ]

    runner.router.give("look", files=files)

    (request,) = api.wait_requests(1)
    inbox = runner.workspace / "inbox" / "m-t1"
    assert {path.name: path.read_bytes() for path in inbox.iterdir()} == {
        "_.._x.txt": held["f1"],
        "1-_.._x.txt": held["f2"],
    }
    assert f"<file>{inbox}/_.._x.txt (1200000 bytes)</file>" in user_text(request)


def test_answer_of_a_person_is_the_tools_result(runner: Runner, api: MessagesApi) -> None:
    replies = [{"state": "waiting", "answer": "", "sender": ""}] * 2
    replies.append({"state": "answered", "answer": "Tea", "sender": "@ada"})
    runner.router.outcomes["AskPerson"] = lambda parameters: replies.pop(0)
    use(api, "ask_person", question="Which?", options=["Tea", "Coffee"])

    runner.router.give("choose")

    assert result(api) == "@ada answered: Tea"
    asked = [runner.router.wait("AskPerson", number) for number in (1, 2, 3)]
    assert asked[0] == asked[1] == asked[2]


def test_turn_that_asks_can_be_stopped(runner: Runner, api: MessagesApi) -> None:
    runner.router.outcomes["AskPerson"] = {"state": "waiting", "answer": "", "sender": ""}
    use(api, "ask_person", question="Which?", options=[])
    runner.router.give("choose")
    runner.router.wait("AskPerson", 2)

    runner.router.stop()

    assert runner.router.wait("FinishTurn")["outcome"] == "stopped"
