"""Where a name may lead: looked up once by us, each answer checked; what was checked is connected to."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable
from concurrent.futures import Executor
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from nanoclawd.gateway import limits
from nanoclawd.policy import Denied, Rule, authority

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

#: What no agent may reach unless a rule names it. Much of it some versions of Python know as not global:
#: here it does not depend on that, and has a name.
REFUSED: tuple[tuple[Network, str], ...] = tuple(
    (ip_network(network), why)
    for network, why in (
        ("0.0.0.0/8", "this host"),  # Linux connects 0.0.0.0 to itself
        ("10.0.0.0/8", "private"),  # RFC 1918: routers, printers, neighbours, the cloud's inside
        ("100.64.0.0/10", "shared"),  # RFC 6598: the provider's inside; a cloud's metadata, tailnets
        ("127.0.0.0/8", "loopback"),  # what listens there trusts this host
        ("168.63.129.16/32", "metadata"),  # a public address that a cloud has for its agent
        ("169.254.0.0/16", "link-local"),  # 169.254.169.254: metadata and credentials of most clouds
        ("172.16.0.0/12", "private"),
        ("192.0.0.0/24", "reserved"),  # RFC 6890; 192.0.0.192: a cloud's metadata
        ("192.0.2.0/24", "documentation"),
        ("192.88.99.0/24", "reserved"),  # RFC 7526: relays of 6to4
        ("192.168.0.0/16", "private"),
        ("198.18.0.0/15", "benchmarking"),  # RFC 2544; used as private
        ("198.51.100.0/24", "documentation"),
        ("203.0.113.0/24", "documentation"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved"),  # with the broadcast address; routable on some private networks
        ("::/128", "this host"),
        ("::1/128", "loopback"),
        ("::ffff:0:0/96", "IPv4-mapped"),  # Linux takes it for the IPv4 address within
        ("::/96", "IPv4-compatible"),  # RFC 4291: the same, of old
        ("64:ff9b::/96", "NAT64"),  # RFC 6052: a translator connects to the IPv4 address within
        ("64:ff9b:1::/48", "NAT64"),  # RFC 8215
        ("100::/64", "discard"),
        ("2001::/32", "Teredo"),  # RFC 4380: an IPv4 address within
        ("2001:db8::/32", "documentation"),
        ("2002::/16", "6to4"),  # RFC 3056: an IPv4 address within
        ("3fff::/20", "documentation"),
        ("fc00::/7", "private"),  # RFC 4193; fd00:ec2::254: metadata
        ("fe80::/10", "link-local"),
        ("fec0::/10", "private"),  # RFC 3879: site-local
        ("ff00::/8", "multicast"),
    )
)
GLOBAL_UNICAST = ip_network("2000::/3")  #: all that IANA has given out of IPv6


def refusal(address: Address, named: Iterable[Network]) -> str | None:
    """Return why no agent may reach `address`, in a word, or None if it may."""
    if any(address in network for network in named):
        return None
    for network, why in REFUSED:
        if address in network:
            return why
    if not address.is_global or (address.version == 6 and address not in GLOBAL_UNICAST):
        return "not public"
    return "this host" if _is_own(address) else None


def refusal_of(host: str) -> str | None:
    """Return why no agent may reach `host` if that is an address; a name is not looked up for this."""
    try:
        return refusal(ip_address(host), ())
    except ValueError:
        return None


def _is_own(address: Address) -> bool:
    """Say whether a connection to `address` would stay on this host. Nothing is sent."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((str(address), 9))
            return bool(probe.getsockname()[0] == str(address))
    except OSError:
        return False  # no way there at all


async def resolve(
    host: str, port: int, rule: Rule, threads: Executor, slots: asyncio.Semaphore
) -> list[Address]:
    """Return the addresses of `host`, by preference, if `rule` allows each of them. Raises Denied.

    All, since a name that leads to a public and to a private address was made to get past such a check.
    """
    named = rule.networks
    addresses = await _look_up(host, port, threads, slots)
    for address in addresses:
        if why := refusal(address, named):
            message = (
                f"{host} leads to {address} ({why}), which a rule must name: "
                f'addresses = ["{address}"] for {authority(host, port)}.'
            )
            raise Denied(403, "address", message)
    return addresses


async def _look_up(host: str, port: int, threads: Executor, slots: asyncio.Semaphore) -> list[Address]:
    try:
        return [ip_address(host)]
    except ValueError:
        pass
    await slots.acquire()
    loop = asyncio.get_running_loop()
    asking = loop.run_in_executor(threads, _getaddrinfo, host, port)

    def done(asked: asyncio.Future[list[Address]]) -> None:
        slots.release()
        if not asked.cancelled():
            asked.exception()  # seen, also if nobody waits any more

    asking.add_done_callback(done)
    try:
        # Shielded: a look-up cannot be broken off, and keeps its slot as long as it has its thread.
        async with asyncio.timeout(limits.CONNECT_S):
            return await asyncio.shield(asking)
    except TimeoutError:
        raise Denied(504, "dns", f"The name {host} was not resolved in time.") from None
    except OSError as exc:
        raise Denied(502, "dns", f"The name {host} cannot be resolved: {exc.strerror}.") from None


def _getaddrinfo(host: str, port: int) -> list[Address]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(ip_address(address[0]) for *_, address in found))
