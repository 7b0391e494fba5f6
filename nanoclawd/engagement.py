"""Which agents of a chat a message is for, of those that its sender may talk to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from nanoclawd.access import Verdict
from nanoclawd.patterns import matches


class Engagement(StrEnum):
    """When an agent takes a message. One that mentions it is always for it."""

    EVERY = "every"  #: each message
    MENTION = "mention"  #: only that, or each in a chat of two
    PATTERN = "pattern"  #: each that fits its pattern
    STICKY = "sticky"  #: after a mention, each for a while


class SessionMode(StrEnum):
    """What of a chat is one conversation of the agent."""

    CHAT = "chat"  #: all of it, whatever the thread
    THREAD = "thread"  #: each thread, and what is in none
    AGENT = "agent"  #: one for all chats of the agent that have this mode


@dataclass(frozen=True, kw_only=True, slots=True)
class Wiring:
    """An agent that listens in a chat."""

    id: int
    chat: int
    agent: str
    engagement: Engagement
    pattern: str = ""
    sticky_seconds: int = 0
    sticky_until: int = 0  #: ms
    priority: int = 0  #: the highest comes first
    exclusive: bool = False  #: what it takes is for none that come behind it


@dataclass(frozen=True, kw_only=True, slots=True)
class Heard:
    """What of a message decides for whom it is."""

    text: str
    at: int  #: ms
    direct: bool = False  #: the chat has two members, the other being the adapter's account
    mentioned: bool = False  #: the platform says that the adapter's account is meant
    agent: str = ""  #: the agent that is meant, if the platform says so
    program: bool = False  #: no person wrote it


def names_agent(text: str, agent: str) -> bool:
    """Return whether a text says "@NAME" somewhere, or begins with "NAME:" or "NAME,"."""
    name = re.escape(agent)
    return re.search(rf"(?<![\w@.])@{name}(?![\w@])|\A\s*{name}\s*[:,]", text, re.IGNORECASE) is not None


def decide_engagement(
    wirings: Iterable[Wiring], heard: Heard, verdicts: Mapping[int, Verdict]
) -> list[tuple[Wiring, bool]]:
    """Return the wirings of a chat that a message is for, the first to take it first; True: it mentions the
    agent.

    `verdicts`, by the id of the wiring: whether its sender may talk to that agent. What a program wrote is
    only for an agent that it mentions. Who is named comes before who is not, then who has the higher
    priority; behind one that is exclusive nobody gets anything.
    """
    wirings = list(wirings)
    named = {w.agent for w in wirings if w.agent == heard.agent or names_agent(heard.text, w.agent)}
    taken = []
    for wiring in sorted(wirings, key=lambda w: (w.agent not in named, -w.priority, w.agent)):
        # A mention of the account that several agents share is for all of them, unless it goes on to name
        # one.
        mentioned = wiring.agent in named or (heard.mentioned and not named)
        if verdicts[wiring.id] is Verdict.DROPPED or not (mentioned or _listens(wiring, heard, bool(named))):
            continue
        taken.append((wiring, mentioned))
        if wiring.exclusive and verdicts[wiring.id] is not Verdict.HELD:
            break
    return taken


def _listens(wiring: Wiring, heard: Heard, named: bool) -> bool:
    """Say whether a message that does not mention the agent is for it; `named`: it names another."""
    if heard.program:
        return False
    match wiring.engagement:
        case Engagement.EVERY:
            return True
        case Engagement.PATTERN:
            return matches(wiring.pattern, heard.text)
        case Engagement.STICKY if heard.at < wiring.sticky_until:
            return True
    return heard.direct and not named
