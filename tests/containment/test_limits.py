"""Memory, tasks and CPU of an agent are bounded where the kernel can: on a machine with one of its own."""

from __future__ import annotations

import json
import os
import platform
import subprocess

import pytest

from tests.support.machine import ROOT

RUN_S = 1200


@pytest.mark.kernel
@pytest.mark.skipif(os.geteuid() != 0, reason="a machine of its own needs root")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="user-mode Linux is for x86_64")
def test_memory_tasks_and_cpu_are_bounded() -> None:
    done = subprocess.run(
        [ROOT / "tests/machine/uml", "tests/containment/limits.sh"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=RUN_S,
    )
    assert done.returncode == 0, done.stdout
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    selftest, tasks, cpu, after = lines
    rows = {row["name"]: row for row in selftest["probes"]}
    print(rows["memory-flood"], rows["fork-flood"], tasks, cpu)

    assert {name for name, row in rows.items() if row["result"] == "through"} == set()
    assert (rows["memory-flood"]["result"], rows["memory-flood"]["by"]) == ("held", "limit")
    # conmon, the runner with its threads, and the program itself count too.
    assert 32 <= tasks["processes"] < 64
    assert 0.2 <= cpu["cpu"] <= 0.4
    assert after == {"router": "active"}
