"""A homeserver that is slow, wrong or hostile: a real server on loopback, which says what a test wants."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from nanoclaw_matrix import homeserver as module
from nanoclaw_matrix.homeserver import Away, Homeserver, LoggedOut, Refused, TooLong
from nanoclaw_matrix.inbound import Attachment, Malformed
from nanoclaw_matrix.media import TooLarge, download, upload

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(handler: Handler, directory: Path) -> AsyncIterator[Homeserver]:
    server = web.Server(handler)
    runner = web.ServerRunner(server)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    client = Homeserver(f"http://127.0.0.1:{port}", "@claw:x", directory)
    client.access_token = "secret"
    try:
        yield client
    finally:
        await client.close()
        await runner.cleanup()


def answering(**more: Any) -> Handler:
    async def handle(request: web.Request) -> web.Response:
        return web.json_response(**more)

    return handle


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        ({"data": {"errcode": "M_FORBIDDEN", "error": "no"}, "status": 403}, Refused, "refuses it: no"),
        ({"data": {"errcode": "M_UNKNOWN_TOKEN"}, "status": 401}, LoggedOut, "M_UNKNOWN_TOKEN"),
        ({"data": {}, "status": 502}, Away, "answers 502"),
        ({"data": [1]}, Away, "is no object"),
        ({"text": "{"}, Away, "is no JSON"),
        ({"text": "[" * 500_000}, Away, "is no JSON"),
        ({"data": {}, "status": 302, "headers": {"Location": "http://evil.example"}}, Away, "answers 302"),
    ],
)
def test_what_is_no_good_answer_is_an_error(
    tmp_path: Path, answer: dict[str, Any], error: type[Exception], said: str
) -> None:
    async def run() -> None:
        async with serving(answering(**answer), tmp_path) as client:
            with pytest.raises(error) as raised:
                await client.fetch("GET", "/x")
            assert type(raised.value) is error and said in str(raised.value)

    asyncio.run(run())


def test_a_pause_that_is_asked_for_is_told(tmp_path: Path) -> None:
    answer = {"data": {"errcode": "M_LIMIT_EXCEEDED", "retry_after_ms": 1500}, "status": 429}

    async def run() -> None:
        async with serving(answering(**answer), tmp_path) as client:
            with pytest.raises(Away) as raised:
                await client.fetch("GET", "/x")
            assert raised.value.retry_after_s == 1.5

    asyncio.run(run())


def test_an_answer_without_end_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_BYTES", 100_000)
    sent = 0

    async def pour(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        while sent < 100_000_000:
            await response.write(b" " * 10_000)
            sent += 10_000
        return response

    async def run() -> None:
        async with serving(pour, tmp_path) as client:
            with pytest.raises(TooLong):
                await client.fetch("GET", "/x")

    asyncio.run(run())
    assert sent < 50_000_000  # what the sockets hold, and no more


def test_a_server_that_says_nothing_is_not_waited_for(tmp_path: Path) -> None:
    async def run() -> None:
        over = asyncio.Event()

        async def wait(request: web.Request) -> web.StreamResponse:
            await over.wait()
            return web.Response()

        async with serving(wait, tmp_path) as client:
            with pytest.raises(Away, match="in time"):
                await client.fetch("GET", "/x", timeout_s=0.1)
            over.set()

    asyncio.run(run())


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_file_comes_back_as_it_went(tmp_path: Path, encrypted: bool) -> None:
    data, stored = os.urandom(300_001), b""

    async def keep(request: web.Request) -> web.Response:
        nonlocal stored
        assert request.headers["Authorization"] == "Bearer secret"
        if request.method == "POST":
            stored = await request.read()
            assert (request.query.get("filename") == "a.png") is not encrypted
            return web.json_response({"content_uri": "mxc://x/y"})
        assert request.path == "/_matrix/client/v1/media/download/x/y"
        return web.Response(body=stored)

    async def run() -> None:
        (tmp_path / "a.png").write_bytes(data)
        sent = os.open(tmp_path / "a.png", os.O_RDONLY)
        try:
            async with serving(keep, tmp_path) as client:
                file = {"name": "a.png", "mediaType": "image/png"}
                content = await upload(client, sent, file, encrypted=encrypted, max_bytes=len(data))
                assert (stored == data) is not encrypted
                attachment = Attachment(
                    name="a.png", media_type="", url="mxc://x/y", size=0, key=content.get("file")
                )
                fd = await download(client, attachment, tmp_path, len(data))
                try:
                    assert os.pread(fd, len(data) + 1, 0) == data
                finally:
                    os.close(fd)
                with pytest.raises(TooLarge):
                    await download(client, attachment, tmp_path, len(data) - 1)
                if encrypted:
                    content["file"]["hashes"]["sha256"] = hashlib.sha256(b"").hexdigest()
                    with pytest.raises(Malformed):
                        await download(client, attachment, tmp_path, len(data))
        finally:
            os.close(sent)

    asyncio.run(run())
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]  # nothing is left of it


@pytest.mark.parametrize("url", ["https://x/y", "mxc://x", "mxc://x/../y", "mxc://x/y?z", ""])
def test_a_file_is_only_fetched_from_the_homeserver(tmp_path: Path, url: str) -> None:
    async def run() -> None:
        async with serving(answering(data={}), tmp_path) as client:
            with pytest.raises(Malformed):
                await download(client, Attachment(name="a", media_type="", url=url, size=0), tmp_path, 10)

    asyncio.run(run())
