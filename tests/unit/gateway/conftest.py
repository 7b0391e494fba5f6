"""A configuration of its own for each test, with a key in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanoclawd import credentials
from nanoclawd.ids import CredentialName
from tests.unit.gateway.harness import KEY


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty directory; the configuration below it holds the key 'anthropic'."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(credentials, "SERVICE", tmp_path / "no-such-service")
    credentials.write(CredentialName("anthropic"), KEY)
    return tmp_path
