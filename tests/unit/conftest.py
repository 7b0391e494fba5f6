"""A directory for each unit test."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In place of pytest's own, whose long name leaves little for a socket in it (man 7 unix: 108 bytes)."""
    with tempfile.TemporaryDirectory(prefix="nanoclaw-") as directory:
        yield Path(directory)
