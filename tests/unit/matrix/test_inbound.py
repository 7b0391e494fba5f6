"""What events say, also those that somebody has made to be wrong."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoclaw_matrix.inbound import (
    Malformed,
    Reacted,
    Said,
    TookBack,
    clean_name,
    names_account,
    parse_event,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def event(content: Any, kind: str = "m.room.message", **more: Any) -> dict[str, Any]:
    return {"event_id": "$1", "sender": "@ada:x", "type": kind, "content": content, **more}


def said(**content: Any) -> Said:
    parsed = parse_event(event({"msgtype": "m.text", "body": "hi", **content}))
    assert isinstance(parsed, Said)
    return parsed


def test_a_text_is_its_markdown() -> None:
    html = {"format": "org.matrix.custom.html", "formatted_body": "<b>hi</b>"}
    assert said().text == "hi"
    assert said(**html).text == "**hi**"
    assert said(**(html | {"format": "other"})).text == "hi"
    assert said(msgtype="m.emote").text == "*hi*"
    assert said(msgtype="m.notice").notice and not said().notice


def test_threads_and_answers_are_told_apart() -> None:
    thread = {"rel_type": "m.thread", "event_id": "$root", "m.in_reply_to": {"event_id": "$before"}}
    assert (said(**{"m.relates_to": thread}).thread, said(**{"m.relates_to": thread}).answers) == (
        "$root",
        "$before",
    )
    fallback = said(**{"m.relates_to": {**thread, "is_falling_back": True}})
    assert (fallback.thread, fallback.answers) == ("$root", None)
    quoted = {"m.in_reply_to": {"event_id": "$before"}}
    answer = said(body="> <@bot:x> one\n> two\n\nthree", **{"m.relates_to": quoted})
    assert (answer.text, answer.answers) == ("three", "$before")


def test_an_edit_has_the_whole_new_text() -> None:
    new = {"m.new_content": {"msgtype": "m.text", "body": "right"}}
    edit = said(body="* right", **new, **{"m.relates_to": {"rel_type": "m.replace", "event_id": "$0"}})
    assert (edit.edits, edit.text) == ("$0", "right")


def test_a_file_has_its_caption_apart() -> None:
    info = {"mimetype": "image/png", "size": 3}
    plain = said(msgtype="m.image", body="../a.png", url="mxc://x/y", info=info)
    captioned = said(msgtype="m.image", body="look", filename="a.png", url="mxc://x/y", info=info)

    assert plain.attachment is not None and captioned.attachment is not None
    assert (plain.text, plain.attachment.name, plain.attachment.size) == ("", "a.png", 3)
    assert (captioned.text, captioned.attachment.name) == ("look", "a.png")


def test_reactions_and_what_was_taken_back() -> None:
    relation = {"m.relates_to": {"rel_type": "m.annotation", "event_id": "$0", "key": "👍"}}
    assert parse_event(event(relation, "m.reaction")) == Reacted(
        event="$1", sender="@ada:x", target="$0", reaction="👍"
    )
    gone = TookBack(event="$1", sender="@ada:x", target="$0")
    assert parse_event(event({}, "m.room.redaction", redacts="$0")) == gone
    assert parse_event(event({"redacts": "$0"}, "m.room.redaction")) == gone


def test_nothing_for_an_agent() -> None:
    assert parse_event(event({})) is None
    assert parse_event(event({"msgtype": "m.key.verification.request", "body": "x"})) is None
    assert parse_event(event({}, "m.room.member")) is None


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"msgtype": "m.text"},
        {"msgtype": "m.text", "body": 3},
        {"msgtype": "m.text", "body": "x", "m.relates_to": 3},
        {"msgtype": "m.text", "body": "x", "m.relates_to": {"rel_type": "m.thread", "event_id": 3}},
        {"msgtype": "m.text", "body": "x", "m.relates_to": {"rel_type": "m.thread", "event_id": "$" * 256}},
        {"msgtype": "m.text", "body": "x", "m.relates_to": {"m.in_reply_to": {"event_id": "a\nb"}}},
        {"msgtype": "m.file", "body": "x", "url": None},
    ],
)
def test_what_is_malformed_is_refused(content: Any) -> None:
    with pytest.raises(Malformed):
        parse_event(event(content))


@given(JSON, JSON, st.sampled_from(["m.room.message", "m.reaction", "m.room.redaction", "m.sticker"]))
def test_anything_else_is_refused_or_understood(content: Any, relation: Any, kind: str) -> None:
    if isinstance(content, dict):
        content = {"msgtype": "m.text", "body": "x", "m.relates_to": relation, **content}
    for source in (event(content, kind), {"type": kind, "content": content}):
        try:
            parse_event(source)
        except Malformed:
            continue


def test_a_name_is_that_of_a_file_alone() -> None:
    assert clean_name("../../etc/passwd") == "passwd"
    assert clean_name("a\\b\u202ec.txt") == "bc.txt"
    assert clean_name("..") == "file"
    assert len(clean_name("ä" * 500).encode()) <= 200


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("@bot:example.org: hi", True),
        ("hey @bot", True),
        ("Claw, please", True),
        ("clawed", False),
        ("bot@example.org", False),
        ("@bottle", False),
        ("robot", False),
    ],
)
def test_a_mention_without_a_mark_is_a_word(text: str, named: bool) -> None:
    assert names_account(text, "@bot:example.org", "Claw") is named
