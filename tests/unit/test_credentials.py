"""Credentials at rest: with and without systemd's credential service."""

from __future__ import annotations

import base64
import pickle
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanoclawd import credentials, wire
from nanoclawd.cli import secret
from nanoclawd.errors import ConfigError, NotFound, Refused, Unavailable
from nanoclawd.ids import CredentialName

NAME = CredentialName("anthropic")


@pytest.fixture(autouse=True)
def configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(credentials, "SERVICE", tmp_path / "io.systemd.Credentials")
    monkeypatch.setattr(secret, "ask", lambda *_: (0, "systemd 255 (255.4)"))
    return tmp_path / "config"


class CredentialService:
    """What systemd answers, without its cipher; the real one is tried in tests/e2e."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self.error = ""
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rwb") as file:
                data = b""
                while not data.endswith(b"\0"):
                    data += file.read1()
                file.write(wire.encode(self._answer(wire.decode(data[:-1]))) + b"\0")

    def _answer(self, call: wire.Json) -> wire.Json:
        asked = call["parameters"]
        assert asked["scope"] == "user"
        if self.error:
            return {"error": self.error, "parameters": {}}
        if call["method"] == "io.systemd.Credentials.Encrypt":
            blob = base64.b64encode(f"{asked['name']}:{asked['data']}".encode() + b"=" * 200)
            return {"parameters": {"blob": blob.decode()}}
        name, _, data = base64.b64decode(asked["blob"]).decode().partition(":")
        if name != asked["name"]:
            return {"error": "io.systemd.Credentials.NameMismatch", "parameters": {}}
        return {"parameters": {"data": data.partition("==")[0] + "=="}}


@pytest.fixture
def service() -> Iterator[CredentialService]:
    running = CredentialService(credentials.SERVICE)
    yield running
    running.close()


def test_encrypted_credential_comes_back(service: CredentialService, configuration: Path) -> None:
    entry = credentials.write(NAME, b"sk-1")

    assert entry.encrypted
    assert entry.path == configuration / "credstore.encrypted" / "nanoclaw.anthropic"
    assert stat.S_IMODE(entry.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(entry.path.parent.stat().st_mode) == 0o700
    assert b"sk-1" not in entry.path.read_bytes()
    assert max(map(len, entry.path.read_bytes().splitlines())) == 79
    assert credentials.read(NAME).reveal() == b"sk-1"


def test_plain_credential_comes_back_below_256(
    configuration: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret.set_secret("anthropic", b"sk-1\n")

    path = configuration / "nanoclaw" / "credentials" / "anthropic"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert credentials.read(NAME).reveal() == b"sk-1"
    assert "without encryption" in capsys.readouterr().err
    assert not credentials.list_entries()[0].encrypted


@pytest.mark.parametrize("said", ["systemd 256 (256.1)", "systemd 257 (257.13-1)", "systemd 300~rc1", ""])
def test_value_that_systemd_should_encrypt_is_not_stored_plain(
    monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    monkeypatch.setattr(secret, "ask", lambda *_: (0, said))

    with pytest.raises(Unavailable, match="credential service"):
        secret.set_secret("anthropic", b"sk-1")

    assert credentials.list_entries() == []


def test_encrypted_credential_replaces_a_plain_one(configuration: Path) -> None:
    plain = credentials.write(NAME, b"old").path
    running = CredentialService(credentials.SERVICE)
    try:
        credentials.write(NAME, b"new")

        assert not plain.exists()
        assert credentials.read(NAME).reveal() == b"new"
    finally:
        running.close()


def test_blob_under_another_name_is_refused(service: CredentialService) -> None:
    path = credentials.write(NAME, b"sk-1").path
    path.rename(path.with_name("nanoclaw.other"))

    with pytest.raises(ConfigError, match="NameMismatch"):
        credentials.read(CredentialName("other"))


def test_broken_blob_is_refused(service: CredentialService) -> None:
    credentials.write(NAME, b"sk-1").path.write_bytes(b"\xff\xfe")

    with pytest.raises(ConfigError, match="no encrypted credential"):
        credentials.read(NAME)


def test_trouble_of_the_service_is_no_fault_of_the_file(service: CredentialService) -> None:
    credentials.write(NAME, b"sk-1")
    service.error = "io.systemd.System"

    with pytest.raises(Unavailable):
        credentials.read(NAME)


def test_service_that_is_away(service: CredentialService) -> None:
    credentials.write(NAME, b"sk-1")
    credentials.SERVICE.unlink()

    with pytest.raises(Unavailable, match="credential service"):
        credentials.read(NAME)


def test_plain_credential_open_to_others_is_not_used() -> None:
    credentials.write(NAME, b"sk-1").path.chmod(0o640)

    with pytest.raises(ConfigError, match="chmod 600"):
        credentials.read(NAME)


def test_link_is_not_followed(tmp_path: Path) -> None:
    path = credentials.write(NAME, b"sk-1").path
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")

    with pytest.raises(ConfigError):
        credentials.read(NAME)


def test_stamp_changes_with_each_write() -> None:
    assert credentials.stamp(NAME) is None
    stamps = set()
    for _ in range(3):
        credentials.write(NAME, b"same")
        stamps.add(credentials.stamp(NAME))

    assert len(stamps) == 3


def test_list_shows_ours_alone(service: CredentialService, configuration: Path) -> None:
    credentials.write(NAME, b"sk-1")
    credentials.write(CredentialName("matrix-bot"), b"x")
    for other in ("ssh-key", "nanoclaw.", "nanoclaw.BAD", ".nanoclaw.draft"):
        (configuration / "credstore.encrypted" / other).touch()

    assert [entry.name for entry in credentials.list_entries()] == ["anthropic", "matrix-bot"]


def test_remove() -> None:
    credentials.write(NAME, b"sk-1")

    credentials.remove(NAME)

    assert credentials.list_entries() == []
    with pytest.raises(NotFound):
        credentials.remove(NAME)


@pytest.mark.parametrize("name", ["", "A", "1a", "a/b", "../a", "a.b", "a" * 65, "a\n", "é"])
def test_name_is_refused(name: str) -> None:
    with pytest.raises(Refused):
        secret.set_secret(name, b"x")


@pytest.mark.parametrize("value", [b"", b"\n", b"  \r\n", b"x" * (credentials.SECRET_BYTES + 2)])
def test_value_is_refused(value: bytes) -> None:
    with pytest.raises(Refused):
        secret.set_secret("anthropic", value)


def test_write_leaves_nothing_else_behind(configuration: Path) -> None:
    credentials.write(NAME, b"one")
    path = credentials.write(NAME, b"two").path

    assert [entry.name for entry in path.parent.iterdir()] == ["anthropic"]


def test_secret_is_not_pickled() -> None:
    credentials.write(NAME, b"sk-1")

    with pytest.raises(TypeError):
        pickle.dumps(credentials.read(NAME))
