"""Calls to the router, with its errors as ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from nanoclawd import errors, paths
from nanoclawd.client import Client
from nanoclawd.wire import Json, VarlinkError

INTERFACE = "io.nanoclaw.Control"
ANSWER_S = 150.0  #: longer than the router's own deadlines, of which it would tell us
COMPLETION_S = 1.0  #: for names that would be nice to have; a person waits with a finger on Tab

_ERRORS = {
    kind.__name__: kind
    for kind in (errors.ConfigError, errors.NotFound, errors.Refused, errors.Unavailable, errors.Failed)
}


@contextmanager
def translated() -> Iterator[None]:
    """Turn an error reply into the exception of errors.py that it stands for."""
    try:
        yield
    except VarlinkError as error:
        interface, _, name = error.name.rpartition(".")
        kind = _ERRORS.get(name)
        if kind is not None and interface.startswith("io.nanoclaw."):
            message = str(error.parameters.get("message", name))
            raise kind(message, hint=str(error.parameters.get("hint", ""))) from error
        if name == "InvalidParameter":
            parameter = error.parameters.get("parameter", "?")
            raise errors.Refused(f"the router does not take '{parameter}' as it is") from error
        # Both sides check against the same file: unless an older router still runs, this cannot be.
        hint = "if NanoClaw was just upgraded, try 'systemctl --user restart nanoclaw'"
        raise errors.Failed(f"the router answered {error.name}", hint=hint) from error


def call(method: str, parameters: Json | None = None, *, timeout_s: float = ANSWER_S) -> Json:
    """Call a method of io.nanoclaw.Control and return its answer."""
    with translated(), Client(paths.control_socket(), timeout_s=timeout_s) as client:
        return client.call(f"{INTERFACE}.{method}", parameters)


def stream(method: str, parameters: Json | None = None, *, timeout_s: float = ANSWER_S) -> Iterator[Json]:
    """Yield each of the method's answers."""
    with translated(), Client(paths.control_socket(), timeout_s=timeout_s) as client:
        yield from client.stream(f"{INTERFACE}.{method}", parameters)


def list_all(method: str, parameters: Json | None = None, *, timeout_s: float = ANSWER_S) -> list[Json]:
    """Return all of the method's answers but the empty one, which says that there is nothing."""
    return [reply for reply in stream(method, parameters, timeout_s=timeout_s) if any(reply.values())]


def agent_names() -> list[str]:
    """Return the names of all agents, or none if they do not come at once."""
    with suppress(errors.NanoclawError):
        return [str(agent["name"]) for agent in list_all("ListAgents", timeout_s=COMPLETION_S)]
    return []


def sessions(agent: str | None) -> list[Json]:
    """Return the sessions of one agent, or of all."""
    return [reply["session"] for reply in list_all("ListSessions", {"agent": agent})]


def dead_letters(*, timeout_s: float = ANSWER_S) -> list[Json]:
    """Return all dead letters, each a Message or a Delivery."""
    return [r.get("message") or r["delivery"] for r in list_all("ListDeadLetters", timeout_s=timeout_s)]


def approvals(agent: str | None, state: str | None, *, timeout_s: float = ANSWER_S) -> list[Json]:
    """Return approvals, of one agent or of all, in one state or in any."""
    wanted = {"agent": agent, "state": state}
    return [reply["approval"] for reply in list_all("ListApprovals", wanted, timeout_s=timeout_s)]


def call_agent(method: str, agent: str, parameters: Json | None = None) -> Json:
    """Call a method that has the agent's name as its parameter `name`."""
    return call(method, {"name": agent, **(parameters or {})})
