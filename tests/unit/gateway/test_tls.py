"""TLS towards the endpoint, with an authority of our own."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from tests.unit.gateway.harness import OK, Reply, bench, post, read_request

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl(1)")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with a key and a certificate for 'localhost', signed by itself."""
    path = tmp_path_factory.mktemp("tls")
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    )
    command += " -addext subjectAltName=DNS:localhost -addext basicConstraints=critical,CA:TRUE"
    subprocess.run(
        [*command.split(), "-keyout", path / "key", "-out", path / "certificate"],
        check=True,
        capture_output=True,
    )
    both = path / "both"
    both.write_bytes((path / "key").read_bytes() + (path / "certificate").read_bytes())
    return both


def ask_twice(directory: Path, certificate: Path, settings: str = "") -> tuple[Reply, int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(OK)

    async def main() -> tuple[Reply, int]:
        async with bench(directory, handler, tls=context, settings=settings) as table:
            await table.ask(post())
            return await table.ask(post()), len(table.connections)

    return asyncio.run(main())


def test_two_requests_need_one_handshake(
    directory: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))

    reply, connections = ask_twice(directory, certificate)

    assert (reply.status, connections) == (200, 1)


def test_certificate_for_another_name_is_refused(
    directory: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    by_address = '[providers.anthropic]\nendpoint = "https://127.0.0.1:PORT"\n'

    reply, connections = ask_twice(directory, certificate, by_address)

    assert (reply.status, connections) == (502, 0)
    assert "certificate" in reply.error["message"]


def test_certificate_of_a_stranger_is_refused(directory: Path, certificate: Path) -> None:
    reply, connections = ask_twice(directory, certificate)

    assert (reply.status, connections) == (502, 0)
    assert "certificate" in reply.error["message"]
