"""Programs that nanoclawctl becomes: what only the person, outside every sandbox, can run."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import NoReturn

from nanoclawd.cli import control
from nanoclawd.cli.parser import UsageError
from nanoclawd.errors import Failed, NotFound
from nanoclawd.ids import parse_agent_name, parse_session_name


def logs(options: Namespace) -> NoReturn:
    """Become journalctl(1): its pager, colours and keys are what people know."""
    if options.AGENT is None:
        units = ["nanoclaw.service", "nanoclaw-gateway.service", "nanoclaw-channel@*.service"]
    else:
        units = [f"nanoclaw-{parse_agent_name(options.AGENT)}@*.service"]
    arguments = ["journalctl", "--user", *(f"--unit={unit}" for unit in units), f"--lines={options.lines}"]
    _become([*arguments, "--follow"] if options.follow else arguments)


def shell(options: Namespace) -> NoReturn:
    """Become a shell in the agent's container."""
    agent = parse_agent_name(options.AGENT)
    if options.session is not None:
        session = parse_session_name(options.session)
    else:
        sessions = control.sessions(agent)
        running = [found["session"] for found in sessions if found["state"] in ("ready", "working")]
        if not running:
            hint = f"send it a message first: 'nanoclawctl chat {agent}'"
            raise NotFound(f"no session of '{agent}' runs", hint=hint)
        if len(running) > 1:
            many = f"several sessions of '{agent}' run: {', '.join(running)}"
            raise UsageError(many, hint="choose: --session")
        session = parse_session_name(running[0])
    keyboard = ["--interactive", "--tty"] if os.isatty(0) and os.isatty(1) else ["--interactive"]
    _become(["podman", "exec", *keyboard, f"nanoclaw-{agent}-{session}", "bash"])


def _become(arguments: list[str]) -> NoReturn:
    """Replace this process by another program. Raises Failed if there is none."""
    try:
        os.execvp(arguments[0], arguments)
    except OSError as exc:
        hint = "'nanoclawctl doctor' checks what is needed"
        raise Failed(f"cannot run {arguments[0]}: {exc.strerror}", hint=hint) from exc
