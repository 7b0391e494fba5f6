"""What an attempt to get out is, and the words in which attempts are written."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Json = dict[str, Any]
Attempt = Callable[[Json], str]  #: of the host's PARAMETERS; returns what it got

ANSWER_S = 1.0  #: of whatever answers at once if it is there
LIBC = ctypes.CDLL(None, use_errno=True)


class Held(Exception):
    """The attempt was refused; the text says how."""


class Untried(Exception):
    """It cannot be told here; the text says why."""


class Probe(NamedTuple):
    """One attempt. OSError or Held is a refusal; what it tries would work if the protection were absent."""

    name: str
    tries: str
    by: str  #: kernel, namespace, seccomp, capability, mount, uid, limit, podman, gateway or router
    attempt: Attempt
    needs: str = ""  #: a key of absent_here(): what this machine must have for the row to tell anything


def doing(function: Callable[..., object], *arguments: Any) -> Attempt:
    """Return an attempt to call `function`."""

    def attempt(_: Json) -> str:
        function(*arguments)
        return "did so"

    return attempt


def listed(found: list[str], otherwise: str) -> str:
    """Return what was found; if that is nothing, it is held."""
    if not found:
        raise Held(otherwise)
    return ", ".join(found[:3])


def check(result: int) -> int:
    """Return what a function of the C library returned. Raises OSError."""
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result


def code(exc: OSError) -> str:
    return errno.errorcode.get(exc.errno or 0, type(exc).__name__)


def file_text(path: str) -> str:
    with open(path) as file:
        return file.read()


def walk(top: str) -> Iterator[str]:
    """Return every file below `top` but those of the kernel's own file systems."""
    for directory, directories, names in os.walk(top):
        if directory in ("/proc", "/sys"):
            directories[:] = []
            continue
        for name in names:
            yield os.path.join(directory, name)


def of_host(kind: str, key: str, parameters: Json) -> str:
    """Return the path of one of the host's "files" or "sockets". Raises Untried."""
    if key not in parameters[kind]:
        raise Untried("this host has none")
    path: str = parameters[kind][key]
    return path
