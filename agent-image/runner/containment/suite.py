"""All attempts: made one by one, each in a process of its own, and judged."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import sys
from functools import partial

from . import canary, gateway, host, kernel, network, rights, router
from .probe import Attempt, Held, Json, Probe, Untried, code, doing, file_text

PROBE_S = 15.0  #: one row; none takes so long unless it hangs
PROBES: tuple[Probe, ...] = (
    *network.PROBES,
    *host.PROBES,
    *rights.PROBES,
    *kernel.PROBES,
    *canary.PROBES,
    *gateway.PROBES,
    *router.PROBES,
)


def judge(probe: Probe, parameters: Json) -> tuple[str, str, str]:
    """Return held, through or untried; what held it; and what came back."""
    if why := parameters["absent"].get(probe.needs):
        return "untried", "", why
    try:
        return "through", "", probe.attempt(parameters)
    except Untried as exc:
        return "untried", "", str(exc)
    except Held as exc:
        return "held", probe.by, str(exc)
    except TimeoutError:  # silence is no refusal
        return "untried", "", "no answer in time"
    except OSError as exc:
        return "held", layer(probe.by, exc.errno or 0), code(exc)


def layer(expected: str, number: int) -> str:
    """Return what refused, as far as it shows in the answer."""
    if number == errno.EACCES and expected == "mount":
        return "uid"
    if number == errno.EPERM and expected == "seccomp" and "\nSeccomp:\t0" in file_text("/proc/self/status"):
        return "capability"
    return {errno.ENOSYS: "seccomp", errno.EROFS: "mount"}.get(number, expected)


def run(probe: Probe, parameters: Json) -> Json:
    """Try one row in a process of its own, which may come to harm."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            found = json.dumps(judge(probe, parameters))
        except Exception as exc:  # a bug of ours, or a machine that nobody has thought of: not held
            found = json.dumps(("untried", "", f"{type(exc).__name__}: {exc}"))
        os.write(writing, found.encode())
        os._exit(0)
    os.close(writing)
    ready = select.select([reading], [], [], PROBE_S)[0]
    text = os.read(reading, 1 << 16) if ready else b""
    os.close(reading)
    if not ready:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if text:
        result, by, detail = json.loads(text)
    elif status == -signal.SIGSYS:
        result, by, detail = "held", "seccomp", "SIGSYS"
    else:
        died = f"died: {status}" if ready else f"no end within {PROBE_S:g} s"
        result, by, detail = "untried", "", died
    return {"name": probe.name, "tries": probe.tries, "result": result, "by": by, "detail": detail[:200]}


def absent_here(parameters: Json) -> dict[str, str]:
    """Return what rows need and this machine does not have, each with what that means. For the host."""
    absent: dict[str, str] = {}

    def look(need: str, why: str, attempt: Attempt, without: tuple[str, ...] = ()) -> None:
        found = run(Probe(need, "", "", attempt), parameters | {"absent": {}})
        if found["detail"] in without or (not without and found["result"] != "through"):
            absent[need] = why

    for name in kernel.NUMBERS:
        look(name, "this kernel does not have it", partial(kernel.exists, name), ("ENOSYS",))
    for name, *family in network.FAMILIES:
        attempt = doing(socket.socket, *family)
        look(name, "this kernel does not have it", attempt, ("EAFNOSUPPORT", "EPROTONOSUPPORT"))
    look("32-bit", "this kernel runs no 32-bit programs", kernel.old_call)
    look("route", "this host has no way itself", partial(network.route, socket.AF_INET, "192.0.2.1"))
    look("route6", "this host has no way itself", partial(network.route, socket.AF_INET6, "2001:db8::1"))
    look("dns", "this host's name server does not answer", network.resolve)
    look("ping", "this host does not let its own person ping", network.ping)
    return absent
