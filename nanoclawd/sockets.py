"""Listening Unix sockets: taken from systemd, bound for a session, kept in systemd's fd store."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from systemd import daemon

from nanoclawd import journal, limits, wire
from nanoclawd.errors import NanoclawError, Unavailable

#: container-selinux lets every confined container connect to sockets of this label; the label
#: comes from whoever creates a socket, and systemd cannot set it for us.
_SELINUX_LABEL = b"unconfined_u:unconfined_r:spc_t:s0"
_SELINUX = Path("/sys/fs/selinux/enforce")  #: there if the kernel has it on, enforcing or not
_ATTRIBUTE = Path("/proc/thread-self/attr/sockcreate")  #: man 5 proc_pid_attr
SO_PASSRIGHTS = 83  # linux/include/uapi/asm-generic/socket.h, since Linux 6.16


def take_listeners() -> dict[str, socket.socket]:
    """Return what systemd passed in, by name: socket units' listeners and what we left in the fd store."""
    listeners: dict[str, socket.socket] = {}
    for fd, name in daemon.listen_fds_with_names().items():
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        os.set_inheritable(fd, False)
        listeners[name] = sock
    return listeners


def bind_listener(path: Path, *, foreign: bool = True) -> socket.socket:
    """Return a new listener at `path`; a stale socket there is replaced. Raises Unavailable.

    foreign: for a container, whose uid is any. The directory above keeps others out. Nobody else has to be
    able to connect to ours, and can send descriptors.
    """
    listener: socket.socket | None = None
    try:
        path.unlink(missing_ok=True)
        with _labelled() if foreign else nullcontext():
            listener = socket.socket(
                socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            )
        # Nobody can send a descriptor to it: whoever reads or closes what one came with may have the last
        # reference to a TCP socket that lingers (man 7 socket), and hangs for as long as its sender likes.
        # Before Linux 6.16 only the agents' system call filter saves us from that: it forbids SO_LINGER.
        if foreign:
            with suppress(OSError):
                listener.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
        # Bound through the directory's descriptor, so that sun_path is short however long the directory's
        # path is.
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            listener.bind(f"/proc/self/fd/{directory}/{path.name}")
        finally:
            os.close(directory)
        path.chmod(0o666 if foreign else 0o600)
        listener.listen(limits.LISTEN_BACKLOG)
    except OSError as exc:
        if listener is not None:
            listener.close()
        raise Unavailable(f"cannot listen on '{path}': {exc.strerror}") from exc
    return listener


async def readable(sock: socket.socket) -> None:
    """Return when there is something to read or to accept. No other task may wait for the same."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(sock, _wake, ready)
    try:
        await ready
    finally:
        loop.remove_reader(sock)


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


async def accept(listener: socket.socket) -> socket.socket:
    """Return the next connection. Unlike loop.sock_accept(), it loses none if it is cancelled."""
    listener.setblocking(False)
    while True:
        await readable(listener)
        try:
            return listener.accept()[0]
        except (BlockingIOError, ConnectionError):  # gone before we came
            pass
        except OSError as exc:  # man 2 accept: out of descriptors or memory passes
            journal.warning("accept-failed", f"{exc.strerror}, retrying in 1 s")
            await asyncio.sleep(1)


def turn_away(listener: socket.socket, interface: str, error: NanoclawError) -> None:
    """Tell whoever waits at a Varlink listener why we do not start, and hang up.

    A connection that nobody takes would make systemd start us again at once, for ever.
    """
    parameters = {"message": f"the router cannot start: {error.message}", "hint": error.hint}
    reply = wire.encode({"error": f"{interface}.Unavailable", "parameters": parameters}) + b"\0"
    until = time.monotonic() + limits.TURN_AWAY_S
    listener.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            caller, _ = listener.accept()
            # The call is read first: a hang-up with it unread takes the reply away from the caller.
            with caller, suppress(OSError):
                caller.settimeout(max(0.01, min(0.5, until - time.monotonic())))
                while b"\0" not in caller.recv(1 << 16) and time.monotonic() < until:
                    pass
                caller.sendall(reply)


def store_listener(name: str, listener: socket.socket) -> None:
    """Leave a copy with systemd, so that it outlives us: who connects meanwhile waits in its backlog."""
    daemon.notify(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}", fds=[listener.fileno()])


def forget_listener(name: str) -> None:
    """Have systemd close its copy."""
    daemon.notify(f"FDSTOREREMOVE=1\nFDNAME={name}")


@contextmanager
def _labelled() -> Iterator[None]:
    """Create sockets with the SELinux label that containers may connect to, where there is SELinux."""
    if not _SELINUX.exists():
        yield
        return
    try:
        _ATTRIBUTE.write_bytes(_SELINUX_LABEL)
    except OSError as exc:
        journal.warning(
            "selinux-label-refused", f"{exc.strerror}; agents may be unable to connect", label=_SELINUX_LABEL
        )
    try:
        yield
    finally:
        with suppress(OSError):  # then it was not set either
            _ATTRIBUTE.write_bytes(b"")
