"""nanoclawctl: the person's command line.

Talks to:   the router, over its control and channel sockets; never to its database or to an agent.
May touch:  what the person may; runs podman, systemctl and journalctl where only the person can.
Trusts:     the router's word on what is there; no text of agents, which is made safe before it is shown.
On trouble: says what happened and what to do, and exits with a code that says which kind it was.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from nanoclawd.cli import output, parser
from nanoclawd.errors import NanoclawError

#: Exit codes, by the code of the error; also what nanoclawctl(1) promises.
EXIT_CODES = {"bad-config": 1, "failed": 1, "usage": 2, "unavailable": 3, "not-found": 4, "refused": 5}
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows another one; it is no reason to fail.
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Nobody reads any more. Python flushes stdout once more on exit: into nothing.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _run(arguments: Sequence[str]) -> int:
    try:
        if arguments[:1] == ["_complete"]:  # what comes then are words of another command line
            import_module("nanoclawd.cli.completion").answer(arguments[1:])
            return 0
        command, options = parser.parse(arguments)
        function = getattr(import_module(f"nanoclawd.cli.{command.module}"), "_".join(command.words))
        return function(options) or 0
    except parser.Help as wanted:
        print(wanted.text)
        return 0
    except NanoclawError as error:
        sys.stdout.flush()
        output.say_error(error, as_json="--json" in arguments)
        return EXIT_CODES.get(error.code, 1)


if __name__ == "__main__":
    sys.exit(main())
