"""pip in an agent's container, against the index that this machine is configured for, by policy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.machine import ROOT, Entry, NestedMachine
from tests.support.product import Product, unique_prefix

INSTALL_S = 600
HOSTS = 4  #: an index, where it keeps its files, and their addresses
PACKAGE = "h11"  #: small, without dependencies, and one of ours
AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"


@pytest.fixture
def product(store: str) -> Iterator[Product]:
    """The product on a machine with a network of its own, behind this machine's."""
    machine = NestedMachine(f"index-{os.getpid()}")
    machine.up("--project", str(ROOT), "--store", store, "--net", "pasta")
    try:
        line = ("./install.sh", "--yes", "--no-demo", "--no-image")
        machine.run(*line, cwd=machine.project, timeout_s=INSTALL_S)
        product = Product(machine, unique_prefix())
        yield product
        product.close()
        machine.check_journal()
    finally:
        machine.down()


def index_options() -> list[str]:
    """Return what pip has to be told to use this machine's index; nothing if that is pip's own."""
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"],
        capture_output=True,
        text=True,
        check=False,
    )
    return ["--index-url", asked.stdout.strip()] if asked.returncode == 0 else []


def requests(product: Product, agent: str, status: str) -> list[Entry]:
    return product.events("request", agent=agent, way="tunnel", status=status)


def next_refusal(product: Product, agent: str, known: int) -> Entry:
    """Return what became of the request behind so many that were refused."""
    return product.machine.wait_for(lambda: requests(product, agent, "403")[known:])[0]


def test_what_is_refused_is_seen_allowed_and_installed(product: Product) -> None:
    agent = product.add()
    product.send(agent, "hello")
    authorities = product.machine.read(AUTHORITIES)  # this machine's own, too
    product.inside(agent, "sh", "-c", "cat > /tmp/authorities.pem", input=authorities)
    pip = ("pip", "install", "--user", "--retries=0", "--cert=/tmp/authorities.pem", *index_options())
    refused: list[str] = []
    allowed: set[str] = set()

    while product.inside(agent, *pip, PACKAGE, check=False, timeout_s=120).returncode != 0:
        if requests(product, agent, "502") + requests(product, agent, "504"):
            pytest.skip("this machine reaches no index")
        assert len(refused) < 2 * HOSTS
        last = next_refusal(product, agent, len(refused))
        reason, host = last["NANOCLAWD_REASON"], last["NANOCLAWD_HOST"]
        rule = [host]
        if reason == "address":  # a mirror in the local network
            found = product.machine.run("getent", "ahosts", host.rpartition(":")[0]).stdout.splitlines()
            rule += [f"--address={address}" for address in {line.split()[0] for line in found}]
        product.ctl("policy", "allow", agent, *rule)
        refused.append(reason)
        allowed.add(host)

    assert refused[0] == "no-rule" and set(refused) <= {"no-rule", "address"}
    shown = product.inside(agent, "python3", "-c", f"import {PACKAGE}; print({PACKAGE}.__file__)").stdout
    assert shown.startswith("/workspace/")
    product.machine.wait_for(
        lambda: {entry["NANOCLAWD_HOST"] for entry in requests(product, agent, "200")} == allowed
    )
