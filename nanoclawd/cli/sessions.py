"""The session commands."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable

from nanoclawd.cli import control, output
from nanoclawd.wire import Json


def list_(options: Namespace) -> None:
    with control.suggesting(options.AGENT or ""):
        replies = list(control.stream("ListSessions", {"agent": options.AGENT}))
    sessions = [reply["session"] for reply in replies if reply.get("session")]
    if options.json:
        return output.say_json({"sessions": sessions})
    if not sessions:
        return output.talk("There are no sessions: one begins with the first message.")
    say_sessions(sessions)


def say_sessions(sessions: Iterable[Json]) -> None:
    output.say_table(
        ("AGENT", "SESSION", "STATE", "QUEUED", "CHANNEL", "CHAT", "THREAD", "MESSAGE"), map(_row, sessions)
    )


def _row(session: Json) -> tuple[object, ...]:
    return tuple(
        session.get(key) if session.get(key) is not None else ""
        for key in ("agent", "session", "state", "queued", "channel", "chat", "thread", "message")
    )
