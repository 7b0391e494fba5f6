"""The agent image, built by the real Podman at the router's request, from within the router's sandbox."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.machine import ROOT, NestedMachine

SANDBOX = (
    *("PrivateUsers", "PrivateNetwork", "PrivateTmp", "PrivateDevices"),
    *("RestrictNamespaces", "MemoryDenyWriteExecute"),
)
PROGRAM = """
import asyncio, json, sys
from pathlib import Path
from nanoclawd.images import build_image, image_exists

async def main():
    async def progress(line):
        print(line)
    before = await image_exists("localhost/agent:1")
    image = await build_image("localhost/agent:1", base_directory=Path("/srv/base"), progress=progress)
    print(json.dumps([before, image, await image_exists("localhost/agent:1")]))

asyncio.run(main())
"""


@pytest.fixture
def builder(store: str) -> Iterator[NestedMachine]:
    """A machine without images, with what make-base made; `store` is asked for since it runs make-base."""
    machine = NestedMachine(f"build-{os.getpid()}")
    base = Path(os.environ.get("NANOCLAW_CACHE", "/var/cache/nanoclaw")) / "agent-base"
    machine.up("--project", str(ROOT), "--bind-ro", f"{base}:/srv/base")
    yield machine
    machine.down()


def test_the_image_is_built_without_network_from_within_the_sandbox(builder: NestedMachine) -> None:
    builder.systemctl("start", "podman.socket")
    options = [part for name in SANDBOX for part in ("--property", f"{name}=yes")]
    options += ["--property", "ProtectHome=read-only", "--property", "RestrictAddressFamilies=AF_UNIX"]
    run = ("systemd-run", "--user", "--quiet", "--collect", "--pipe", "--wait", "--same-dir", *options)

    first = builder.run(
        *run, "python3", "-c", PROGRAM, cwd=builder.project, timeout_s=300
    ).stdout.splitlines()
    again = builder.run(
        *run, "python3", "-c", PROGRAM, cwd=builder.project, timeout_s=300
    ).stdout.splitlines()

    image = builder.sh("podman image inspect --format '{{.Id}}' localhost/agent:1")
    assert first[0].startswith("Importing ")
    assert first[-1].startswith("[false, ") and first[-1].endswith(", true]")
    assert again[0].startswith("STEP 1/")
    assert again[-1] == f'[true, "{image}", true]'
