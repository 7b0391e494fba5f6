"""What goes to a room for a delivery."""

from __future__ import annotations

import json
from typing import Any

from nanoclaw_matrix.markup import PART_BYTES
from nanoclaw_matrix.outbound import choice_steps, plan

EVENT_BYTES = 65_536


def delivery(text: str = "hi", **more: Any) -> dict[str, Any]:
    rest = {"choices": [], "files": [], "target": None, "inReplyTo": None, "partsSent": 0, "thread": ""}
    return (
        {"key": "k", "chat": "!r", "agent": "berta", "agentName": "Berta", "kind": "reply", "text": text}
        | rest
        | more
    )


def test_ids_follow_from_the_key_and_the_part() -> None:
    text = "word " * PART_BYTES
    steps = plan(delivery(text), prefix=False)

    assert len({step.txn for step in steps}) == len(steps) > 1
    assert steps == plan(delivery(text), prefix=False)
    assert not {step.txn for step in steps} & {
        step.txn for step in plan(delivery(text, key="l"), prefix=False)
    }


def test_no_text_makes_an_event_that_is_too_long_when_encrypted() -> None:
    for text in ("&" * 3 * PART_BYTES, "😀" * PART_BYTES, '"' * 2 * PART_BYTES, "*a* " * PART_BYTES):
        for kind in ("reply", "edit"):
            for step in plan(delivery(text, kind=kind, target="$0"), prefix=True):
                # In base64, with its envelope; nio writes JSON in ASCII.
                assert len(json.dumps(step.content)) * 4 / 3 + 2000 < EVENT_BYTES


def test_an_edit_replaces_its_target_and_the_rest_comes_behind_it() -> None:
    first, second = plan(delivery("a " * PART_BYTES, kind="edit", target="$0"), prefix=False)[:2]

    assert first.content["m.relates_to"] == {"rel_type": "m.replace", "event_id": "$0"}
    assert first.content["m.new_content"]["body"].startswith("a a")
    assert "m.relates_to" not in second.content


def test_reactions_and_redactions() -> None:
    (reaction,) = plan(delivery("👍", kind="reaction", target="$0"), prefix=True)
    (redaction,) = plan(delivery("", kind="redaction", target="$0"), prefix=True)

    assert reaction.content == {"m.relates_to": {"rel_type": "m.annotation", "event_id": "$0", "key": "👍"}}
    assert (redaction.kind, redaction.target) == ("", "$0")


def test_agents_are_told_apart() -> None:
    (step,) = plan(delivery("a <b>", agentName="B<er>ta"), prefix=True, avatar="mxc://x/y")
    (notice,) = plan(delivery("news", agent="", agentName="", kind="notice"), prefix=True)

    profile = step.content["com.beeper.per_message_profile"]
    assert profile == {
        "id": "berta",
        "displayname": "B<er>ta",
        "avatar_url": "mxc://x/y",
        "has_fallback": True,
    }
    assert step.content["body"] == "B<er>ta: a <b>"
    assert (
        "<strong data-mx-profile-fallback>B&lt;er&gt;ta: </strong>a &lt;b&gt;"
        in step.content["formatted_body"]
    )
    assert (notice.content["msgtype"], notice.content["body"]) == ("m.notice", "news")


def test_threads_and_answers() -> None:
    (thread,) = plan(delivery(thread="$root", inReplyTo="$1"), prefix=False, answer=False)
    (answer,) = plan(delivery(inReplyTo="$1"), prefix=False)
    (neither,) = plan(delivery(inReplyTo="$1"), prefix=False, answer=False)

    assert thread.content["m.relates_to"] == {
        "rel_type": "m.thread",
        "event_id": "$root",
        "is_falling_back": True,
        "m.in_reply_to": {"event_id": "$1"},
    }
    assert answer.content["m.relates_to"] == {"m.in_reply_to": {"event_id": "$1"}}
    assert "m.relates_to" not in neither.content


def test_choices_are_reactions_to_be_clicked() -> None:
    steps = choice_steps(delivery(choices=["✅", "no", "№"]), "$q")

    keys = [step.content["m.relates_to"]["key"] for step in steps]
    assert keys == ["✅", "2\ufe0f\u20e3", "№"]
