"""The conversation of a session as an append-only file of JSON lines, from which a new container goes on.

Each line is a message as the Messages API takes it, or says that a turn ended:

    {"input": ["m1"], "message": {"role": "user", …}}    a turn begins, with the ids of its input
    {"message": {"role": "assistant", …}}
    {"joined": ["m2"], "message": {"role": "user", …}}    further input, with the results of tools
    {"compacted": "…"}    all before this is summed up so
    {"end": "answered", "replies": ["…"]}    or "stopped", "failed", "forgotten"
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from . import journal

Message = dict[str, Any]
INTERRUPTED = "Interrupted: the turn ended before this tool did. It may have run, fully or in part."


class Transcript:
    """One writer, the runner. What was appended survives our end at once, and a power loss after end()."""

    def __init__(self, path: str, as_json: Callable[[Any], object] | None = None) -> None:
        self._as_json = as_json  #: turns what the SDK puts into messages into JSON
        self._messages: list[Message] = []
        self._turn_at = 0  # where the last turn begins in it
        self._input: list[str] = []
        self.last_end: str | None = None  #: how the last turn ended; None: it broke off, or there was none
        self._replies: list[str] = []
        size = self._read(path)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  # until close()
        self._file.truncate(size)  # a line that a crash cut off; the next one must not be glued to it

    @property
    def messages(self) -> list[Message]:
        """The conversation as the API takes it, from the last compaction on."""
        return repair(self._messages)

    def is_of(self, input: Sequence[str]) -> bool:
        """Whether the last turn had this input."""
        return self._input == list(input)

    def answered(self, input: Sequence[str]) -> list[str] | None:
        """Return the replies if the last turn had this input and was answered."""
        return list(self._replies) if self.is_of(input) and self.last_end == "answered" else None

    def begin(self, input: Sequence[str], message: Message) -> None:
        self._append({"input": list(input), "message": message})

    def add(self, message: Message, *, joined: Sequence[str] = ()) -> None:
        """Add a message of the turn; `joined` are the ids of further input in it."""
        self._append({"joined": list(joined), "message": message} if joined else {"message": message})

    def compact(self, summary: str) -> None:
        """Go on from a summary in place of all that there is."""
        self._append({"compacted": summary})

    def end(self, outcome: str, replies: Sequence[str] = ()) -> None:
        """Record how the turn ended. "forgotten": the API would refuse later turns with it too."""
        self._append({"end": outcome, "replies": list(replies)})
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _append(self, line: dict[str, Any]) -> None:
        data = json.dumps(line, separators=(",", ":"), default=self._as_json).encode() + b"\n"
        size = os.fstat(self._file.fileno()).st_size
        if self._file.write(data) != len(data):  # the disk is full: leave no half a line
            self._file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # Not `line`: what we send now is then what we would send after a restart.
        self._take(json.loads(data))

    def _take(self, line: dict[str, Any]) -> None:
        if "end" in line:
            self.last_end, self._replies = line["end"], line.get("replies", [])
            if self.last_end == "forgotten":
                del self._messages[self._turn_at :]
            return
        if "compacted" in line:
            text = f"(What was said before, summed up by you:)\n\n{line['compacted']}"
            self._messages, self._turn_at = (
                [{"role": "user", "content": [{"type": "text", "text": text}]}],
                1,
            )
            return
        message = line["message"]
        if "input" in line:
            if line["input"] != self._input or self.last_end not in (None, "failed"):
                self._turn_at = len(self._messages)  # else it is a further attempt
            self._input, self.last_end = line["input"], None
        self._input = self._input + line.get("joined", [])
        if any(block.get("type") == "compaction" for block in blocks(message)):
            self._messages.clear()  # the API ignores what comes before it
            self._turn_at = 0
        self._messages.append(message)

    def _read(self, path: str) -> int:
        """Read what is there; return the number of bytes up to the end of the last whole line."""
        try:
            with open(path, "rb") as file:
                data = file.read()
        except FileNotFoundError:
            return 0
        size = data.rfind(b"\n") + 1
        bad = 0
        for line in data[:size].splitlines():
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                bad += 1  # the agent may write here too; then it harms its own memory alone
        if bad or size != len(data):
            journal.warning("transcript-repaired", bad_lines=bad, cut_bytes=len(data) - size)
        return size


def blocks(message: Message) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def repair(messages: Sequence[Message]) -> list[Message]:
    """Return a conversation that the API takes: tool_use and tool_result blocks in pairs, nothing blank.

    A turn may end, and a container may be killed, at any moment: between a tool's call and its result too.
    """
    whole: list[Message] = []
    asked: dict[str, None] = {}  # the ids of the tool_use blocks that wait for a result, in order
    # A last, empty message of the user: what was asked in the end has no result either.
    for message in [*messages, {"role": "user", "content": []}]:
        # The API refuses text of spaces alone, even what it wrote itself.
        content = [block for block in blocks(message) if block["type"] != "text" or block["text"].strip()]
        if message["role"] == "user":
            content = [b for b in content if b["type"] != "tool_result" or b["tool_use_id"] in asked]
            for block in content:
                asked.pop(block.get("tool_use_id", ""), None)
        missing = [
            {"type": "tool_result", "tool_use_id": id, "content": INTERRUPTED, "is_error": True}
            for id in asked
        ]
        asked = {}
        if message["role"] == "user":
            _add(whole, {**message, "content": missing + content})
        else:
            _add(whole, {"role": "user", "content": missing})
            _add(whole, {**message, "content": content})
            asked = {block["id"]: None for block in content if block["type"] == "tool_use"}
    return whole


def _add(messages: list[Message], message: Message) -> None:
    """Append it, unless it is empty; one of the user to one of the user: tool results come first in it."""
    if messages and message["role"] == "user" == messages[-1]["role"]:
        messages[-1] = {"role": "user", "content": messages[-1]["content"] + message["content"]}
    elif message["content"]:
        messages.append(message)
