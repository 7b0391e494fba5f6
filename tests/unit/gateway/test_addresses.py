"""Which addresses a connection may go to."""

from __future__ import annotations

import asyncio
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoclawd.gateway import addresses
from nanoclawd.gateway.addresses import Address, refusal, resolve
from nanoclawd.policy import Denied, Rule
from tests.support.varlink_peer import eventually


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("0.0.0.0", "this host"),
        ("0.1.2.3", "this host"),
        ("10.0.0.1", "private"),
        ("100.64.0.1", "shared"),
        ("100.100.100.200", "shared"),
        ("127.0.0.1", "loopback"),
        ("127.255.255.254", "loopback"),
        ("168.63.129.16", "metadata"),
        ("169.254.169.254", "link-local"),
        ("172.16.0.1", "private"),
        ("172.31.255.255", "private"),
        ("192.0.0.192", "reserved"),
        ("192.0.2.1", "documentation"),
        ("192.88.99.1", "reserved"),
        ("192.168.1.1", "private"),
        ("198.18.0.1", "benchmarking"),
        ("198.51.100.1", "documentation"),
        ("203.0.113.1", "documentation"),
        ("224.0.0.251", "multicast"),
        ("240.0.0.1", "reserved"),
        ("255.255.255.255", "reserved"),
        ("::", "this host"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.1", "IPv4-mapped"),
        ("::ffff:8.8.8.8", "IPv4-mapped"),
        ("::7f00:1", "IPv4-compatible"),
        ("64:ff9b::7f00:1", "NAT64"),
        ("64:ff9b:1::a00:1", "NAT64"),
        ("100::1", "discard"),
        ("3fff::1", "documentation"),
        ("2001:0:1::1", "Teredo"),
        ("2002:7f00:1::1", "6to4"),
        ("2001:db8::1", "documentation"),
        ("fd00:ec2::254", "private"),
        ("fe80::1", "link-local"),
        ("fe80::1%eth0", "link-local"),
        ("fec0::1", "private"),
        ("ff02::1", "multicast"),
        ("4000::1", "not public"),
        ("8.8.8.8", None),
        ("172.15.255.255", None),
        ("172.32.0.1", None),
        ("2606:4700::1", None),
    ],
)
def test_addresses_that_are_not_public_are_refused(address: str, why: str | None) -> None:
    assert refusal(ip_address(address), ()) == why


def test_address_of_this_host_is_refused_although_it_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "REFUSED", ())
    monkeypatch.setattr(IPv4Address, "is_global", True)

    assert refusal(ip_address("127.0.0.1"), ()) == "this host"


@given(st.ip_addresses())
def test_nothing_passes_that_python_knows_as_special(address: Address) -> None:
    if refusal(address, ()) is None:
        assert address.is_global and not address.is_multicast and not address.is_reserved
        assert not (address.is_private or address.is_loopback or address.is_link_local)
        if isinstance(address, IPv6Address):
            assert not (address.ipv4_mapped or address.sixtofour or address.teredo)


@given(st.ip_addresses())
def test_what_a_rule_names_passes_and_nothing_beside_it(address: Address) -> None:
    named = Rule(host="x.example", addresses=(str(address),)).networks
    other = ip_address(int(address) ^ 1) if address.version == 4 else IPv6Address(int(address) ^ 1)

    assert refusal(address, named) is None
    assert refusal(other, named) == refusal(other, ())


# --- names ------------------------------------------------------------------------------------------


def resolved(monkeypatch: pytest.MonkeyPatch, answers: list[str], rule: Rule) -> list[str]:
    """Look the host of `rule` up where the resolver gives these answers."""

    def getaddrinfo(host: str, port: int, **_: object) -> list[object]:
        assert (host, port) == (rule.host, rule.port)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers]

    async def run() -> list[Address]:
        with ThreadPoolExecutor(1) as threads:
            return await resolve(rule.host, rule.port, rule, threads, asyncio.Semaphore(1))

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return [str(address) for address in asyncio.run(run())]


def test_all_public_answers_are_taken_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ["9.9.9.9", "2620:fe::fe", "9.9.9.9", "8.8.8.8"]

    assert resolved(monkeypatch, answers, Rule(host="x.example")) == ["9.9.9.9", "2620:fe::fe", "8.8.8.8"]


@pytest.mark.parametrize(
    "answers", [["127.0.0.1"], ["9.9.9.9", "127.0.0.1"], ["9.9.9.9", "::ffff:10.0.0.1"]]
)
def test_one_private_answer_is_enough_to_refuse_a_name(
    monkeypatch: pytest.MonkeyPatch, answers: list[str]
) -> None:
    with pytest.raises(Denied) as caught:
        resolved(monkeypatch, answers, Rule(host="x.example"))

    assert (caught.value.status, caught.value.reason) == (403, "address")
    assert f'addresses = ["{ip_address(answers[-1])}"]' in str(caught.value)


def test_private_answer_that_the_rule_names_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = Rule(host="nas.lan", port=80, addresses=("192.168.1.0/24",))

    assert resolved(monkeypatch, ["192.168.1.7"], rule) == ["192.168.1.7"]
    with pytest.raises(Denied):
        resolved(monkeypatch, ["192.168.1.7", "192.168.2.7"], rule)


def test_address_is_not_looked_up_and_named_by_its_own_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolved(monkeypatch, [], Rule(host="127.0.0.1", port=80)) == ["127.0.0.1"]


def test_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        with ThreadPoolExecutor(1) as threads:
            slots = asyncio.Semaphore(1)
            for _ in range(3):  # a slot comes back after a failure
                with pytest.raises(Denied, match=r"nowhere\.invalid"):
                    await resolve("nowhere.invalid", 443, Rule(host="nowhere.invalid"), threads, slots)

    asyncio.run(run())


def test_lookup_that_was_given_up_keeps_its_slot_until_its_thread_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_on, asked = threading.Event(), []

    def getaddrinfo(host: str, port: int, **_: object) -> list[object]:
        asked.append(host)
        go_on.wait(20)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("9.9.9.9", port))]

    async def run() -> None:
        with ThreadPoolExecutor(4) as threads:
            slots = asyncio.Semaphore(1)

            def look_up(host: str) -> asyncio.Task[list[Address]]:
                return asyncio.create_task(resolve(host, 443, Rule(host=host), threads, slots))

            first = look_up("a.example")
            await eventually(lambda: asked)
            first.cancel()
            await asyncio.wait([first])
            second = look_up("b.example")
            await asyncio.wait([second], timeout=0.05)
            assert asked == ["a.example"] and not second.done()
            go_on.set()
            assert [str(address) for address in await second] == ["9.9.9.9"]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    asyncio.run(run())
