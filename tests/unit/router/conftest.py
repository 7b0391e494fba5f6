"""A place for a router: see tests/support/router.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.router import Place


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)
