"""The one door to subprocesses: an argument list, no shell, its own environment, a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from subprocess import CompletedProcess

from nanoclawd import limits
from nanoclawd.errors import Failed, Unavailable

END_S = 2.0  #: from SIGTERM to SIGKILL
LINE_BYTES = 1 << 20  #: one line of a program whose output is read as it comes
#: What programs need of our environment: where the person's files and buses are. None of it is a credential.
PASSED_ON = (
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "TMPDIR", "DBUS_SESSION_BUS_ADDRESS"),
    *("XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_DATA_HOME", "XDG_DATA_DIRS"),
)


async def run(
    command: Sequence[str], *, timeout_s: float = limits.PROGRAM_S, env: Mapping[str, str] | None = None
) -> CompletedProcess[str]:
    """Run `command` to its end, whatever its status, with `env` added to the few variables that we pass on.

    Raises Unavailable if it cannot be started, Failed if it takes longer than `timeout_s`. Ended on cancel.
    """
    try:
        async with asyncio.timeout(timeout_s), start(command, env=env) as process:
            stdout, stderr = await process.communicate()
    except TimeoutError:
        raise Failed(f"took longer than {timeout_s:g} s: {paste(command, env)}") from None
    assert process.returncode is not None
    return CompletedProcess(
        command, process.returncode, stdout.decode(errors="replace"), stderr.decode(errors="replace")
    )


@asynccontextmanager
async def start(
    command: Sequence[str], *, env: Mapping[str, str] | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run `command` with pipes for stdout and stderr during the block; at its end the program is ended too.

    Raises Unavailable if it cannot be started.
    """
    ours = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=ours | dict(env or {}),
            limit=LINE_BYTES,
        )
    except OSError as exc:
        raise Unavailable(f"cannot be started: {paste(command, env)}: {exc.strerror}") from None
    try:
        yield process
    finally:
        if process.returncode is None:
            await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    """End the process and reap it, even if we are cancelled meanwhile."""
    try:
        # ProcessLookupError: it has just ended. TimeoutError: it is deaf, so the harder way below.
        with contextlib.suppress(ProcessLookupError, TimeoutError):
            process.terminate()
            async with asyncio.timeout(END_S):
                await process.wait()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def paste(command: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """Return the command as a person would type it."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in (env or {}).items()]
    return " ".join([*variables, shlex.join(command)])
