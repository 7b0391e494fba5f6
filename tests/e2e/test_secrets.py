"""How credentials are given, stored and held, on real systemd."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import pytest

from nanoclawd.credentials import UNENCRYPTED
from tests.e2e.test_anthropic import SETTINGS, Api
from tests.support.machine import Machine, NestedMachine
from tests.support.product import Product

VALUE = "sk-ant-canary-77f09b13"
CREDENTIALS = "/run/systemd/io.systemd.Credentials"
#: Types the line from stdin at a prompt, and prints what a terminal would have shown.
TYPE = """
import os, pty, sys
pid, terminal = pty.fork()
if pid == 0:
    os.execv(sys.argv[1], sys.argv[1:])
shown = b""
while b"not shown" not in shown:
    shown += os.read(terminal, 1024)
os.write(terminal, sys.stdin.readline().encode())
try:
    while data := os.read(terminal, 1024):
        shown += data
except OSError:
    pass
print(shown.decode())
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
OLD_SYSTEMD = """#!/bin/sh
[ "$1" = --version ] && exec echo "systemd 255 (255.4)"
exec /usr/bin/systemctl "$@"
"""


@pytest.fixture(autouse=True)
def nothing_stored(product: Product) -> Iterator[None]:
    yield
    product.ctl("secret", "remove", "anthropic", "--yes", check=False)


def stored(product: Product) -> str:
    """Return where the secret is, after a look at the mode."""
    (secret,) = product.ask("secret", "list")["secrets"]
    assert product.machine.run("stat", "-c", "%a", secret["path"]).stdout == "600\n"
    return str(secret["path"])


def test_value_comes_from_a_prompt_or_stdin_and_from_nowhere_else(
    product: Product, machine: Machine
) -> None:
    ctl = f"{machine.home}/.local/bin/nanoclawctl"
    asked = machine.run("python3", "-c", TYPE, ctl, "secret", "set", "anthropic", input=f"{VALUE}\n")
    assert "Stored 'anthropic'" in asked.stdout and VALUE not in asked.stdout + asked.stderr
    path = stored(product)
    by_prompt = machine.read(path)

    piped = product.ctl("secret", "set", "anthropic", input=VALUE)
    assert VALUE not in piped.stdout + piped.stderr
    assert machine.read(path) != by_prompt

    for wrong in ((VALUE,), ("--value", VALUE), (f"--value={VALUE}",)):
        refused = product.ctl("secret", "set", "anthropic", *wrong, input="x", check=False)
        assert refused.returncode == 2 and VALUE not in refused.stdout + refused.stderr
    refused = product.ctl("secret", "set", f"anthropic={VALUE}", input="x", check=False)
    assert refused.returncode == 5 and VALUE not in refused.stdout + refused.stderr


def test_stored_value_is_one_that_systemd_can_read(product: Product, machine: Machine) -> None:
    product.ctl("secret", "set", "anthropic", input=VALUE)

    decrypted = machine.run(
        "systemd-creds", "--user", "decrypt", "--name=nanoclaw.anthropic", stored(product), "-"
    )

    assert decrypted.stdout == VALUE
    assert VALUE not in machine.read(stored(product))
    product.ctl("secret", "remove", "anthropic", "--yes")
    assert product.ask("secret", "list")["secrets"] == []


def test_what_holds_values_dumps_no_core(product: Product, machine: Machine) -> None:
    product.status()  # the gateway answers, and so it runs
    line = (f"{machine.home}/.local/bin/nanoclawctl", "secret", "set", "anthropic")
    with machine.popen(*line, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as setting:
        found = ("pgrep", "-u", machine.user, "-f", "nanoclawctl secret set")
        pids = [
            machine.wait_for(lambda: machine.run(*found, check=False).stdout.strip()),
            machine.unit("nanoclaw-gateway.service", "MainPID")["MainPID"],
        ]
        for pid in pids:
            # Not dumpable, and so root's.
            machine.wait_for(lambda pid=pid: machine.sh(f"stat -c %U /proc/{pid}/mem") == "root")
            limit = machine.sh(f"grep 'Max core' /proc/{pid}/limits").split()
            assert limit[4:6] == ["0", "0"]
            assert machine.run("cat", f"/proc/{pid}/environ", check=False).returncode != 0
        setting.communicate(VALUE, timeout=30)


def test_below_256_it_is_a_plain_file_and_everybody_says_so(product: Product, machine: Machine) -> None:
    if not isinstance(machine, NestedMachine):
        pytest.skip("needs root, to take systemd's credential service away")
    api = Api(machine)
    product.write(f"{machine.home}/.config/nanoclaw/nanoclaw.toml", SETTINGS)
    machine.systemctl("reload", "nanoclaw")
    agent = product.add(provider="anthropic")
    product.write(f"{machine.home}/old/systemctl", OLD_SYSTEMD, mode="755")
    machine.sh(f"systemctl stop systemd-creds.socket; rm -f {CREDENTIALS}", user="root")
    try:
        # The real version is newer: then a service that is away is no reason for a plain file.
        refused = product.ctl("secret", "set", "anthropic", input=VALUE, check=False)
        assert refused.returncode == 3 and "systemd-creds.socket" in refused.stderr
        assert product.ask("secret", "list")["secrets"] == []

        old = {"PATH": f"{machine.home}/old:/usr/bin:/bin"}
        done = product.ctl("secret", "set", "anthropic", input=VALUE, env=old)
        assert "without encryption" in done.stderr
        assert machine.read(stored(product)) == VALUE
        api.start({"text": "good morning"}, require_key=VALUE)
        assert product.send(agent, "hello") == "good morning"

        assert UNENCRYPTED in product.ctl("secret", "list").stdout
        assert f"usable, but {UNENCRYPTED}" in " ".join(product.ctl("status").stdout.split())
        checks = json.loads(product.ctl("doctor", "--json", check=False).stdout)["checks"]
        (check,) = (check for check in checks if check["name"] == "credential anthropic")
        assert check["state"] == "warning" and UNENCRYPTED in check["found"]
    finally:
        machine.run("systemctl", "start", "systemd-creds.socket", user="root")
        api.stop()

    plain = stored(product)
    product.ctl("secret", "set", "anthropic", input=VALUE)
    assert stored(product) != plain and not machine.exists(plain)
    assert UNENCRYPTED not in product.ctl("status").stdout
