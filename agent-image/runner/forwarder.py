"""The gateway on loopback, for tools that know no Unix sockets: bytes both ways, and nothing understood."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

from . import journal

CONNECTIONS = 12  # fewer than the gateway serves: the provider's own always finds room
_BACKLOG = 64
_CHUNK_BYTES = 1 << 16
_LINGER_S = 10.0  # for what a tool still sends when the gateway has ended


class Forwarder:
    """Listens from the beginning, and forwards once start() was called, for as long as the process lives."""

    def __init__(self, gateway: str, address: tuple[str, int]) -> None:
        """Raises OSError if the address is taken."""
        self._gateway = gateway
        self._slots = threading.Semaphore(CONNECTIONS)
        self.listener = socket.create_server(address, backlog=_BACKLOG)

    def start(self) -> None:
        _start(self._accept)

    def _accept(self) -> None:
        while True:
            self._slots.acquire()
            try:
                client = self.listener.accept()[0]
            except OSError as exc:
                journal.error("forwarder-ended", reason=exc)
                return
            _start(self._join, client)

    def _join(self, client: socket.socket) -> None:
        gateway = socket.socket(socket.AF_UNIX)
        try:
            with client, gateway:
                gateway.connect(self._gateway)
                up = _start(_copy, client, gateway)
                _copy(gateway, client)
                up.join(_LINGER_S)
                for sock in (client, gateway):  # wakes `up`, which close() would not
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)
                up.join()
        except OSError:
            pass  # whoever hung up knows
        finally:
            self._slots.release()


def _start(work: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=work, args=arguments, daemon=True)
    thread.start()
    return thread


def _copy(source: socket.socket, sink: socket.socket) -> None:
    """Pass on what comes until its end, and the end."""
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK_BYTES):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
