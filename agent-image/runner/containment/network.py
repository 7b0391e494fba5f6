"""Attempts at a network, which an agent has none of."""

from __future__ import annotations

import socket
import struct
from functools import partial

from .probe import ANSWER_S, Json, Probe, doing, listed

_INET, _INET6 = socket.AF_INET, socket.AF_INET6
_STREAM, _DATAGRAM, _RAW = socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW
_METADATA = "169.254.169.254"  #: where clouds tell their machines secrets
#: Families that a kernel may lack: the key of absent_here(), number, kind, protocol.
FAMILIES = (
    ("packet", 17, _RAW, 0),
    ("vsock", 40, _STREAM, 0),
    ("alg", 38, socket.SOCK_SEQPACKET, 0),
    ("netlink", 16, _RAW, 15),
)


def ask(number: int, kind: int, host: str, key: str, parameters: Json) -> str:
    """Say something to a listener of the host, and see whether it is the host that answers."""
    with socket.socket(number, kind) as sock:
        sock.settimeout(ANSWER_S)
        sock.connect((host, parameters[key]) if host else f"\0{parameters[key]}")
        if kind == socket.SOCK_STREAM:  # nothing else listens there
            return "connected"
        sock.send(b"?")
        answered = parameters["token"].encode() in sock.recv(4096)
        return listed(["the host answered"] * answered, "not the host")


def route(number: int, address: str, _: Json) -> str:
    """Connecting UDP sends nothing; it says whether there is a way."""
    with socket.socket(number, socket.SOCK_DGRAM) as sock:
        sock.connect((address, 53))
        return f"there is a way, from {sock.getsockname()[0]}"


def resolve(parameters: Json) -> str:
    """Ask the host's own name server, by hand: the container has none."""
    query = struct.pack("!6H", 7, 0x100, 1, 0, 0, 0) + b"\x09localhost\0" + struct.pack("!2H", 1, 1)
    server = parameters["nameserver"]
    with socket.socket(_INET6 if ":" in server else _INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(ANSWER_S)
        sock.connect((server, 53))
        sock.send(query)
        return f"{server} answered with {len(sock.recv(512))} bytes"


def ping(parameters: Json) -> str:
    with socket.socket(_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP) as sock:
        sock.settimeout(ANSWER_S)
        sock.sendto(struct.pack("!BBHHH", 8, 0, 0, 1, 1), (parameters["address"], 0))
        return f"{parameters['address']} answered with {len(sock.recv(512))} bytes"


def configure(_: Json) -> str:
    """Give lo another address, as RTM_NEWADDR."""
    message = struct.pack("=BBBBI", 2, 8, 0, 0, 1) + struct.pack("=HH4s", 8, 2, bytes((10, 9, 8, 7)))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        sock.settimeout(ANSWER_S)
        sock.send(struct.pack("=IHHII", 16 + len(message), 20, 0x605, 1, 0) + message)
        error: int = struct.unpack_from("=i", sock.recv(4096), 16)[0]
        if error:
            raise OSError(-error, "RTM_NEWADDR")
    return "did so"


_socket = partial(doing, socket.socket)
# fmt: off
PROBES = (
    Probe("tcp", "reach the host's loopback", "namespace", partial(ask, _INET, _STREAM, "127.0.0.1", "tcp")),
    Probe("tcp6", "the same over IPv6", "namespace", partial(ask, _INET6, _STREAM, "::1", "tcp6"), "ipv6"),
    Probe("udp", "the same by UDP", "namespace", partial(ask, _INET, _DATAGRAM, "127.0.0.1", "udp")),
    Probe("internet", "a way to the Internet", "namespace", partial(route, _INET, "192.0.2.1"), "route"),
    Probe("internet6", "the same over IPv6", "namespace", partial(route, _INET6, "2001:db8::1"), "route6"),
    Probe("metadata", "a way to a cloud's metadata", "namespace", partial(route, _INET, _METADATA), "route"),
    Probe("dns", "ask the host's name server", "namespace", resolve, "dns"),
    Probe("icmp", "ping the host", "namespace", ping, "ping"),
    Probe("abstract", "reach an abstract socket", "namespace", partial(ask, 1, _STREAM, "", "abstract")),
    Probe("configure", "configure the network", "capability", configure),
    Probe("raw-ip", "make a raw IP socket", "capability", _socket(_INET, _RAW, 1)),
    Probe("raw-link", "make a raw packet socket", "seccomp", _socket(17, _RAW, 0), "packet"),
    Probe("vsock", "make a socket to a hypervisor", "seccomp", _socket(40, _STREAM, 0), "vsock"),
    Probe("alg", "make a socket to the kernel's ciphers", "seccomp", _socket(38, 5, 0), "alg"),
    Probe("netlink", "make a socket to the kernel's events", "seccomp", _socket(16, _RAW, 15), "netlink"),
)
# fmt: on
