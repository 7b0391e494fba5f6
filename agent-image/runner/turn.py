"""One turn: a thread that runs the provider, a heartbeat that keeps the lease."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, TypedDict, cast

from . import journal
from .host import Host, HostAway, HostError, MessageTooLong
from .provider import Message, Provider, Stopped, Turn, TurnFailed

_FLUSH_S = 0.1  # text deltas are put together for so long: a fast model must not cost a call a word
_FLUSH_CHARS = 2048
MAX_REPLY_BYTES = 160_000  # JSON makes at most six of one (a control character): below the wire's limit
_STOP_GRACE_S = 5.0


class Outcome(TypedDict):
    """What became of something that a tool asked for, see io.nanoclaw.Agent."""

    state: str
    delivery: str
    message: str


_DONE: Outcome = {"state": "done", "delivery": "", "message": ""}


class Chat:
    """What a provider may do to the chat while its turn runs."""

    def __init__(self, turn: Turn, host: Host) -> None:
        self.stopping = threading.Event()  #: set once nobody wants this turn's result any more
        self.abandoned = False  #: the lease is lost, too: not stopped by a person
        self._turn, self._host = turn["id"], host
        self.last = turn["messages"][-1]["id"]  #: the last message that the provider has
        self._text, self._flushed_at = "", 0.0

    def thinking(self, text: str = "") -> None:
        self._report("thinking", text)

    def tool(self, line: str) -> None:
        self._report("tool", " ".join(line.split())[:200])

    def text(self, piece: str) -> None:
        """Show a piece of the reply to come; pieces may be put together, flush() shows the rest."""
        self._text += piece
        if len(self._text) >= _FLUSH_CHARS or time.monotonic() - self._flushed_at >= _FLUSH_S:
            self.flush()

    def flush(self) -> None:
        if self._text:
            text, self._text = self._text, ""
            self._flushed_at = time.monotonic()
            self._report("text", text)

    def send(self, key: str, text: str, destination: str | None = None) -> Outcome:
        """Send a message now; return when the router has it. Raises Stopped, ValueError."""
        elsewhere = {} if destination is None else {"destination": destination}
        return self.act("SendMessage", key=key, text=clean(text), **elsewhere)

    def act(self, method: str, **parameters: object) -> Outcome:
        """Call a method of io.nanoclaw.Agent that has an Outcome. Raises Stopped, ValueError."""
        # A router that is older than we are says nothing.
        return cast("Outcome", self.request(method, **parameters).get("outcome", _DONE))

    def take_messages(self) -> list[Message]:
        """Let what has arrived since the turn began join it, and return it. Raises Stopped."""
        try:
            messages = cast("list[Message]", self.request("TakeMessages", last=self.last)["messages"])
        except ValueError as exc:  # e.g. a router that is older than we are; they come with the next turn
            journal.debug("nothing-joins", turn=self._turn, reason=exc)
            return []
        self.last = messages[-1]["id"] if messages else self.last
        return messages

    def list_deliveries(self) -> list[dict[str, Any]]:
        """Return what became of what was said in this chat, oldest first. Raises ValueError."""
        try:
            return cast("list[dict[str, Any]]", self._host.call("ListDeliveries", {})["deliveries"])
        except HostError as exc:
            raise ValueError(f"the router does not say: {exc.name}") from exc

    def request(self, method: str, **parameters: object) -> dict[str, Any]:
        """Call any method that is about a turn. Raises Stopped, ValueError."""
        try:
            return self._host.call(method, {"turn": self._turn, **parameters})
        except HostError as exc:
            raise self._refusal(exc) from exc

    def request_apart(self, method: str, **parameters: object) -> dict[str, Any]:
        """The same for one that waits: until it is answered, or the turn is to stop."""
        try:
            reply = self._host.call_apart(method, {"turn": self._turn, **parameters}, self.stopping)
        except HostError as exc:
            raise self._refusal(exc) from exc
        if reply is None:
            raise Stopped
        return reply

    def _refusal(self, exc: HostError) -> Exception:
        if exc.name != "NoSuchTurn":
            return ValueError(exc.text or f"the router refused: {exc.name}")
        self.end(abandoned=True)
        return Stopped()

    def end(self, *, abandoned: bool = False) -> None:
        self.abandoned |= abandoned
        self.stopping.set()

    def _report(self, kind: str, text: str) -> None:
        self.flush()
        self._host.tell("ReportActivity", {"turn": self._turn, "kind": kind, "text": clean(text)})


class TurnRun:
    """A turn that runs until FinishTurn() was answered, or nobody wants its result any more."""

    def __init__(self, turn: Turn, host: Host, provider: Provider, *, on_end: Callable[[], None]) -> None:
        self.turn, self._id = turn, turn["id"]
        self._host, self._provider, self._on_end = host, provider, on_end
        self._chat = Chat(turn, host)
        self.over = threading.Event()  #: set once there is nothing left to do or to say
        self._worker = threading.Thread(target=self._work, name="turn", daemon=True)

    def start(self, *, heartbeat_s: float) -> None:
        self._worker.start()
        renew_s = max(heartbeat_s / 3, 0.05)  # two may be lost before the lease ends
        threading.Thread(target=self._renew, args=[renew_s], name="heartbeat", daemon=True).start()

    def join(self) -> None:
        self._worker.join(_STOP_GRACE_S)

    def stop(self) -> None:
        """The person wants it to stop: end it and say so; if the provider does not obey, end the process."""
        if not self._chat.stopping.is_set():
            self._chat.end()
            self._provider.stop()
            timer = threading.Timer(_STOP_GRACE_S, self._give_up)
            timer.daemon = True
            timer.start()

    def abandon(self) -> None:
        """The lease is lost: end it and say nothing."""
        self._chat.end(abandoned=True)
        self._provider.stop()

    def _work(self) -> None:
        started = time.monotonic()
        result = self._result()
        self._chat.flush()
        if not self._chat.abandoned:
            self._finish(result)
        outcome = "abandoned" if self._chat.abandoned else result["outcome"]
        took_ms = round((time.monotonic() - started) * 1000)
        journal.info(
            "turn-ended", turn=self._id, attempt=self.turn["attempt"], outcome=outcome, took_ms=took_ms
        )
        self.over.set()
        self._on_end()

    def _result(self) -> dict[str, Any]:
        try:
            replies = self._provider.run(self.turn, self._chat)
        except Stopped:
            return {"outcome": "stopped", "replies": []}
        except TurnFailed as exc:
            return _failed(exc)
        except Exception:
            journal.error("provider-bug", turn=self._id, trace=traceback.format_exc(limit=-4))
            return _failed(TurnFailed("internal", "The agent's runner failed; its journal says why."))
        said = [reply for reply in replies if reply.text.strip()]
        return {
            "outcome": "answered",
            "replies": [_shortened(clean(reply.text)) for reply in said],
            "answers": [reply.message for reply in said],
        }

    def _finish(self, result: dict[str, Any]) -> None:
        """Say how the turn ended until the router has heard it."""
        try:
            self._host.call("FinishTurn", {"turn": self._id, "last": self._chat.last, **result})
        except (HostError, MessageTooLong) as exc:
            if isinstance(exc, HostError) and exc.name == "NoSuchTurn":
                journal.warning("turn-lost", turn=self._id, reason="its lease had ended, dropping it")
                return
            journal.error("finish-refused", turn=self._id, reason=exc)
            if result["outcome"] != "failed":  # else the lease ends, and the router decides
                self._finish(_failed(TurnFailed("internal", "The agent's reply could not be handed over.")))

    def _renew(self, renew_s: float) -> None:
        while not self.over.wait(renew_s):
            try:
                self._host.call_once("RenewTurn", {"turn": self._id})
            except HostAway:
                pass
            except HostError as exc:
                if exc.name == "NoSuchTurn" and not self.over.is_set():
                    journal.warning("lease-lost", turn=self._id, reason="stopping the turn")
                    self.abandon()
                    return

    def _give_up(self) -> None:
        if not self.over.is_set() and not self._chat.abandoned:
            journal.error("stop-stuck", turn=self._id, reason="the turn did not stop in time, leaving")
            self._finish({"outcome": "stopped", "replies": []})
            os._exit(1)


def _failed(failure: TurnFailed) -> dict[str, Any]:
    error: dict[str, Any] = {
        "code": failure.code,
        "message": clean(" ".join(failure.message.split())),
        "retryable": failure.retryable,
    }
    if failure.retry_after_s is not None:
        error["retryAfterSeconds"] = failure.retry_after_s
    return {"outcome": "failed", "replies": [], "error": error}


def clean(text: str) -> str:
    """Return the text without what the contract forbids."""
    return text.replace("\0", "")


def _shortened(text: str) -> str:
    data = text.encode("utf-8", "replace")
    if len(data) <= MAX_REPLY_BYTES:
        return text
    kept = data[:MAX_REPLY_BYTES].decode("utf-8", "ignore")
    return f"{kept}\n[{len(data) - MAX_REPLY_BYTES} more bytes were cut off]"
