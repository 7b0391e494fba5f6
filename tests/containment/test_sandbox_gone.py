"""A host unit whose sandbox is not what its file says: everybody is told, or it does not work at all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.machine import Machine
from tests.support.product import Product

#: Lines taken away, as a system may leave them out in silence. A machine of a test may have no network that
#: PrivateNetwork= could take away.
ROUTER = "[Service]\nRestrictAddressFamilies=\n"
GATEWAY = "[Service]\nMemoryDenyWriteExecute=no\nProtectHome=no\n"
ASK = """
import json, sys
sys.path.insert(0, "/opt/nanoclaw/lib")
from runner.containment import gateway
print(json.dumps(gateway.ask(gateway.head(b"GET /anthropic/v1/models"))[0]))
"""


@pytest.fixture
def broken(machine: Machine, product: Product) -> Iterator[Product]:
    """Both units without some lines."""
    machine.expect_journal("nanoclaw(-gateway)?.service <[34]> (sandbox-|exit|records-|gateway|Failed)")
    machine.expect_journal("<4> nanoclaw.service: Failed")
    drop_in(machine, product, "nanoclaw", ROUTER)
    drop_in(machine, product, "nanoclaw-gateway", GATEWAY)
    restart(machine)
    yield product
    # The router must be able to start before the product is tidied up.
    machine.sh(
        "rm -f ~/.config/systemd/user/nanoclaw*.service.d/50-gone.conf ~/.config/nanoclaw/nanoclaw.toml"
    )
    machine.systemctl("daemon-reload")
    machine.systemctl("reset-failed")
    restart(machine)


def drop_in(machine: Machine, product: Product, unit: str, text: str) -> None:
    product.write(f"{machine.home}/.config/systemd/user/{unit}.service.d/50-gone.conf", text)
    machine.systemctl("daemon-reload")


def restart(machine: Machine, *, check: bool = True) -> None:
    machine.systemctl("restart", "nanoclaw-gateway.service", "nanoclaw.service", check=check)


def inactive(checks: list[dict[str, object]]) -> set[object]:
    return {check["name"] for check in checks if not check["active"]}


def test_status_doctor_and_journal_say_what_is_missing(broken: Product) -> None:
    status, shown = broken.status(), broken.ctl("status").stdout
    doctor = {check["name"]: check for check in broken.ask("doctor", check=False)["checks"]}

    assert inactive(status["sandbox"]) == {"no-internet", "no-packet", "no-netlink"}
    assert {"no-writable-code", "home-hidden"} <= inactive(status["gateway"]["sandbox"])
    assert "no-internet" in shown and "no-writable-code" in shown
    for name in ("router sandbox", "gateway sandbox"):
        assert doctor[name]["state"] == "missing", doctor[name]
    told = {entry["NANOCLAWD_CHECK"] for entry in broken.events("sandbox-inactive")}
    assert {"no-internet", "no-writable-code"} <= told


def test_with_require_sandbox_nothing_works_without(machine: Machine, broken: Product) -> None:
    agent = broken.add(provider="echo")
    broken.ctl("policy", "allow", agent, "/r/anthropic")
    broken.send(agent, "hello")
    before = broken.python_inside(agent, ASK)
    settings = f"{machine.home}/.config/nanoclaw/nanoclaw.toml"
    broken.write(settings, "require_sandbox = true\n")

    restart(machine, check=False)
    refused = broken.ctl("status", check=False)
    drop_in(machine, broken, "nanoclaw", "")
    machine.systemctl("reset-failed")
    machine.systemctl("start", "nanoclaw.service")

    assert refused.returncode != 0
    assert "parts of the sandbox are not active" in refused.stderr and "no-internet" in refused.stderr
    # The router is in order now. The gateway is not, and so it carries out no request.
    assert (before, broken.python_inside(agent, ASK)) == (401, 503)  # no key, and no word about one


ADAPTER = "#!/usr/bin/python3\nimport time\ntime.sleep(600)\n"


def test_an_adapter_without_its_sandbox_is_told_of_and_may_be_refused(
    machine: Machine, product: Product
) -> None:
    machine.expect_journal("nanoclaw-channel@.*<[34]>|nanoclaw.service <3> adapter-failed")
    data, settings = f"{machine.home}/.local/share/nanoclaw/channels", f"{machine.home}/.config/nanoclaw"
    product.write(f"{data}/still/adapter", ADAPTER, mode="755")
    drop_in(machine, product, "nanoclaw-channel@", "[Service]\nMemoryDenyWriteExecute=no\nProtectHome=no\n")
    try:
        product.ctl("channel", "add", "bare", "--kind", "still")
        machine.wait_for(lambda: product.ask("channel", "status", "bare")["channel"]["sandbox"])
        shown = product.ask("channel", "status", "bare")["channel"]
        doctor = {check["name"]: check for check in product.ask("doctor", check=False)["checks"]}
        product.write(f"{settings}/nanoclaw.toml", "require_sandbox = true\n")
        machine.systemctl("reload", "nanoclaw.service")
        product.ctl("secret", "set", "channel-bare", input="x")
        machine.systemctl("restart", "nanoclaw-channel@bare.service", check=False)
        machine.wait_for(lambda: product.state("nanoclaw-channel@bare.service") == "failed", within_s=30)
        status = machine.unit("nanoclaw-channel@bare.service", "ExecMainStatus")["ExecMainStatus"]
    finally:
        product.ctl("channel", "remove", "bare", "--yes", "--purge", check=False)

    gone = inactive(shown["sandbox"])
    assert {"no-writable-code", "home-hidden", "control-hidden", "bus-hidden", "agents-hidden"} <= gone, gone
    assert doctor["channel bare sandbox"]["state"] == "missing"
    assert status == "78"
