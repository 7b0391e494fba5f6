"""From a message to the first request that a model API sees, and what importing its SDK costs alone."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from nanoclawd import paths
from tests.bench import host, upstream
from tests.bench.adapter import agent, attach, deliver, open_channel, stop_containers
from tests.bench.figures import Bound, Figure, distribution, ratio
from tests.support.messages_api import MessagesApi

CTL = "nanoclawctl"
# Timed inside the container, so that starting that is no part of it; as the runner itself is started.
IMPORT = """
import json, subprocess, sys, time
program = "import sys; sys.path.insert(0, '/opt/nanoclaw/lib'); import anthropic"
taken = []
for _ in range(int(sys.argv[1])):
    began = time.monotonic()
    subprocess.run(["/usr/bin/python3", "-IS", "-c", program], check=True)
    taken.append((time.monotonic() - began) * 1000)
print(json.dumps(taken))
"""


async def measure(quick: bool) -> AsyncIterator[Figure]:
    rounds = 2 if quick else 8
    imports: list[float] = []
    firsts: list[float] = []
    replies: list[float] = []
    answer = {"text": "Hello."}
    with MessagesApi([answer], require_key="bench-key", repeat=True) as api:
        # Before the router is told of the agent; the key is made up.
        settings = paths.config() / "nanoclaw.toml"
        before = settings.read_text() if settings.exists() else None
        settings.write_text(f'[providers.anthropic]\nendpoint = "http://127.0.0.1:{api.port}"\n')
        try:
            await host.run(CTL, "secret", "set", "anthropic", input=b"bench-key")
            await host.systemctl("reload", host.ROUTER)
            async with (
                agent("bench_model", "anthropic") as name,
                attach() as adapter,
                AsyncExitStack() as stack,
            ):
                connection = await open_channel(stack)
                for number in range(rounds + 1):  # the first one does not count
                    imports += await _import_times(1)
                    began, wall = adapter.now(), time.time()
                    await deliver(connection, name, f"model/{number}", f"model/{number}", "hello")
                    requests = await asyncio.to_thread(api.wait_requests, number + 1, 60.0)
                    firsts.append((requests[number]["at"] - wall) * 1000)
                    replied = await adapter.wait_reply(f"model/{number}")
                    replies.append((replied - began) * 1000)
                    await stop_containers(name)
        finally:
            if before is None:
                settings.unlink()
            else:
                settings.write_text(before)
            await host.run(CTL, "secret", "remove", "anthropic", "--yes")
            await host.systemctl("reload", host.ROUTER)
    base = distribution("bare: python -c 'import anthropic' in the image", "ms", imports[1:])
    yield base
    first = distribution("cold: message → the model API has the request", "ms", firsts[1:])
    yield first
    yield ratio("… ratio to the bare import", first, base, bounds={"value": Bound(limit=1.5)})
    yield distribution("… reply of a model that answers at once", "ms", replies[1:], upstream=upstream.COLD)


async def _import_times(count: int) -> list[float]:
    options = ("--rm", "--network=none", "--read-only", "--userns=keep-id", "--entrypoint=/usr/bin/python3")
    output = await host.run("podman", "run", *options, host.IMAGE, "-c", IMPORT, str(count))
    return [float(value) for value in json.loads(output)]
