"""pip in an agent's container, against the index that this machine is configured for, by policy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.machine import ROOT, NestedMachine
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


def test_what_is_refused_is_seen_allowed_and_installed(product: Product) -> None:
    agent = product.add()
    product.send(agent, "hello")
    authorities = product.machine.read(AUTHORITIES)  # this machine's own, too
    product.inside(agent, "sh", "-c", "cat > /tmp/authorities.pem", input=authorities)
    pip = ("pip", "install", "--user", "--retries=0", "--cert=/tmp/authorities.pem", *index_options())
    allowed: list[str] = []

    refused = []
    for _ in range(2 * HOSTS):
        done = product.inside(agent, *pip, PACKAGE, check=False, timeout_s=120)
        if done.returncode == 0:
            break
        events = product.events("request", agent=agent)
        last = [entry for entry in events if "NANOCLAWD_REASON" in entry][
            -1
        ]  # a tunnel's line comes at its end
        reason, host = last["NANOCLAWD_REASON"], last["NANOCLAWD_HOST"]
        if reason in ("dns", "connect", "connect-timeout"):
            pytest.skip("this machine reaches no index")
        refused.append(reason)
        rule = [host]
        if reason == "address":  # a mirror in the local network
            found = product.machine.run("getent", "ahosts", host.rpartition(":")[0]).stdout.splitlines()
            rule += [f"--address={address}" for address in {line.split()[0] for line in found}]
        else:
            assert reason == "no-rule", done.stderr
            allowed.append(host)
        product.ctl("policy", "allow", agent, *rule)

    assert refused[0] == "no-rule"
    shown = product.inside(agent, "python3", "-c", f"import {PACKAGE}; print({PACKAGE}.__file__)").stdout
    assert shown.startswith("/workspace/")
    passed = product.events("request", agent=agent, way="tunnel", status="200")
    assert {entry["NANOCLAWD_HOST"] for entry in passed} == set(allowed)
