"""Files both ways: descriptors of adapters, parts from runners; what hostile ones of both hand over."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from nanoclawd import limits, paths, people, retention
from nanoclawd.db import Transaction, now_ms
from nanoclawd.filestore import safe_name
from nanoclawd.routing import Outcome
from nanoclawd.wire import Json, VarlinkError
from tests.support.router import CHANNEL, Container, Place, Router
from tests.support.varlink_peer import Peer, eventually
from tests.unit.router.test_tools import act, can, working

LINGER_S = 3  #: that a close takes


def memory(data: bytes) -> int:
    fd = os.memfd_create("file")
    os.write(fd, data)
    return fd


def described(name: str, size: int) -> Json:
    return {"name": name, "mediaType": "text/plain", "bytes": size}


async def deliver(router: Router, files: list[Json], fds: list[int], **more: object) -> Json:
    """Hand over a message with files; closes the descriptors."""
    await router.wire("chat", "berta", "someone")
    parameters: Json = {
        "chat": "chat",
        "thread": "",
        "event": "$f",
        "revision": 0,
        "sender": "someone",
        "text": "",
        "agent": "berta",
        "files": files,
        **more,
    }
    peer = await router.peer()
    calling = asyncio.ensure_future(peer.call_with_fds(f"{CHANNEL}.Deliver", parameters, fds))
    await asyncio.sleep(0)  # they are on their way
    for fd in fds:  # so that the last to close one is the router
        os.close(fd)
    return await calling


def stored() -> list[bytes]:
    found = []
    for path in paths.files().iterdir():
        with suppress(FileNotFoundError):  # it is being removed
            found.append(path.read_bytes())
    return found


async def read_all(container: Container, turn: Json) -> Json:
    """A runner's way to what came with its messages."""
    found = {}
    for file in turn["messages"][0]["files"]:
        data = b""
        while part := base64.b64decode(
            (await container.call("ReadFile", {"turn": turn["id"], "id": file["id"], "offset": len(data)}))[
                "data"
            ]
        ):
            data += part
        found[file["name"]] = hashlib.sha256(data).hexdigest()
    return found


async def send_file(container: Container, turn: Json, data: bytes, **more: object) -> Json:
    """A runner's way to send a file."""
    call = {"name": "report.txt", "mediaType": "text/plain", "caption": "here", "destination": None, **more}
    outcome = await act(container, turn, "SendFile", bytes=len(data), **call)
    if outcome is not None:
        return outcome
    offset = 0
    while offset < len(data):
        part = base64.b64encode(data[offset : offset + limits.FILE_CHUNK_BYTES]).decode()
        put = {"turn": turn["id"], "key": call.get("key", "k"), "offset": offset, "data": part}
        offset = (await container.call("PutFile", put))["received"]
    return await act(container, turn, "SendFile", bytes=len(data), **call)


# --- coming --------------------------------------------------------------------------------------------


