"""The provider `anthropic`: Claude, with the SDK's tools and tool loop, kept in the transcript."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, cast

import httpx2
from anthropic import AsyncAnthropic, BaseModel, omit
from anthropic.lib.tools import BetaAsyncFunctionTool
from anthropic.lib.tools.agent_toolset import AgentToolContext, beta_agent_toolset_20260401
from anthropic.types.beta import BetaContextManagementConfigParam, BetaMessageParam

from ..errands import save_files
from ..processes import kill_all, open_descendants
from ..provider import Message, Paths, Reply, Settings, Stopped, Turn, TurnFailed
from ..transcript import Transcript
from ..turn import Chat
from .chat_tools import make_chat_tools
from .failures import failure_of
from .prompt import render_input, render_joined, render_system

DEFAULT_MODEL = "claude-sonnet-5-5"
MAX_TOKENS = 32_000  # of one answer; it is streamed, so a long one does not run into a time-out
_READ_TIMEOUT_S = 300.0  # between two pieces of a stream; the API sends pings
_CONNECT_TIMEOUT_S = 10.0
# The API summarises a long conversation itself; what came before the summary needs not be sent again.
_COMPACTION_BETA = "compact-2026-01-12"
_COMPACTION: BetaContextManagementConfigParam = {"edits": [{"type": "compact_20260112"}]}
_WITHOUT_COMPACTION = ("-4-5",)  # models of the list that are older than it

_SUM_UP = """\
Sum up this conversation so that you can go on from the summary alone: what people want and have said of \
themselves, what was decided, done and found, with names, numbers and paths, and what is still to be done. \
Write nothing else."""
_Answer = Callable[[AsyncAnthropic, Chat], Awaitable[list[str]]]

# It complains when a shell is gone before its watcher looked, which is how the SDK ends one.
logging.getLogger("asyncio").setLevel(logging.ERROR)


class Conversation:
    """All turns of one session. run() is called by one thread at a time, stop() by any."""

    def __init__(self, settings: Settings, paths: Paths) -> None:
        self._settings, self._paths = settings, paths
        self._model = settings["model"] or DEFAULT_MODEL
        self._transcript = Transcript(os.path.join(paths.session, "transcript.jsonl"), _as_json)
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Task[list[str]]] | None = None

    def run(self, turn: Turn, chat: Chat) -> list[Reply]:
        ids = [message["id"] for message in turn["messages"]]
        if (replies := self._transcript.answered(ids)) is not None:
            # Only the word of it was lost: nobody has to think, or to pay, again.
            return [Reply(reply) for reply in replies]
        try:
            command = turn["messages"][0].get("command")
            if command:
                self._transcript.begin(ids, {"role": "user", "content": [{"type": "text", "text": _SUM_UP}]})
            else:
                self._begin(turn, ids, chat)
            replies = asyncio.run(self._run(chat, self._sum_up if command else self._talk))
            self._transcript.end("answered", replies)
        except (asyncio.CancelledError, Stopped):
            if not chat.abandoned:  # else it broke off, and another attempt goes on with it
                self._transcript.end("stopped")
            raise Stopped from None
        except Exception as exc:
            failure = failure_of(exc)
            lasts = bool(command) or failure.code in ("invalid_request", "overflow", "refused")
            with contextlib.suppress(OSError):  # perhaps what failed
                self._transcript.end("forgotten" if lasts else "failed")
            raise failure from exc
        return [Reply(reply) for reply in replies]

    def stop(self) -> None:
        if (running := self._running) is None:
            return  # not begun, or over: _run() looks at chat.stopping
        # The SDK kills the shell alone, and its commands would go on. They are found before it dies, since
        # after that they are no longer its children; and killed after the cancel, or the model heard of it.
        commands, (loop, task) = open_descendants(), running
        with contextlib.suppress(RuntimeError):  # closed meanwhile
            loop.call_soon_threadsafe(task.cancel)
        kill_all(commands)

    def _begin(self, turn: Turn, ids: list[str], chat: Chat) -> None:
        begun = bool(self._transcript.messages)
        resumed = begun and self._transcript.is_of(ids)
        last_end = self._transcript.last_end if begun else "answered"
        files = self._save_files(turn["messages"], chat)
        text = render_input(turn, files, resumed=resumed, last_end=last_end)
        self._transcript.begin(ids, {"role": "user", "content": [{"type": "text", "text": text}]})

    def _save_files(self, messages: Sequence[Message], chat: Chat) -> dict[str, list[str]]:
        """Store what came with messages, and return what there is to say of it."""
        said: dict[str, list[str]] = {}
        for message in messages:
            if not message.get("files"):
                continue
            try:
                paths = save_files(chat, message, self._paths.workspace)
                said[message["id"]] = [f"{path} ({path.stat().st_size} bytes)" for path in paths]
            except (OSError, ValueError) as exc:
                names = ", ".join(file["name"] for file in message["files"])
                said[message["id"]] = [f"{names}: could not be stored: {exc}"]
        return said

    async def _run(self, chat: Chat, answer: _Answer) -> list[str]:
        task = asyncio.current_task()
        assert task is not None
        self._running = asyncio.get_running_loop(), task
        try:
            if chat.stopping.is_set():
                raise Stopped
            async with self._make_client() as client:
                return await answer(client, chat)
        finally:
            # asyncio.run() then ends the shell, which lives in a tool's generator; nobody may cancel that.
            self._running = None

    async def _talk(self, client: AsyncAnthropic, chat: Chat) -> list[str]:
        compacts = not any(part in self._model for part in _WITHOUT_COMPACTION)
        runner = client.beta.messages.tool_runner(
            model=self._model,
            max_tokens=MAX_TOKENS,
            system=render_system(self._settings, self._paths.workspace),
            messages=cast("list[BetaMessageParam]", self._transcript.messages),
            tools=self._make_tools(chat),
            stream=True,
            thread=False,  # the conversation is ours, in the transcript; the server keeps none
            cache_control={"type": "ephemeral"},
            betas=[_COMPACTION_BETA] if compacts else omit,
            context_management=_COMPACTION if compacts else omit,
        )
        async for stream in runner:
            chat.thinking()
            async for event in stream:
                if event.type == "text":
                    chat.text(event.text)
                elif event.type == "content_block_stop" and event.content_block.type == "tool_use":
                    chat.tool(_tool_line(event.content_block.name, event.content_block.input))
            chat.flush()
            message = await stream.get_final_message()
            if message.stop_reason is None:
                raise TurnFailed("connection", "The model's answer broke off.", retryable=True)
            if message.stop_reason == "refusal":
                raise TurnFailed("refused", "The model declined to answer this.")
            self._transcript.add(dict(message.to_param()))
            if message.stop_reason == "tool_use":
                results = await runner.generate_tool_call_response()  # the loop then runs none twice
                if results is not None:
                    joining = await asyncio.to_thread(chat.take_messages)
                    if joining:  # the loop sends this object, the content that we add too
                        files = await asyncio.to_thread(self._save_files, joining, chat)
                        block = {"type": "text", "text": render_joined(joining, files)}
                        results["content"] = cast("Any", [*results["content"], block])
                    self._transcript.add(dict(results), joined=[message["id"] for message in joining])
            if chat.stopping.is_set():
                raise Stopped
        text = "".join(block.text for block in message.content if block.type == "text").strip()
        if message.stop_reason == "model_context_window_exceeded":
            raise TurnFailed("overflow", "The conversation is longer than this model can take.")
        if message.stop_reason == "max_tokens":
            text = f"{text}\n\n[The answer reached its greatest length and was cut off.]"
        return [text or "[The model ended its turn without a reply.]"]

    async def _sum_up(self, client: AsyncAnthropic, chat: Chat) -> list[str]:
        """Go on from the model's own summary of the conversation."""
        chat.thinking()
        async with client.beta.messages.stream(
            model=self._model,
            max_tokens=MAX_TOKENS,
            system=render_system(self._settings, self._paths.workspace),
            messages=cast("list[BetaMessageParam]", self._transcript.messages),
            # A conversation with uses of tools must say which there are.
            tools=[tool.to_dict() for tool in self._make_tools(chat)],
            tool_choice={"type": "none"},
        ) as stream:
            message = await stream.get_final_message()
        summary = "".join(block.text for block in message.content if block.type == "text").strip()
        if message.stop_reason != "end_turn" or not summary:
            raise TurnFailed("internal", "The model did not sum up the conversation; it is as it was.")
        self._transcript.compact(summary)
        return [f"I go on from this summary of {len(summary)} characters:\n\n{summary}"]

    def _make_client(self) -> AsyncAnthropic:
        # verify: the gateway does TLS.
        transport = httpx2.AsyncHTTPTransport(uds=self._paths.gateway_socket, verify=False)
        timeout = httpx2.Timeout(_READ_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
        return AsyncAnthropic(
            base_url="http://gateway/anthropic",
            api_key="the-gateway-has-it",  # the SDK insists on one
            http_client=httpx2.AsyncClient(transport=transport, timeout=timeout, trust_env=False),
            timeout=timeout,
            max_retries=0,  # the router retries, with a back-off that the person sees
            open_telemetry=False,
        )

    def _make_tools(self, chat: Chat) -> list[BetaAsyncFunctionTool[Any]]:
        # The agent's shell gets our environment, without what only we need, and a name for git.
        ours, agent = ("NANOCLAW_", "NOTIFY_", "ANTHROPIC_"), self._settings["agent"]
        env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        env |= {"GIT_AUTHOR_NAME": agent, "GIT_COMMITTER_NAME": agent, "EMAIL": f"{agent}@localhost"}
        context = AgentToolContext(workdir=self._paths.workspace, allowed_roots=[Path("/tmp")], env=env)
        return [*beta_agent_toolset_20260401(context), *make_chat_tools(chat, self._paths.workspace)]


def _tool_line(name: str, input: object) -> str:
    """Return one line that says what the tool does, e.g. `bash: ls -la`."""
    if isinstance(input, dict):
        for field in ("command", "file_path", "pattern", "text"):
            if isinstance(value := input.get(field), str):
                return f"{name}: {value}"
    return name


def _as_json(value: Any) -> object:
    if isinstance(value, BaseModel):
        return value.to_dict(mode="json")
    raise TypeError(f"{type(value).__name__} is no JSON")


make = Conversation
