"""Each sandbox line of the host units bites: with it alone, what works without any is refused."""

from __future__ import annotations

import json
import re

import pytest

from tests.support.machine import ROOT, Machine

UNITS = ("nanoclaw.service", "nanoclaw-gateway.service", "nanoclaw-channel@.service")
PROBE = (ROOT / "tests/support/unit_probe.py").read_text()
#: Of no effect that a process could see in a user's manager, or only with a privilege that no user has.
SILENT = {
    *("CapabilityBoundingSet=", "DevicePolicy=closed", "IPAddressDeny=any", "KeyringMode=private"),
    *("ProcSubset=pid", "ProtectClock=yes", "ProtectKernelLogs=yes", "ProtectKernelModules=yes"),
    *("ProtectProc=invisible", "RemoveIPC=yes", "RestrictRealtime=yes", "UMask=0077"),
}
_outcomes: dict[str, dict[str, str]] = {}


def sandbox_lines() -> list[str]:
    """Return the lines of these units that take something away."""
    names = r"Protect\w+|Private\w+|Restrict\w+|SystemCall\w+|NoNewPrivileges|LockPersonality|MemoryDeny\w+"
    names += "|CapabilityBoundingSet|DevicePolicy|IPAddressDeny|KeyringMode|ProcSubset|RemoveIPC|UMask"
    found = {
        line
        for unit in UNITS
        for line in (ROOT / "units" / unit).read_text().splitlines()
        if re.fullmatch(rf"(?:{names})=.*", line)
    }
    return sorted(found)


def outcomes(machine: Machine, *lines: str) -> dict[str, str]:
    """Run the probe as a unit with these lines and no others; return what came of each attempt."""
    key = " ".join(lines)
    if key not in _outcomes:
        outside = "/tmp/unit-probe-outside"
        kinds = " ".join(f"/proc/self/ns/{kind}" for kind in ("ipc", "mnt", "net", "uts"))
        links = machine.sh(f"touch {outside}; readlink {kinds}").splitlines()
        others = json.dumps({link.split(":")[0]: link for link in links})
        options = [f"--property={line}" for line in lines]
        shown = machine.run(
            *("systemd-run", "--user", "--quiet", "--collect", "--wait", "--pipe", *options),
            *("python3", "-c", PROBE, machine.home, outside, others),
        ).stdout
        _outcomes[key] = json.loads(shown)
        machine.run("rm", outside)
    return _outcomes[key]


def test_without_a_sandbox_all_of_it_works(machine: Machine) -> None:
    assert set(outcomes(machine).values()) == {"worked"}, outcomes(machine)


@pytest.mark.parametrize("line", [line for line in sandbox_lines() if line not in SILENT])
def test_a_line_bites(machine: Machine, line: str) -> None:
    assert outcomes(machine, line)[line] != "worked"
