"""Calls to the router, with its errors as ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nanoclawd import errors, paths
from nanoclawd.client import Client
from nanoclawd.wire import Json, VarlinkError

INTERFACE = "io.nanoclaw.Control"
ANSWER_S = 150.0  #: longer than the router's own deadlines, of which it would tell us
COMPLETION_S = 1.0  #: a person waits with a finger on Tab

_ERRORS = {
    kind.__name__: kind
    for kind in errors.NanoclawError.__subclasses__()
    if kind.__module__ == errors.__name__
}


@contextmanager
def translated() -> Iterator[None]:
    """Turn an error reply into the exception of errors.py that it stands for."""
    try:
        yield
    except VarlinkError as exc:
        raise translate(exc) from exc


def translate(error: VarlinkError) -> errors.NanoclawError:
    interface, _, name = error.name.rpartition(".")
    kind = _ERRORS.get(name)
    if kind is not None and interface.startswith("io.nanoclaw."):
        message = str(error.parameters.get("message", name))
        return kind(message, hint=str(error.parameters.get("hint", "")))
    if name == "InvalidParameter":
        return errors.Refused(
            f"the router does not take '{error.parameters.get('parameter', '?')}' as it is"
        )
    # Both sides check against the same file: unless an older router still runs, this cannot be.
    return errors.Failed(
        f"the router answered {error.name}",
        hint="if NanoClaw was just upgraded, try 'systemctl --user restart nanoclaw'",
    )


def call(method: str, parameters: Json | None = None, *, timeout_s: float = ANSWER_S) -> Json:
    """Call a method of io.nanoclaw.Control and return its answer."""
    with translated(), Client(paths.control_socket(), timeout_s=timeout_s) as client:
        return client.call(f"{INTERFACE}.{method}", parameters)


def stream(
    method: str, parameters: Json | None = None, *, timeout_s: float | None = ANSWER_S
) -> Iterator[Json]:
    """Yield each of the method's answers."""
    with translated(), Client(paths.control_socket(), timeout_s=timeout_s) as client:
        yield from client.stream(f"{INTERFACE}.{method}", parameters)


def agent_names(*, timeout_s: float = ANSWER_S) -> list[str]:
    """Return the names of all agents."""
    return [str(reply["name"]) for reply in stream("ListAgents", timeout_s=timeout_s) if reply.get("name")]


@contextmanager
def suggesting(agent: str) -> Iterator[None]:
    """Add the name that was probably meant to a NotFound of `agent`."""
    try:
        yield
    except errors.NotFound as exc:
        from nanoclawd.cli.parser import did_you_mean

        if "did you mean" not in exc.hint:
            try:
                hint = exc.hint or "'nanoclawctl agent list' shows all"
                exc.hint = did_you_mean(agent, agent_names(timeout_s=COMPLETION_S), hint)
            except errors.NanoclawError:
                pass  # the first error is the one to tell
        raise


def call_agent(method: str, agent: str, parameters: Json | None = None) -> Json:
    """Call a method that has the agent's name as its parameter `name`."""
    with suggesting(agent):
        return call(method, {"name": agent, **(parameters or {})})
