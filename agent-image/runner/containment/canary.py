"""Attempts to find a secret: a canary that lies where credentials do."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator

from . import gateway
from .probe import Held, Json, Probe, listed, walk

CANARY = re.compile(rb"NANOCLAWCANARY[0-9a-f]{32}")
SEARCHED_BYTES = 1 << 20  #: of each file
PIECE_BYTES = 64 << 20  #: of each mapping of memory
_IMAGE = ("/usr/", "/opt/", "/lib", "/bin/", "/sbin/", "/var/lib/")  #: older than the canary
_WRONG = (b"GET /", b"TRACE /anthropic/v1/models", b"GET /credentials", b"GET /../v1", b"PUT /anthropic/v1")


def _search(places: Iterator[str], what: str) -> str:
    count, found = 0, []
    for path in places:
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                count += 1
                if CANARY.search(file.read(SEARCHED_BYTES)):
                    found.append(path)
    return listed(found, f"in none of {count} {what}")


def in_environments(_: Json) -> str:
    pids = [name for name in os.listdir("/proc") if name.isdigit()]
    return _search((f"/proc/{pid}/{f}" for pid in pids for f in ("environ", "cmdline")), "environments")


def in_files(_: Json) -> str:
    return _search((path for path in walk("/") if not path.startswith(_IMAGE)), "files")


def in_memory(_: Json) -> str:
    """In the runner's, which we may read: it has our uid."""
    size = 0
    with open("/proc/1/maps") as maps, open("/proc/1/mem", "rb", buffering=0) as memory:
        for first, last in re.findall(r"^([0-9a-f]+)-([0-9a-f]+) rw", maps.read(), re.MULTILINE):
            with contextlib.suppress(OSError, OverflowError, ValueError):
                memory.seek(int(first, 16))
                data = memory.read(min(int(last, 16) - int(first, 16), PIECE_BYTES))
                size += len(data)
                if CANARY.search(data):
                    return "a canary is in the runner's memory"
    raise Held(f"not in {size >> 10} KiB of the runner")


def in_errors(_: Json) -> str:
    said = b"".join(gateway.ask(gateway.head(line))[1] for line in _WRONG)
    if CANARY.search(said):
        return "a canary is in the gateway's answers"
    raise Held(f"not in {len(said)} bytes of its errors")


PROBES = (
    Probe("secret-env", "find a secret in environments", "namespace", in_environments),
    Probe("secret-files", "find one in files", "uid", in_files),
    Probe("secret-memory", "find one in the runner's memory", "router", in_memory),
    Probe("secret-errors", "find one in the gateway's errors", "gateway", in_errors),
)
