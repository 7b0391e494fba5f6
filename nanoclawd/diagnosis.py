"""Why a container did not get to its work: what systemd's result alone does not tell a person."""

from __future__ import annotations

import getpass

from nanoclawd import images, quadlet
from nanoclawd.errors import ConfigError, Failed, NanoclawError, NotFound, Unavailable
from nanoclawd.registry import Agent
from nanoclawd.session import Session

#: Podman's own failure, a command that it cannot run, one that it does not find. Source: podman-run(1).
PODMAN_STATUS = (125, 126, 127)


async def explain_start(
    session: Session, agent: Agent | None, problem: NanoclawError | None
) -> NanoclawError:
    """Return why this life of a session ended before it took a message.

    A ConfigError, NotFound or Refused does not get better by itself; anything else is worth another try.
    agent: None if it was removed meanwhile. problem: what we met ourselves.
    """
    if session.refused is not None:
        return session.refused
    if problem is not None and not session.result:
        return problem
    logs = f"'nanoclawctl agent logs {session.row.agent}' shows more"
    if session.result in ("", "success"):
        return Failed(f"{session.describe_end()} without taking the message", hint=logs)
    if session.result != "exit-code":
        return Failed(session.describe_end(), hint=logs)
    if session.exit_status not in PODMAN_STATUS:
        return Failed(f"its runner exited at once with status {session.exit_status}", hint=logs)
    found = None if agent is None else await _explain_podman(agent)
    return found or Failed(f"podman could not start its container (status {session.exit_status})", hint=logs)


async def _explain_podman(agent: Agent) -> NanoclawError | None:
    if quadlet.host_uid(agent.index) == quadlet.UNKNOWN_UID:
        person = getpass.getuser()
        ids = "--add-subuids 100000-165535 --add-subgids 100000-165535"
        return ConfigError(
            f"/etc/subuid gives '{person}' no subordinate uids, or too few, for its container",
            hint=f"run: sudo usermod {ids} {person}; podman system migrate",
        )
    if agent.config is not None:
        try:
            await images.require_image(agent.config.image)
        except NotFound as exc:
            return NotFound(f"its image '{agent.config.image}' is missing", hint=exc.hint)
        except (Failed, Unavailable):
            pass  # then systemd's word is all that there is
    return None
