"""The units that we ship: what they name is there, and what they say agrees with the programs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nanoclawd import limits
from tests.support.machine import ROOT

UNITS = sorted(path for path in (ROOT / "units").iterdir() if path.is_file())
PAGES = {path.name for path in (ROOT / "packaging/man").iterdir()}
DISTRIBUTION = {"podman-unshare.1"}


@pytest.mark.parametrize("path", [*UNITS, ROOT / "quadlets/agent.container.in"], ids=lambda path: path.name)
def test_documentation_is_there(path: Path) -> None:
    found = re.findall(r"man:([\w.-]+)\((\d)\)", path.read_text())

    assert found
    assert {f"{name}.{section}" for name, section in found} <= PAGES | DISTRIBUTION


def test_fd_store_holds_the_listeners_of_all_sessions() -> None:
    text = (ROOT / "units/nanoclaw.service").read_text()

    assert f"FileDescriptorStoreMax={limits.FDSTORE}\n" in text


def test_every_unit_is_removed_again() -> None:
    script = (ROOT / "install.sh").read_text()
    named = {
        "nanoclaw" + part + suffix
        for parts, suffix in re.findall(r"nanoclaw\{([^}]*)\}(\.(?:service|socket|slice))", script)
        for part in parts.split(",")
    }

    assert {path.name for path in UNITS} <= named
