"""The gateway on loopback: bytes both ways, ends included, and connections as many as there are slots."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner import forwarder
from runner.forwarder import Forwarder

WAIT_S = 20.0


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "gateway.sock"))
        listener.listen()
        listener.settimeout(WAIT_S)
        yield listener


@pytest.fixture
def address(gateway: socket.socket) -> Iterator[tuple[str, int]]:
    running = Forwarder(gateway.getsockname(), ("127.0.0.1", 0))
    running.start()
    yield running.listener.getsockname()
    running.listener.shutdown(socket.SHUT_RDWR)
    running.listener.close()


def read_all(sock: socket.socket) -> bytes:
    data = b""
    while piece := sock.recv(1 << 16):
        data += piece
    return data


def test_bytes_and_ends_pass_both_ways(gateway: socket.socket, address: tuple[str, int]) -> None:
    sent = bytes(range(256)) * 4096
    with socket.create_connection(address, WAIT_S) as client, gateway.accept()[0] as server:
        server.settimeout(WAIT_S)
        writing = threading.Thread(target=lambda: (client.sendall(sent), client.shutdown(socket.SHUT_WR)))
        writing.start()
        assert read_all(server) == sent
        writing.join()
        server.sendall(b"after the end")  # of the other direction alone
        server.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"after the end"


def test_tool_that_never_ends_is_ended_after_the_gateway(
    gateway: socket.socket, address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarder, "_LINGER_S", 0.01)
    for _ in range(forwarder.CONNECTIONS + 1):  # each gives its slot back
        with socket.create_connection(address, WAIT_S) as client:
            gateway.accept()[0].close()
            assert read_all(client) == b""


def test_tool_that_sends_what_nobody_reads_is_ended_too(
    gateway: socket.socket, address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarder, "_LINGER_S", 0.01)
    before = threading.active_count()
    with socket.create_connection(address, WAIT_S) as client, gateway.accept()[0] as server:
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                client.send(bytes(1 << 16))
        server.shutdown(socket.SHUT_WR)
        client.settimeout(WAIT_S)
        assert client.recv(1) == b""
        for thread in threading.enumerate()[before:]:
            thread.join(WAIT_S)
            assert not thread.is_alive()


def test_connections_wait_for_a_slot(gateway: socket.socket, address: tuple[str, int]) -> None:
    clients = [socket.create_connection(address, WAIT_S) for _ in range(forwarder.CONNECTIONS + 1)]
    served = [gateway.accept()[0] for _ in range(forwarder.CONNECTIONS)]
    gateway.settimeout(0.1)
    with pytest.raises(TimeoutError):
        gateway.accept()

    served.pop().close()
    clients[0].close()
    for client in clients:
        client.close()

    gateway.settimeout(WAIT_S)
    gateway.accept()[0].close()
    for server in served:
        server.close()


def test_without_a_gateway_tools_are_hung_up_on(tmp_path: Path) -> None:
    running = Forwarder(str(tmp_path / "nothing"), ("127.0.0.1", 0))
    running.start()
    with socket.create_connection(running.listener.getsockname(), WAIT_S) as client:
        assert client.recv(1) == b""
    running.listener.shutdown(socket.SHUT_RDWR)
    running.listener.close()
