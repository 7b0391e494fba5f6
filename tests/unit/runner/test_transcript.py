"""The transcript: whatever happened to its file, the API takes what comes out."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.transcript import Transcript, repair
from tests.support.messages_api import find_problem

ids = st.sampled_from(["a", "b", "c"])
block = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, st.sampled_from(["x", " ", ""])),
    st.builds(lambda id: {"type": "tool_use", "id": id, "name": "bash", "input": {}}, ids),
    st.builds(lambda id: {"type": "tool_result", "tool_use_id": id, "content": "y"}, ids),
)


def of_role(role: str, *kinds: str) -> st.SearchStrategy[dict[str, Any]]:
    content = st.lists(block.filter(lambda block: block["type"] in kinds), max_size=4, unique_by=str)
    return content.map(lambda content: {"role": role, "content": content})


messages = st.lists(
    st.one_of(of_role("user", "text", "tool_result"), of_role("assistant", "text", "tool_use")), max_size=8
)


@given(messages)
def test_repaired_conversation_is_valid(broken: list[dict[str, Any]]) -> None:
    user = {"role": "user", "content": [{"type": "text", "text": "hello"}]}

    whole = repair([user, *broken, user])

    assert find_problem({"model": "m", "max_tokens": 1, "messages": whole}) is None


@given(messages)
def test_repair_changes_nothing_twice(broken: list[dict[str, Any]]) -> None:
    once = repair(broken)

    assert repair(once) == once


@settings(deadline=None)  # a disk may take long over fsync(2)
@given(st.integers(min_value=0))
def test_transcript_cut_anywhere_can_be_read(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("session") / "transcript.jsonl"
    write_transcript(path)
    data = path.read_bytes()
    path.write_bytes(data[: cut % (len(data) + 1)])

    with closing(Transcript(str(path))) as again:
        again.begin(["m2"], text_message("user", "next"))

    assert find_problem({"model": "m", "max_tokens": 1, "messages": again.messages}) is None
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_lines_that_are_no_transcript_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "transcript.jsonl"
    write_transcript(path)
    path.write_text('[]\n{"message": 7}\n' + path.read_text() + "\x00\x00\n")

    with closing(Transcript(str(path))) as again:
        assert again.answered(["m1"]) == ["done"]
        assert len(again.messages) == 4


def test_forgotten_turn_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "transcript.jsonl"
    write_transcript(path)
    with closing(Transcript(str(path))) as transcript:
        before = transcript.messages

        transcript.begin(["m2"], text_message("user", "poison"))
        transcript.end("failed")
        transcript.begin(["m2"], text_message("user", "poison again"))
        transcript.end("forgotten")

        assert transcript.messages == before
    with closing(Transcript(str(path))) as again:
        assert again.messages == before


def write_transcript(path: Path) -> None:
    call = {"type": "tool_use", "id": "a", "name": "bash", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": "y"}
    with closing(Transcript(str(path))) as transcript:
        transcript.begin(["m1"], text_message("user", "hello"))
        transcript.add({"role": "assistant", "content": [call]})
        transcript.add({"role": "user", "content": [result]})
        transcript.add(text_message("assistant", "done"))
        transcript.end("answered", ["done"])


def text_message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}