def test_files_come_to_the_agent_as_they_were(place: Place) -> None:
    big = os.urandom(3 * limits.FILE_CHUNK_BYTES // 2)

    async def run() -> None:
        place.systemd.program = working(read_all)
        async with place.router() as router:
            adapter = await router.attach()
            files = [described("../a/b.txt", 5), described("big", len(big))]
            taken = await deliver(router, files, [memory(b"hello"), memory(big)])
            assert taken["outcome"] == "queued"

            found = json.loads(await adapter.reply())

            digests = [hashlib.sha256(data).hexdigest() for data in (b"hello", big)]
            assert found == {"_a_b.txt": digests[0], "big": digests[1]}
            again = await deliver(router, files[:1], [memory(b"other")])
            assert again["duplicate"] and len(stored()) == 2

    place.run(run)


def test_no_file_of_a_stranger_is_stored_and_what_is_held_waits(place: Place) -> None:
    async def run() -> None:
        place.systemd.program = working(read_all)
        async with place.router() as router:
            adapter = await router.attach()
            await router.wire("chat", "berta", "someone")
            dropped = await deliver(router, [described("a", 1)], [memory(b"x")], sender="@stranger")
            assert (dropped["outcome"], stored()) == (Outcome.DROPPED, [])

            await router.wire("asks", "berta", "someone", access="ask", engagement="every")
            held = await deliver(
                router, [described("a", 1)], [memory(b"x")], sender="@stranger", chat="asks", agent=None
            )
            assert (held["outcome"], stored()) == (Outcome.HELD, [b"x"])
            await router.channels.decide(let_in)
            assert json.loads(await adapter.reply()) == {"a": hashlib.sha256(b"x").hexdigest()}
            (row,) = await router.db._reader.execute_fetchall("SELECT agent FROM file")
            assert row["agent"] == "berta"

    def let_in(tx: Transaction) -> None:
        people.link(tx, people.find_person(tx, people.OWNER), "test", "@stranger", how="linked")

    place.run(run)


def test_what_is_too_much_is_said_in_the_message(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FILE_BYTES", 10)
    monkeypatch.setattr(limits, "FILES_PER_AGENT_BYTES", 15)

    async def texts(container: Container, turn: Json) -> Json:
        return [turn["messages"][0]["text"], [f["name"] for f in turn["messages"][0]["files"]]]  # type: ignore[return-value]

    async def run() -> None:
        place.systemd.program = working(texts)
        async with place.router() as router:
            adapter = await router.attach()
            sizes = (10, 11, 6)
            files = [described(f"f{size}", size) for size in sizes]
            await deliver(router, files, [memory(bytes(size)) for size in sizes], text="look")

            text, names = json.loads(await adapter.reply())

            assert names == ["f10"]
            assert text.startswith(
                "look\n[The file 'f11' did not come along: it is larger than 0 MiB.]\n[The"
            )

    place.run(run)


def tcp_that_lingers() -> int:
    """Return a socket whose last close() takes long: a peer that takes nothing, with data in flight."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sock = socket.create_connection(listener.getsockname())
        peer = listener.accept()[0]
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            sock.send(bytes(1 << 16))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGER_S))
    fd = sock.detach()
    _peers.append(peer)
    return fd


_peers: list[socket.socket] = []


@pytest.fixture
def lingering() -> Iterator[Callable[[], int]]:
    yield tcp_that_lingers
    for peer in _peers:
        peer.close()
    _peers.clear()


def fifo(directory: Path) -> int:
    os.mkfifo(directory / "fifo")
    return os.open(directory / "fifo", os.O_RDWR)


def truncated() -> int:
    fd = memory(b"hello")
    os.ftruncate(fd, 3)
    return fd


def write_only(directory: Path) -> int:
    return os.open(directory / "w", os.O_WRONLY | os.O_CREAT)


def path_only(directory: Path) -> int:
    (directory / "p").write_bytes(b"hello")
    return os.open(directory / "p", os.O_PATH)


@pytest.mark.parametrize(
    "make",
    [
        lambda at: os.open("/dev/zero", os.O_RDONLY),
        fifo,
        lambda at: socket.socketpair()[0].detach(),
        lambda at: truncated(),
        lambda at: memory(b"hello and more"),
        write_only,
        path_only,
        lambda at: os.open(at, os.O_RDONLY),
        lambda at: os.eventfd(0),
        lambda at: os.pidfd_open(os.getpid()),
    ],
    ids=[
        "device",
        "fifo",
        "socket",
        "truncated",
        "grown",
        "write-only",
        "path-only",
        "directory",
        "event",
        "pid",
    ],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the other end of the pair
def test_what_is_no_file_as_said_is_refused(
    place: Place, tmp_path: Path, make: Callable[[Path], int]
) -> None:
    async def run() -> None:
        async with place.router() as router:
            with pytest.raises(VarlinkError, match="files:"):
                await deliver(router, [described("x", 5)], [make(tmp_path)])
            await eventually(lambda: stored() == [])
            assert await router.inbox() == []

    place.run(run)


def test_socket_that_lingers_holds_up_nobody_else(place: Place, lingering: Callable[[], int]) -> None:
    async def run() -> None:
        loop, longest_s = asyncio.get_running_loop(), 0.0

        async def watch() -> None:
            nonlocal longest_s
            while True:
                began = loop.time()
                await asyncio.sleep(0.01)
                longest_s = max(longest_s, loop.time() - began)

        async with place.router() as router:
            watching = asyncio.create_task(watch())
            # One that is refused, then one more than are taken: to close each takes so long.
            with pytest.raises(VarlinkError, match="files:"):
                await deliver(router, [described("x", 5)], [lingering()])
            with suppress(VarlinkError, EOFError):
                await deliver(
                    router, [], [lingering(), *(memory(b"") for _ in range(limits.FILES_PER_MESSAGE))]
                )
            watching.cancel()
            await asyncio.wait((watching,))
            assert longest_s < LINGER_S - 0.5

    place.run(run)


# --- going ---------------------------------------------------------------------------------------------


async def take_file(peer: Peer, key: str, number: int = 0) -> bytes:
    """An adapter's way to a file."""
    fd = await peer.call_for_fd(f"{CHANNEL}.OpenFile", {"key": key, "number": number})
    data = os.pread(fd, 4 * limits.FILE_CHUNK_BYTES, 0)
    os.close(fd)
    return data


def test_file_of_an_agent_goes_to_the_chat(place: Place) -> None:
    big = os.urandom(3 * limits.FILE_CHUNK_BYTES // 2)

    async def send(container: Container, turn: Json) -> Json:
        first = await send_file(container, turn, big, name="../../etc/report.txt")
        again = await send_file(container, turn, big, name="../../etc/report.txt")
        return first == again and first  # type: ignore[return-value]

    async def run() -> None:
        place.systemd.program = working(send)
        async with place.router() as router:
            await can(router)
            adapter = await router.attach()
            await router.deliver("hello")

            delivery = await adapter.delivery()

            file = {"name": "_.._etc_report.txt", "mediaType": "text/plain", "bytes": len(big)}
            assert (delivery["text"], delivery["files"]) == ("here", [file])
            peer = await router.peer()
            assert await take_file(peer, delivery["key"]) == big
            with pytest.raises(VarlinkError, match="no number 1"):
                await take_file(await router.peer(), delivery["key"], 1)
            await adapter.sent(delivery)
            assert json.loads(await adapter.reply())["state"] == "done"
            assert len(stored()) == 1

    place.run(run)


@pytest.mark.parametrize(
    ("capabilities", "text"),
    [
        ({"files": False}, "here\n[file: report.txt, 5 bytes]"),
        ({"fileBytes": 4}, "here\n[file: report.txt, 5 bytes]"),
        ({"fileBytes": 5}, "here"),
    ],
)
def test_file_that_a_channel_does_not_take_is_named(place: Place, capabilities: Json, text: str) -> None:
    async def run() -> None:
        place.systemd.program = working(lambda container, turn: send_file(container, turn, b"hello"))
        async with place.router() as router:
            await can(router, **capabilities)
            adapter = await router.attach()
            await router.deliver("hello")
            delivery = await adapter.delivery()
            assert (delivery["text"], bool(delivery["files"])) == (text, text == "here")
            await adapter.sent(delivery)
            await adapter.reply()

    place.run(run)


def test_upload_goes_on_after_the_router_was_restarted(place: Place) -> None:
    async def part(container: Container, turn: Json, offset: int, data: bytes, key: str = "k") -> int:
        put = {"turn": turn["id"], "key": key, "offset": offset, "data": base64.b64encode(data).decode()}
        received: int = (await container.call("PutFile", put))["received"]
        return received

    async def send(container: Container, turn: Json) -> Json:
        assert await part(container, turn, 3, b"xyz") == 0  # of an upload that is gone
        assert await part(container, turn, 0, b"abc") == 3
        assert await part(container, turn, 0, b"abc") == 3  # said again
        assert await part(container, turn, 9, b"abc") == 3  # a hole
        call = {"name": "f", "mediaType": "", "caption": "", "destination": None, "bytes": 4}
        assert (await act(container, turn, "SendFile", **call)) is None
        assert await part(container, turn, 3, b"d") == 4
        return await act(container, turn, "SendFile", **call)

    async def run() -> None:
        place.systemd.program = working(send)
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("hello")
            assert await adapter.reply() == "[file: f, 4 bytes]"
            await adapter.reply()
            assert stored() == [b"abcd"]

    place.run(run)


def test_flood_of_files_ends(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FILES_PER_AGENT_BYTES", 20)
    monkeypatch.setattr(limits, "FILE_BYTES", 8)

    async def flood(container: Container, turn: Json) -> Json:
        said = [await send_file(container, turn, b"12345", key=f"k{number}") for number in range(6)]
        with pytest.raises(VarlinkError, match="larger than"):
            await send_raw(container, turn)
        for data in ("?", "é"):
            with pytest.raises(VarlinkError, match="base64"):
                await container.call("PutFile", {"turn": turn["id"], "key": "k", "offset": 0, "data": data})
        said.append(await act(container, turn, "SendFile", **{**CALL, "bytes": 9}))
        return ["error" in outcome for outcome in said]  # type: ignore[return-value]

    async def send_raw(container: Container, turn: Json) -> None:
        data = base64.b64encode(b"123456789").decode()
        await container.call("PutFile", {"turn": turn["id"], "key": "huge", "offset": 0, "data": data})

    async def run() -> None:
        place.systemd.program = working(flood)
        async with place.router() as router:
            adapter = await router.attach()
            await router.deliver("hello")
            said = [await adapter.reply() for _ in range(5)]
            assert json.loads(said[-1]) == [False] * 4 + [True] * 3
            await eventually(lambda: stored() == [b"12345"] * 4)

    place.run(run)


CALL = {"name": "f", "mediaType": "", "caption": "", "destination": None}


# --- kept and removed ----------------------------------------------------------------------------------


def test_files_go_with_what_they_came_with(place: Place) -> None:
    async def run() -> None:
        place.systemd.program = working(lambda container, turn: send_file(container, turn, b"out"))
        async with place.router() as router:
            adapter = await router.attach()
            await deliver(router, [described("in", 2)], [memory(b"in")])
            await adapter.reply()
            await adapter.reply()
            await router.settled()
            await router.files.prune()
            assert sorted(stored()) == [b"in", b"out"]

            await retention.prune(router.db, before=now_ms() + 1000)
            await router.files.prune()

            assert stored() == []

    place.run(run)


def test_stray_files_are_swept_at_start(place: Place) -> None:
    async def run() -> None:
        place.registry.held.add("berta")
        async with place.router() as router:
            await deliver(router, [described("in", 2)], [memory(b"in")])
        (paths.files() / "f0123456789abcdef").write_bytes(b"stray")
        async with place.router():
            assert stored() == [b"in"]

    place.run(run)


def test_file_of_what_is_taken_back_goes(place: Place) -> None:
    async def run() -> None:
        place.registry.held.add("berta")
        async with place.router() as router:
            await deliver(router, [described("in", 2)], [memory(b"in")])
            peer = await router.peer()
            event = {"chat": "chat", "thread": "", "event": "$f"}
            assert (await peer.call(f"{CHANNEL}.Retract", event))["unseen"]
            assert stored() == []

    place.run(run)


def test_full_disk_is_told_and_leaves_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: object) -> int:
        raise OSError(28, os.strerror(28))

    async def run() -> None:
        async with place.router() as router:
            fd = memory(b"in")
            with monkeypatch.context() as patch, pytest.raises(VarlinkError, match="No space left"):
                patch.setattr("nanoclawd.filestore.os.write", full)
                await deliver(router, [described("in", 2)], [fd])
            await eventually(lambda: stored() == [])

    place.run(run)


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("report.pdf", "report.pdf"),
        ("../../etc/passwd", "_.._etc_passwd"),
        (".bashrc", "bashrc"),
        ("", "file"),
        ("...", "file"),
        ("a\nb\x1b[0m\u202e.txt", "a_b_[0m_.txt"),
        ("x" * 300 + ".tar", "x" * (limits.FILE_NAME_BYTES - 4) + ".tar"),
        ("ü" * 300, "ü" * (limits.FILE_NAME_BYTES // 2)),
    ],
)
def test_names_are_no_paths(name: str, safe: str) -> None:
    assert safe_name(name) == safe
