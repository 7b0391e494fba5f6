"""The seam between the runner and whatever answers: an echo, a model, what a skill brings."""

from __future__ import annotations

import gc
import importlib.util
import re
import threading
import time
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypedDict

from . import journal

if TYPE_CHECKING:
    from .turn import Chat

# What the router tells us, which it has checked. io.nanoclaw.Agent explains the fields.


class Settings(TypedDict):
    agent: str
    session: str
    provider: str
    model: str
    instructions: str
    heartbeatSeconds: float
    idleSeconds: float


class Said(TypedDict):
    sender: str
    receivedAt: float
    text: str


class File(TypedDict):
    id: str
    name: str
    mediaType: str
    bytes: int


class Message(Said):
    id: str
    context: list[Said]
    files: list[File]
    command: str | None  #: "compact": sum up the conversation; alone in its turn


class Turn(TypedDict):
    id: str
    attempt: int
    messages: list[Message]
    alreadySent: list[dict[str, str]]


class Reply(NamedTuple):
    """Something to say when the turn ends."""

    text: str
    message: str = ""  #: the id of the message that it answers; "": all of the turn


class Paths(NamedTuple):
    """Where things are in the container. Tests have them elsewhere."""

    host_socket: str = "/run/nanoclaw/host.sock"
    gateway_socket: str = "/run/nanoclaw/gateway.sock"
    proxy: str = "127.0.0.1:3128"  #: the gateway for tools; also in the image's environment. "": none
    session: str = "/session"  #: the provider's own; survives the container
    workspace: str = "/workspace"  #: the agent's; where its tools work


class Stopped(Exception):
    """The turn ended because it was asked to stop."""


class TurnFailed(Exception):
    """The turn cannot be finished. Source of the codes: io.nanoclaw.Agent, FinishTurn()."""

    def __init__(
        self, code: str, message: str, *, retryable: bool = False, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message  #: one honest line for the person
        self.retryable = retryable
        self.retry_after_s = retry_after_s


class Provider(Protocol):
    """Answers turns, one at a time. Made by `make(settings, paths)` of its module."""

    def run(self, turn: Turn, chat: Chat) -> list[Reply]:
        """Return the replies. Raises TurnFailed; Stopped, soon after chat.stopping is set."""

    def stop(self) -> None:
        """Wake run() up: chat.stopping was set. Called from another thread, perhaps when nothing runs."""


class NoProvider(Exception):
    """This agent image has no such provider."""


class LoadedProvider:
    """The provider that the settings name: loaded in a thread, since an SDK takes longer than all the rest.

    A skill adds a provider by putting a module into runner/providers/.
    """

    def __init__(self, settings: Settings, paths: Paths) -> None:
        """Begin to load it. Raises NoProvider."""
        name = settings["provider"]
        self._module = f"{__package__}.providers.{name}"
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", name):
            raise NoProvider(f"provider '{name}' is no name of a provider")
        if importlib.util.find_spec(self._module) is None:
            raise NoProvider(f"this agent image has no provider '{name}'")
        self._settings, self._paths = settings, paths
        self._lock = threading.Lock()
        self._provider: Provider | None = None
        threading.Thread(target=self._load, name="load", daemon=True).start()

    def run(self, turn: Turn, chat: Chat) -> list[Reply]:
        return self._load().run(turn, chat)

    def stop(self) -> None:
        if self._provider is not None:  # else run() looks at chat.stopping once it is loaded
            self._provider.stop()

    def _load(self) -> Provider:
        with self._lock:
            if self._provider is None:
                started = time.monotonic()
                # Thousands of modules make millions of objects that stay: to look for garbage among them
                # again and again takes a quarter of the import.
                gc.disable()
                try:
                    self._provider = importlib.import_module(self._module).make(self._settings, self._paths)
                finally:
                    gc.freeze()
                    gc.enable()
                journal.info("provider-loaded", took_ms=round((time.monotonic() - started) * 1000))
            return self._provider
