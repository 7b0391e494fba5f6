"""The agents' system call filter is narrower than Podman's default, and SECURITY.md says where."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.machine import ROOT, Machine

DEFAULT = "/usr/share/containers/seccomp.json"
OURS = json.loads((ROOT / "quadlets/seccomp.json").read_text())
#: The platforms of our filter, as those of Podman's are called in conditions.
ARCHITECTURES = ("amd64", "arm64", "ppc64le", "riscv64")
NEW_FLAGS = 0x7E020080  # all CLONE_NEW flags of clone(2)
#: For calls that depend on an argument: values of each that either filter knows, and some between.
VALUES = (0, 1, 2, 3, 6, 8, 9, 10, 13, 15, 16, 17, 38, 40, 41, 270, 0x20000, 0x20008, 0xFFFFFFFF, NEW_FLAGS)
#: Prints those of the names on stdin that a 64-bit program of x86 has.
RESOLVE = """
import ctypes, json, sys
library = ctypes.CDLL("libseccomp.so.2")
X86_64 = 0xC000003E
number = lambda name: library.seccomp_syscall_resolve_name_arch(ctypes.c_uint32(X86_64), name.encode())
print(json.dumps([name for name in json.load(sys.stdin) if number(name) >= 0]))
"""


def rules(profile: dict[str, Any], architecture: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Return what is allowed to a program without any capability: names and conditions."""
    for rule in profile["syscalls"]:
        includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
        if rule["action"] != "SCMP_ACT_ALLOW" or includes.get("caps"):
            continue
        if architecture not in includes.get("arches", [architecture]):
            continue
        if architecture in excludes.get("arches", []):
            continue
        yield from ((name, rule.get("args") or []) for name in rule["names"])


def holds(condition: dict[str, Any], arguments: tuple[int, ...]) -> bool:
    value, wanted = arguments[condition["index"]], condition["value"]
    match condition["op"]:
        case "SCMP_CMP_EQ":
            return bool(value == wanted)
        case "SCMP_CMP_NE":
            return bool(value != wanted)
        case "SCMP_CMP_LT":
            return bool(value < wanted)
        case "SCMP_CMP_MASKED_EQ":
            return bool(value & wanted == condition["valueTwo"])
    raise AssertionError(f"not known here: {condition}")


def allows(found: list[list[dict[str, Any]]], arguments: tuple[int, ...]) -> bool:
    return any(all(holds(condition, arguments) for condition in conditions) for conditions in found)


def table(profile: dict[str, Any], architecture: str) -> dict[str, list[list[dict[str, Any]]]]:
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for name, conditions in rules(profile, architecture):
        found.setdefault(name, []).append(conditions)
    return found


@pytest.fixture
def default(machine: Machine) -> dict[str, Any]:
    profile: dict[str, Any] = json.loads(machine.read(DEFAULT))
    return profile


def test_what_it_does_not_name_is_refused() -> None:
    assert (OURS["defaultAction"], OURS["defaultErrnoRet"]) == ("SCMP_ACT_ERRNO", 38)
    assert all(entry["subArchitectures"] == [] for entry in OURS["archMap"])  # no 32-bit calls


def test_it_allows_nothing_that_podmans_default_does_not(default: dict[str, Any]) -> None:
    anywhere = {name for architecture in ARCHITECTURES for name in table(default, architecture)}
    ours, theirs = table(OURS, "amd64"), table(default, "amd64")
    samples = list(itertools.product(VALUES, repeat=3))

    assert ours.keys() - anywhere == set()
    for name in ours.keys() & theirs.keys():
        if ours[name] == [[]] and theirs[name] == [[]]:
            continue
        more = [args for args in samples if allows(ours[name], args) and not allows(theirs[name], args)]
        assert not more, (name, more[:3])


def test_security_md_says_what_it_does_not_allow(machine: Machine, default: dict[str, Any]) -> None:
    ours = table(OURS, "amd64")
    missing = sorted(table(default, "amd64").keys() - ours.keys())
    missing = json.loads(machine.run("python3", "-c", RESOLVE, input=json.dumps(missing)).stdout)
    conditional = {name for name in ours if [] not in ours[name]} - {"personality"}  # as Podman has it

    text = (ROOT / "SECURITY.md").read_text().split("| not allowed, ")[1].split("\n\n")[0]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([a-z0-9_]+)", row)}

    assert named == {*missing, *conditional}
