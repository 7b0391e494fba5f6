"""The seam between the runner and whatever answers: an echo, a model, what a skill brings."""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from .protocol import Settings, Turn
    from .turn import Chat


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

    def load(self) -> None:
        """Do the slow part of starting. Called once, in a thread, while the first message travels."""

    def run(self, turn: Turn, chat: Chat) -> list[str]:
        """Return the replies. Raises TurnFailed; Stopped, soon after chat.stopping is set."""

    def stop(self) -> None:
        """Wake run() up: chat.stopping was set. Called from another thread, perhaps when nothing runs."""


def make_provider(settings: Settings, paths: Paths) -> Provider:
    """Return the provider of that name. Raises LookupError if there is none.

    A skill adds a provider by putting a module into runner/providers/.
    """
    name = settings.provider
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", name):
        raise LookupError(f"provider '{name}' is no name of a provider")
    try:
        module = importlib.import_module(f"{__package__}.providers.{name}")
    except ModuleNotFoundError as exc:
        if exc.name != f"{__package__}.providers.{name}":
            raise
        raise LookupError(f"this agent image has no provider '{name}'") from None
    provider: Provider = module.make(settings, paths)
    return provider
