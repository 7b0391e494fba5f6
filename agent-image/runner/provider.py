"""The seam between the runner and whatever answers: an echo, a model, what a skill brings."""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypedDict

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


class Message(TypedDict):
    id: str
    sender: str
    receivedAt: float
    text: str


class Sent(TypedDict):
    key: str
    text: str


class Turn(TypedDict):
    id: str
    attempt: int
    messages: list[Message]
    alreadySent: list[Sent]


class Paths(NamedTuple):
    """Where things are in the container. Tests have them elsewhere."""

    host_socket: str = "/run/nanoclaw/host.sock"
    gateway_socket: str = "/run/nanoclaw/gateway.sock"
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

    def load(self) -> object:
        """Do the slow part of starting. Called once, in a thread, while the first message travels."""

    def run(self, turn: Turn, chat: Chat) -> list[str]:
        """Return the replies. Raises TurnFailed; Stopped, soon after chat.stopping is set."""

    def stop(self) -> None:
        """Wake run() up: chat.stopping was set. Called from another thread, perhaps when nothing runs."""


class NoProvider(Exception):
    """This agent image has no such provider."""


def make_provider(settings: Settings, paths: Paths) -> Provider:
    """Return the provider of that name. Raises NoProvider.

    A skill adds a provider by putting a module into runner/providers/.
    """
    name = settings["provider"]
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", name):
        raise NoProvider(f"provider '{name}' is no name of a provider")
    module = f"{__package__}.providers.{name}"
    try:
        provider: Provider = importlib.import_module(module).make(settings, paths)
    except ModuleNotFoundError as exc:
        if exc.name != module:
            raise
        raise NoProvider(f"this agent image has no provider '{name}'") from None
    return provider
