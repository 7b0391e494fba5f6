"""A power cut at any moment: the quick form of tests/crash/power_cut.py."""

from __future__ import annotations

import shutil

import pytest

from tests.crash.power_cut import replay


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_what_was_acknowledged_survives_a_power_cut() -> None:
    counts, wrong = replay(prefixes=60, samples=90, seed=1)

    print(counts)
    assert not wrong, "\n".join([*wrong[:20], counts])
