"""The audit trail of a real installation: what it has, what it shows of whoever changes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise

import pytest

from tests.support.machine import Machine
from tests.support.product import Json, Product

ROUTER = ("nanoclaw.service", "nanoclaw.socket", "nanoclaw-channel.socket")
#: Runs a script of SQL on the router's database, with triggers out of the way. Usage: FILE SCRIPT
FORGE = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
(trigger,) = connection.execute("SELECT sql FROM sqlite_schema WHERE name = 'audit_stays'").fetchone()
connection.executescript(f"DROP TRIGGER audit_stays; {sys.argv[2]}; {trigger}")
"""


@pytest.fixture
def rows(product: Product) -> Callable[..., list[Json]]:
    def of(agent: str, kind: str) -> list[Json]:
        found: list[Json] = product.ask("audit", "list", agent, "--kind", kind)["rows"]
        return found

    return of


def test_decisions_and_changes_are_there_though_the_router_was_away(
    product: Product, machine: Machine, rows: Callable[..., list[Json]]
) -> None:
    agent = product.add()
    product.send(agent, "hello")
    container = product.container(agent)

    def curl(host: str) -> None:
        line = ("curl", "-sS", "-o", "/dev/null", f"http://{host}/way?secret=1")
        machine.run("podman", "exec", container, *line)

    def hosts() -> list[str]:
        return [row["detail"]["host"] for row in rows(agent, "request")]

    product.ctl("policy", "deny", agent, "b.example")
    curl("a.example")
    machine.wait_for(lambda: hosts() == ["a.example:80"])
    machine.systemctl("stop", *ROUTER)
    curl("b.example")
    curl("c.example")
    machine.systemctl("start", *reversed(ROUTER))
    machine.wait_for(lambda: len(hosts()) > 2)
    product.ctl("agent", "stop", agent)

    assert hosts() == ["a.example:80", "b.example:80", "c.example:80"]
    last = rows(agent, "request")[-1]
    assert (last["event"], last["detail"]["reason"], last["detail"]["path"]) == ("denied", "no-rule", "/way")
    assert [row["event"] for row in rows(agent, "control")] == ["AddAgent", "AddRule", "StopAgent"]
    assert product.ctl("audit", "verify").returncode == 0
    exported = [json.loads(line) for line in product.ctl("audit", "export").stdout.splitlines()]
    assert all(row["before"] == before["hash"] for before, row in pairwise(exported))


def test_a_row_that_somebody_changes_is_named(product: Product, machine: Machine) -> None:
    agent = product.add()
    product.ctl("agent", "stop", agent)
    product.ctl("agent", "start", agent)
    number = product.ask("audit", "list", agent)["rows"][1]["seq"]
    database = f"{machine.home}/.local/state/nanoclaw/nanoclaw.db"

    def forge(script: str) -> None:
        machine.run("python3", "-c", FORGE, database, f"{script} WHERE seq = {number}")

    refused = machine.run(
        "python3",
        "-c",
        "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('DELETE FROM audit')",
        database,
        check=False,
    )
    assert "a row is deleted by retention only" in refused.stderr

    forge("UPDATE audit SET event = 'StartAgent'")
    found = product.ctl("audit", "verify", check=False)
    assert found.returncode == 1
    assert f"Row {number} is not: it was changed after it was written." in found.stdout

    forge("UPDATE audit SET event = 'StopAgent'")
    assert product.ctl("audit", "verify").returncode == 0
    head = product.ask("audit", "list", "--limit", "1")["rows"][0]["hash"]
    machine.systemctl("restart", "nanoclaw.service")
    assert product.wait_event("audit-head", hash=head)
