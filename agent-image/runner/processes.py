"""The duties of PID 1: processes that nobody waits for, and their end."""

from __future__ import annotations

import contextlib
import os
import signal

_GRACE_S = 1.0


def read_tree() -> dict[int, tuple[int, str]]:
    """Return the parent and the state letter of each process that we see. Source: man 5 proc_pid_stat."""
    tree = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    state, parent = file.read().rpartition(b")")[2].split()[:2]  # the name may hold anything
            except OSError:
                continue
            tree[int(name)] = (int(parent), state.decode())
    return tree


def open_descendants() -> list[int]:
    """Return a descriptor of each process that we started, or that these did (man 2 pidfd_open)."""
    me, tree, found = os.getpid(), read_tree(), []
    for pid in tree:
        ancestor = tree[pid][0]
        while ancestor not in (me, 0) and ancestor in tree:
            ancestor = tree[ancestor][0]
        # As PID 1 we are the ancestor of all but what was put into the container from outside.
        if ancestor == me and pid != me:
            with contextlib.suppress(OSError):  # gone meanwhile
                found.append(os.pidfd_open(pid))
    return found


def kill_all(processes: list[int]) -> None:
    """Kill them, as far as they still are, and close the descriptors."""
    for process in processes:
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(process, signal.SIGKILL)
        os.close(process)


def kill_descendants() -> None:
    """Kill whatever the agent started. A second pass gets what was forked meanwhile."""
    for _ in range(2):
        kill_all(open_descendants())


class Reaper:
    """Reaps orphans, not at once: a provider's asyncio waits for its own children itself."""

    def __init__(self) -> None:
        self._zombies: dict[int, float] = {}  # pid → since when we have seen it dead

    def reap(self, now: float) -> float | None:
        """Reap what has been dead for long; return in how many seconds to look again, if at all."""
        me = os.getpid()
        dead = [pid for pid, (parent, state) in read_tree().items() if parent == me and state == "Z"]
        self._zombies = {pid: self._zombies.get(pid, now) for pid in dead}
        for pid, since in self._zombies.items():
            if now - since >= _GRACE_S:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
        return _GRACE_S if dead else None
