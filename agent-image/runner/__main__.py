"""nanoclaw-runner: answers the messages of one session of an agent, as PID 1 of its container.

Talks to:   the router, over host.sock; the gateway, over gateway.sock. There is no network.
May touch:  the agent's workspace, the session's directory, /tmp. It holds no credential.
Trusts:     the router. What the model says and what its tools print is text, not commands to us.
On trouble: a turn that fails is reported with a reason. When the process ends, however it ends, the turn's
            lease runs out and the router tries again; nothing has to be saved for that.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from .journal import notify
from .processes import kill_descendants
from .provider import Paths
from .session import Session


def main() -> None:
    os.umask(0o002)  # the person, whose group we have, may change what the agent made
    names = {field: f"NANOCLAW_{field.upper()}" for field in Paths._fields}
    session = Session(
        Paths(**{field: os.environ[name] for field, name in names.items() if name in os.environ})
    )

    def leave(_signal: int, _frame: FrameType | None) -> None:
        # At once, and without finishing the turn: a stop of the unit is no answer to a person, and the
        # router gives the turn out again.
        session.mute()
        notify("STOPPING=1")
        kill_descendants()
        os._exit(0)

    # PID 1 has no default action for signals (man 7 signal: "init"), and podman would wait 10 s.
    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    signal.signal(signal.SIGCHLD, lambda _signal, _frame: session.wake())
    status = session.serve()
    sys.stderr.flush()
    os._exit(status)  # not sys.exit(): taking down thousands of SDK modules would take 0.2 s


if __name__ == "__main__":
    main()
