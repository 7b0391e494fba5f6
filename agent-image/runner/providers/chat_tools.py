"""The model's tools for chats and other agents. What they may is the router's business: it says why not."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from anthropic.lib.tools import BetaAsyncFunctionTool, ToolError, beta_async_tool

from .. import errands
from ..turn import Chat, Outcome, clean

_T = TypeVar("_T")
_ASK_S = 3600


class _Keys:
    """Names what is done by what it is: done again by a later attempt, it has the same key."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def __call__(self, *what: object) -> str:
        # Of a text alone as ever: attempts may have begun with an older image.
        digest = hashlib.sha256("\0".join(map(str, what)).encode("utf-8", "replace")).hexdigest()[:24]
        self._counts[digest] = self._counts.get(digest, 0) + 1
        return f"{digest}.{self._counts[digest]}"


async def _do(work: Callable[..., _T], *arguments: Any, **more: Any) -> _T:
    """Do what waits for the router; what it refuses is the tool's error."""
    try:
        return await asyncio.to_thread(work, *arguments, **more)
    except (ValueError, OSError) as exc:
        raise ToolError(str(exc)) from exc


def _said(outcome: Outcome, done: str) -> str:
    """Return what the model reads."""
    if outcome["state"] == "held":
        return outcome["message"]
    parts = [outcome["message"] or done, f"(delivery {outcome['delivery']})" if outcome["delivery"] else ""]
    return " ".join(filter(None, parts))


def make_chat_tools(chat: Chat, workspace: str) -> list[BetaAsyncFunctionTool[Any]]:
    """Return the tools for one turn."""
    key = _Keys()

    @beta_async_tool
    async def send_message(text: str, destination: str = "") -> str:
        """Send a message at once, before your reply: for news of work that takes long.

        Args:
            text: What you say.
            destination: One of list_destinations, if it is not for this chat.
        """
        to = destination or None
        return _said(await _do(chat.send, key(text, to) if to else key(text), text, to), "sent")

    @beta_async_tool
    async def list_deliveries() -> str:
        """See whether what you said in this chat has arrived: your last replies and messages, with ids."""
        lines = []
        for delivery in await _do(chat.list_deliveries):
            reason = f" ({delivery['reason']})" if delivery["reason"] else ""
            lines.append(f"{delivery.get('id', '')} {delivery['state']}{reason}: {delivery['text']}")
        return "\n".join(lines) or "You have not said anything in this chat yet."

    @beta_async_tool
    async def list_destinations() -> str:
        """List other chats that you may send something to, and other agents that you may write to."""
        known = await _do(chat.request, "ListDestinations")
        lines = [
            f"{row['name']}: {row['title'] or 'a chat'} ({row['channel']})" for row in known["destinations"]
        ]
        lines += [f"agent {name}" for name in known["agents"]]
        return "\n".join(lines) or "There are no others."

    @beta_async_tool
    async def edit_message(delivery: str, text: str) -> str:
        """Give something that you said in this chat another text.

        Args:
            delivery: Its id, as send_message and list_deliveries give it.
            text: All of the new text; empty takes the message back.
        """
        new = clean(text) if text.strip() else None
        outcome = await _do(
            chat.act, "EditMessage", key=key("edit", delivery, text), delivery=delivery, text=new
        )
        return _said(outcome, "changed")

    @beta_async_tool
    async def react(message: str, reaction: str) -> str:
        """Put a reaction to a message of this turn.

        Args:
            message: Its id, as in <message id="…">.
            reaction: An emoji.
        """
        outcome = await _do(
            chat.act, "React", key=key("react", message, reaction), message=message, reaction=reaction
        )
        return _said(outcome, "done")

    @beta_async_tool
    async def send_file(path: str, caption: str = "", destination: str = "") -> str:
        """Send a file of at most 32 MB.

        Args:
            path: Where it is; relative to your workspace.
            caption: What you say with it.
            destination: One of list_destinations, if it is not for this chat.
        """
        file, to = Path(workspace, path), destination or None
        outcome = await _do(errands.send_file, chat, key("file", path, caption, to), file, caption, to)
        return _said(outcome, "sent")

    @beta_async_tool
    async def ask_person(question: str, options: list[str], timeout_seconds: int = _ASK_S) -> str:
        """Ask the people of this chat, and wait for the answer of somebody who may tell you what to do.

        Args:
            question: What you ask.
            options: 2 to 10 short answers to choose from. A reply may say something else.
            timeout_seconds: How long you wait.
        """
        name = key("ask", question, *options)
        answer = await _do(errands.ask, chat, name, question, options, timeout_seconds)
        return "Nobody has answered in time." if answer is None else f"{answer[1]} answered: {answer[0]}"

    @beta_async_tool
    async def message_agent(agent: str, text: str) -> str:
        """Write to another agent. What it answers comes as a message of a later turn.

        Args:
            agent: Its name, as in list_destinations.
            text: What you say; it knows nothing else of this chat.
        """
        outcome = await _do(
            chat.act, "MessageAgent", key=key("agent", agent, text), agent=agent, text=clean(text)
        )
        return _said(outcome, "sent")

    @beta_async_tool
    async def create_agent(name: str, description: str, instructions: str) -> str:
        """Create another agent, with your model and limits and a workspace of its own.

        Args:
            name: 1 to 32 of a-z, 0-9 and "_", beginning with a letter.
            description: One line for people.
            instructions: What it is for and how it works: all that it knows.
        """
        what = {"name": name, "description": clean(description), "instructions": clean(instructions)}
        return _said(
            await _do(chat.act, "CreateAgent", key=key("create", *what.values()), **what), "created"
        )

    return [
        send_message,
        list_deliveries,
        list_destinations,
        edit_message,
        react,
        send_file,
        ask_person,
        message_agent,
        create_agent,
    ]
