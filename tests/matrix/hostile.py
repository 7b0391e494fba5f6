"""A homeserver that lets everybody log in, and answers without end.

hostile.py PORT
"""

from __future__ import annotations

import asyncio
import sys

from aiohttp import web

CHUNK = b'{"next_batch": "s", "rooms": {"join": {"' + b"x" * 65_536


async def answer(request: web.Request) -> web.StreamResponse:
    if request.path.endswith("/login"):
        return web.json_response({"user_id": "@second:evil.example", "device_id": "D", "access_token": "t"})
    if not request.path.endswith("/sync"):
        return web.json_response({"one_time_key_counts": {}, "device_keys": {}, "failures": {}})
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    while True:
        await response.write(CHUNK)


async def main() -> None:
    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", int(sys.argv[1])).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
