"""The Varlink server on a real socket: what comes in may break every rule, and harms only its sender."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanoclawd import client, limits, varlink
from nanoclawd.errors import Refused, Unavailable
from nanoclawd.idl import parse_interface
from nanoclawd.rates import Rate
from nanoclawd.server import SERVICE, Call, Method, Server, Service
from nanoclawd.wire import Json, VarlinkError, encode
from tests.support.varlink_peer import Peer, eventually

TEST = "org.example.Test"
INTERFACE = parse_interface(
    """\
interface org.example.Test
method Echo(text: string, note: ?string) -> (text: string)
method Count(to: int) -> (number: int)
method Wait() -> ()
method Fill() -> (text: string)
method Refuse() -> ()
error Refused (message: string, hint: string)
"""
)


class Identity:
    """Whom the journal names."""

    unit = "nanoclaw-test@1.service"


class Subject:
    """A server with a service for tests, and what became of its calls."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path = path
        self.echoed: list[str] = []
        self.waiting = asyncio.Event()
        self.ended = asyncio.Event()
        methods = {
            "Echo": Method(handler=self._echo),
            "Count": Method(handler=self._count),
            "Wait": Method(handler=self._wait, more=True),
            "Fill": Method(handler=self._fill, more=True),
            "Refuse": Method(handler=self._refuse),
        }
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(128)
        service = Service(interface=INTERFACE, methods=methods)
        self.server = Server(service, self.listener, **options)

    async def _echo(self, call: Call) -> Json:
        self.echoed.append(call.parameters["text"])
        return {"text": call.parameters["text"]}

    async def _count(self, call: Call) -> Json:
        for number in range(call.parameters["to"]):
            await call.send({"number": number})
        return {"number": call.parameters["to"]}

    async def _wait(self, call: Call) -> Json:
        self.waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.set()
        raise AssertionError

    async def _fill(self, call: Call) -> Json:
        try:
            while True:
                await call.send({"text": "x" * 100_000})
        finally:
            self.ended.set()

    async def _refuse(self, call: Call) -> Json:
        raise Refused("no", hint="ask again")

    async def connect(self) -> Peer:
        peer = await Peer.connect(self.path)
        peer.contracts = (INTERFACE,)
        return peer


@asynccontextmanager
async def served(path: Path, **options: Any) -> AsyncIterator[Subject]:
    """Serve while the body runs; fails if the server ends by itself, as it does after a bug."""
    subject = Subject(path / "socket", **options)
    running = asyncio.create_task(subject.server.run())
    try:
        yield subject
        assert not running.done(), running.exception()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        subject.listener.close()
        (path / "socket").unlink()


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


# --- what is asked rightly -------------------------------------------------------------------------


def test_calls_on_one_connection_are_answered_in_order(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(tmp_path) as subject, await subject.connect() as peer:
            for number in range(100):
                await peer.send(f"{TEST}.Echo", {"text": str(number)})

            answers = [(await peer.result())["text"] for _ in range(100)]

            assert answers == [str(number) for number in range(100)]

    asyncio.run(run())


def test_pipelined_calls_behind_a_stream_wait_for_its_end(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(tmp_path) as subject, await subject.connect() as peer:
            await peer.send(f"{TEST}.Count", {"to": 3}, more=True)
            await peer.send(f"{TEST}.Echo", {"text": "after"})

            replies = [await peer.receive() for _ in range(5)]

            assert replies[:3] == [{"parameters": {"number": n}, "continues": True} for n in range(3)]
            assert replies[3:] == [{"parameters": {"number": 3}}, {"parameters": {"text": "after"}}]

    asyncio.run(run())


def test_oneway_is_done_and_not_answered(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(tmp_path) as subject, await subject.connect() as peer:
            await peer.send(f"{TEST}.Echo", {"text": "oneway"}, oneway=True)
            await peer.send(f"{TEST}.Refuse", oneway=True)
            await peer.send(f"{TEST}.Nothing", oneway=True)
            await peer.send(f"{TEST}.Wait", oneway=True, more=True)

            assert await peer.call(f"{TEST}.Echo", {"text": "answered"}) == {"text": "answered"}
            assert subject.echoed == ["oneway", "answered"]

    asyncio.run(run())


def test_message_may_come_in_pieces(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(tmp_path) as subject, await subject.connect() as peer:
            for byte in (
                encode({"method": f"{TEST}.Echo", "parameters": {"text": "é\N{GRINNING FACE}"}}) + b"\0"
            ):
                peer.writer.write(bytes([byte]))
                await peer.writer.drain()

            assert (await peer.result())["text"] == "é\N{GRINNING FACE}"

    asyncio.run(run())


def test_introspection(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(tmp_path) as subject, await subject.connect() as peer:
            info = await peer.call(f"{SERVICE}.GetInfo")
            assert info["interfaces"] == [SERVICE, TEST]
            for name in info["interfaces"]:
                text = (await peer.call(f"{SERVICE}.GetInterfaceDescription", {"interface": name}))[
                    "description"
                ]
                assert parse_interface(text).name == name

    asyncio.run(run())


def test_service_must_answer_each_method_of_its_interface() -> None:
    with pytest.raises(ValueError, match="table and interface differ"):
        Service(interface=INTERFACE, methods={})


# --- what is asked wrongly -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "parameters"),
    [
        ({"method": f"{TEST}.Nothing"}, "MethodNotFound", {"method": f"{TEST}.Nothing"}),
        ({"method": "org.example.Other.Echo"}, "InterfaceNotFound", {"interface": "org.example.Other"}),
        ({"method": "nothing"}, "InterfaceNotFound", {"interface": ""}),
        ({"method": ""}, "InterfaceNotFound", {"interface": ""}),
        ({"method": "a\0b.\n"}, "InterfaceNotFound", {"interface": r"a\x00b"}),
        ({"method": "é" * 100_000 + ".M"}, "InterfaceNotFound", {"interface": "é" * 256}),
        ({"method": f"{SERVICE}.Nothing"}, "MethodNotFound", {"method": f"{SERVICE}.Nothing"}),
        (
            {"method": f"{SERVICE}.GetInterfaceDescription", "parameters": {"interface": "x" * 999}},
            "InterfaceNotFound",
            {"interface": "x" * 256},
        ),
        ({"method": f"{SERVICE}.GetInterfaceDescription"}, "InvalidParameter", {"parameter": "interface"}),
        ({"method": f"{TEST}.Wait"}, "ExpectedMore", {}),
        ({"method": f"{TEST}.Echo"}, "InvalidParameter", {"parameter": "text"}),
        ({"method": f"{TEST}.Echo", "parameters": None}, "InvalidParameter", {"parameter": "text"}),
        ({"method": f"{TEST}.Echo", "parameters": {"text": 1}}, "InvalidParameter", {"parameter": "text"}),
        (
            {"method": f"{TEST}.Echo", "parameters": {"text": "a\0b"}},
            "InvalidParameter",
            {"parameter": "text"},
        ),
        (
            {"method": f"{TEST}.Echo", "parameters": {"text": "", "x" * 999: 1}},
            "InvalidParameter",
            {"parameter": "x" * 64},
        ),
    ],
)
def test_wrong_call_gets_a_named_error_and_the_connection_goes_on(
    tmp_path: Path, call: Json, error: str, parameters: Json
) -> None:
    async def run() -> None:
        async with served(tmp_path) as subject, await subject.connect() as peer:
            await peer.send_raw(encode(call))

            reply = await peer.receive()

            assert reply == {"error": f"{SERVICE}.{error}", "parameters": parameters}
            assert await peer.call(f"{TEST}.Echo", {"text": "goes on"})

    asyncio.run(run())


def test_expected_error_has_its_interface_name(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(tmp_path) as subject, await subject.connect() as peer:
            with pytest.raises(VarlinkError) as caught:
                await peer.call(f"{TEST}.Refuse")

            assert caught.value.name == f"{TEST}.Refused"
            assert caught.value.parameters == {"message": "no", "hint": "ask again"}

    asyncio.run(run())


MALFORMED = [
    (b"", "message"),
    (b"not json", "message"),
    (b"[]", "message"),
    (b"\xff", "message"),
    (b'{"method": "\\ud800.M"}', "message"),
    (b'{"method": "org.example.Test.Echo", "parameters": {"\\udc00": 1}}', "message"),
    (b'{"method":' + b"[" * 10_000 + b"}", "message"),
    (b'{"method":' + b"[" * 100_000 + b"}", "message"),
    (b"{}", "method"),
    (b'{"method": null}', "method"),
    (b'{"method": ["x"]}', "method"),
    (b'{"method": "a.b", "parameters": []}', "parameters"),
    (b'{"method": "a.b", "parameters": "x"}', "parameters"),
    (b'{"method": "a.b", "more": 1}', "more"),
    (b'{"method": "a.b", "oneway": "yes"}', "more"),
    (b'{"method": "a.b", "more": null}', "more"),
]


@pytest.mark.parametrize(("data", "path"), MALFORMED)
def test_malformed_call_is_named_and_hung_up_on(
    tmp_path: Path, data: bytes, path: str, capfd: pytest.CaptureFixture[str]
) -> None:
    async def run() -> None:
        async with served(tmp_path) as subject:
            subject.server.identity = "content that must not be logged"
            async with await subject.connect() as peer:
                await peer.send_raw(data)

                assert await peer.receive() == {
                    "error": f"{SERVICE}.InvalidParameter",
                    "parameters": {"parameter": path},
                }
                assert await peer.receive() is None
            async with await subject.connect() as peer:
                assert await peer.call(f"{TEST}.Echo", {"text": "others go on"})

    asyncio.run(run())
    assert "content that must not" not in capfd.readouterr().err


def test_half_a_message_and_silence_is_the_end(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(tmp_path) as subject:
            peer = await subject.connect()
            peer.writer.write(b'{"method": "org.ex')
            await peer.close()

            await eventually(lambda: subject.server.active == 0)

    asyncio.run(run())


PARTS = st.sampled_from(
    [
        *(b'"method":', b'"parameters":', b'"more":true', b'"oneway":true', b'"org.example.Test.Echo"'),
        *(b"\0", b"{", b"}", b",", b"\xff", b'"\\ud800"', b"1e999", b"[[[[", b"null", b'{"text":"x"}'),
    ]
)


def test_random_bytes_never_end_the_server(tmp_path: Path) -> None:
    loop = asyncio.new_event_loop()
    subject = None

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(st.binary(max_size=50) | PARTS, max_size=30).map(b"".join))
    def fuzz(data: bytes) -> None:
        async def run() -> None:
            assert subject is not None
            async with await subject.connect() as peer:
                with suppress(OSError):
                    await peer.send_raw(data)
                    peer.writer.write_eof()
                    while await peer.reader.read(65536):
                        pass
            await eventually(lambda: subject.server.active == 0)

        loop.run_until_complete(run())

    async def start() -> None:
        nonlocal subject
        async with served(tmp_path) as subject:
            done.set()
            await stop.wait()

    async def main() -> tuple[asyncio.Event, asyncio.Event]:
        return asyncio.Event(), asyncio.Event()

    done, stop = loop.run_until_complete(main())
    serving = loop.create_task(start())
    try:
        loop.run_until_complete(done.wait())
        fuzz()
    finally:
        stop.set()
        loop.run_until_complete(serving)
        loop.close()


# --- too much ---------------------------------------------------------------------------------------


def test_message_without_end_costs_bounded_memory(tmp_path: Path) -> None:
    total = 100 << 20
    sent = 0

    def flood(path: str) -> None:
        nonlocal sent
        with socket.socket(socket.AF_UNIX) as sock, suppress(OSError):
            sock.connect(path)
            chunk = b"x" * 65536
            while sent < total:
                sent += sock.send(chunk)

    async def run() -> int:
        async with served(tmp_path) as subject:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            await asyncio.to_thread(flood, str(subject.path))
            await eventually(lambda: subject.server.active == 0)
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    grown_kib = asyncio.run(run())

    assert sent < 8 * limits.MESSAGE_BYTES  # then we hung up
    assert grown_kib < 8 * limits.MESSAGE_BYTES >> 10


def test_longest_message_passes_and_a_longer_one_does_not(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(tmp_path) as subject, await subject.connect() as peer:
            frame = len(encode({"method": f"{TEST}.Echo", "parameters": {"text": ""}}))
            text = "x" * (limits.MESSAGE_BYTES - frame)
            await peer.send_raw(encode({"method": f"{TEST}.Echo", "parameters": {"text": text}}))
            assert (await peer.result())["text"] == text

            peer.writer.write(b"x" * (limits.MESSAGE_BYTES + 1))
            reply = await peer.receive()

            assert reply == {"error": f"{SERVICE}.InvalidParameter", "parameters": {"parameter": "size"}}

    asyncio.run(run())


def test_one_that_never_stops_asking_does_not_keep_others_waiting(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(tmp_path) as subject:
            flooder = socket.socket(socket.AF_UNIX)
            flooder.connect(str(subject.path))
            peer = await subject.connect()
            assert await peer.call(f"{TEST}.Echo", {"text": "connected"})
            call = (
                encode({"method": f"{TEST}.Echo", "parameters": {"text": "flood"}, "oneway": True}) + b"\0"
            )
            flooder.setblocking(False)
            with suppress(BlockingIOError):  # until no more fits
                while True:
                    flooder.send(call * 100)
            await peer.send(f"{TEST}.Echo", {"text": "mine"})

            await peer.result()

            before = subject.echoed.index("mine")
            assert before < 100, f"{before} calls of another connection came first"
            flooder.close()
            await peer.close()

    asyncio.run(run())


def test_reader_that_takes_nothing_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(limits, "SEND_S", 0.05)
    offences: list[str] = []

    async def run() -> None:
        async with served(tmp_path, on_offence=offences.append, identity=Identity()) as subject:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(subject.path))
                sock.sendall(encode({"method": f"{TEST}.Fill", "more": True}) + b"\0")

                await asyncio.wait_for(subject.ended.wait(), 20)
                await eventually(lambda: subject.server.active == 0)

    asyncio.run(run())
    assert offences == ["reads no replies"]
    assert "reader-too-slow: hanging up" in capfd.readouterr().err


def test_pipelining_without_reading_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SEND_S", 0.05)
    call = encode({"method": f"{TEST}.Echo", "parameters": {"text": "x" * 60_000}}) + b"\0"

    def flood(path: str) -> None:
        with socket.socket(socket.AF_UNIX) as sock, suppress(OSError):
            sock.connect(path)
            while True:
                sock.sendall(call)

    async def run() -> None:
        async with served(tmp_path) as subject:
            await asyncio.wait_for(asyncio.to_thread(flood, str(subject.path)), 20)
            await eventually(lambda: subject.server.active == 0)

    asyncio.run(run())


def test_connections_above_the_limit_wait_for_a_free_place(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(tmp_path, connections=2) as subject:
            first, second, third = [await subject.connect() for _ in range(3)]
            await third.send(f"{TEST}.Echo", {"text": "third"})
            assert await first.call(f"{TEST}.Echo", {"text": "first"})
            assert await second.call(f"{TEST}.Echo", {"text": "second"})
            assert (subject.server.active, subject.echoed) == (2, ["first", "second"])

            await first.close()

            assert await third.result() == {"text": "third"}
            for peer in (second, third):
                await peer.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("max_fds", "count", "taken"), [(0, 1, False), (0, 250, False), (1, 1, True), (1, 2, False)]
)
def test_descriptors_that_nobody_wants_are_closed(
    tmp_path: Path, max_fds: int, count: int, taken: bool
) -> None:
    offences: list[str] = []

    async def run() -> None:
        async with served(tmp_path, max_fds=max_fds, on_offence=offences.append) as subject:
            await (await subject.connect()).close()
            await eventually(lambda: subject.server.active == 0)
            before = open_fds()
            for _ in range(3):
                peer = await subject.connect()
                read_end, write_end = os.pipe()
                call = encode({"method": f"{TEST}.Echo", "parameters": {"text": "x"}}) + b"\0"
                sock = peer.writer.get_extra_info("socket")
                with socket.socket(fileno=os.dup(sock.fileno())) as sender, suppress(BrokenPipeError):
                    for _ in range(5 if taken else 1):
                        socket.send_fds(sender, [call], [write_end] * count)
                os.close(write_end)

                replies = [await peer.receive() for _ in range(5 if taken else 1)]

                # The server's socket and ours, and our end of the pipe.
                assert open_fds() <= before + 3 + max_fds
                await peer.close()
                await eventually(lambda: subject.server.active == 0)
                assert os.read(read_end, 1) == b""  # nobody holds the other end
                os.close(read_end)
                parameters = {"text": "x"} if taken else {"parameter": "descriptor"}
                assert [reply and reply["parameters"] for reply in replies] == [parameters] * len(replies)
            assert open_fds() == before

    asyncio.run(run())
    assert offences == ([] if taken else [f"descriptor: more than {max_fds} came"] * 3)


def test_calls_beyond_the_burst_come_at_the_rate(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def run() -> float:
        async with served(tmp_path, calls=Rate(per_s=100, burst=50), identity=Identity()) as subject:
            peers = [await subject.connect() for _ in range(2)]
            loop = asyncio.get_running_loop()
            began = loop.time()
            for _ in range(50):
                for peer in peers:
                    await peer.send(f"{TEST}.Echo", {"text": "x"})
            for _ in range(50):
                for peer in peers:
                    await peer.result()
            took_s = loop.time() - began
            for peer in peers:
                await peer.close()
            return took_s

    took_s = asyncio.run(run())

    # Two connections and 100 calls, of which 50 came at once: both share the rate.
    assert 0.45 < took_s < 5
    assert capfd.readouterr().err.count("calls-too-fast") == 1


def test_bytes_count_as_calls_also_those_of_a_connection_that_has_ended(tmp_path: Path) -> None:
    large = {"text": "x" * (limits.MESSAGE_BYTES // 2)}
    calls = Rate(per_s=0.01, burst=1e9)

    async def run() -> None:
        async with served(tmp_path, calls=calls) as subject:
            async with await subject.connect() as peer:
                await peer.call(f"{TEST}.Echo", large)
            async with await subject.connect() as peer:
                await peer.send_raw(b"x" * (limits.MESSAGE_BYTES // 2))
                await peer.receive()
            await eventually(lambda: subject.server.active == 0)

    taken: list[float] = []
    calls.take = lambda times=1: taken.append(times) or 0.0  # type: ignore[method-assign, func-returns-value]
    asyncio.run(run())

    assert sum(taken) == pytest.approx(1.5 * limits.MESSAGE_BYTES / limits.CALL_BYTES + 5, abs=0.5)


def test_offences_are_told_and_refusals_are_not(tmp_path: Path) -> None:
    offences: list[str] = []

    async def run() -> None:
        async with served(tmp_path, on_offence=offences.append) as subject, await subject.connect() as peer:
            for method, parameters in (("Refuse", {}), ("Echo", {"text": "x"})):
                with suppress(VarlinkError):
                    await peer.call(f"{TEST}.{method}", parameters)
            assert offences == []
            for method in ("Echo", "Nothing", "Wait"):
                with pytest.raises(VarlinkError):
                    await peer.call(f"{TEST}.{method}")
            await peer.send_raw(b"x")
            await peer.receive()

    asyncio.run(run())

    names = ("InvalidParameter", "MethodNotFound", "ExpectedMore")
    assert [offence.split()[0] for offence in offences] == [
        *(f"{SERVICE}.{name}" for name in names),
        "message:",
    ]


# --- clients that go away ---------------------------------------------------------------------------


def test_stream_ends_when_its_client_hangs_up(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(tmp_path) as subject:
            peer = await subject.connect()
            await peer.send(f"{TEST}.Wait", more=True)
            await asyncio.wait_for(subject.waiting.wait(), 20)

            await peer.close()

            await asyncio.wait_for(subject.ended.wait(), 20)
            await eventually(lambda: subject.server.active == 0)

    asyncio.run(run())


def test_stream_whose_client_sends_too_much_meanwhile_ends(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(tmp_path) as subject, await subject.connect() as peer:
            await peer.send(f"{TEST}.Wait", more=True)
            with suppress(OSError):
                await peer.send_raw(b"x" * (2 * limits.MESSAGE_BYTES))

            await asyncio.wait_for(subject.ended.wait(), 20)

    asyncio.run(run())


def test_cancelled_server_ends_its_connections_and_keeps_the_listener(tmp_path: Path) -> None:
    async def run() -> None:
        subject = Subject(tmp_path / "socket")
        running = asyncio.create_task(subject.server.run())
        async with await subject.connect() as peer:
            await peer.send(f"{TEST}.Wait", more=True)
            await asyncio.wait_for(subject.waiting.wait(), 20)

            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

            assert subject.ended.is_set() and await peer.receive() is None
            assert subject.listener.fileno() >= 0
        subject.listener.close()

    asyncio.run(run())


def test_bug_in_a_handler_ends_the_server(tmp_path: Path) -> None:
    async def run() -> None:
        subject = Subject(tmp_path / "socket")

        async def broken(call: Call) -> Json:
            raise KeyError("a bug")

        subject.server.service.methods = {**subject.server.service.methods, "Echo": Method(handler=broken)}
        running = asyncio.create_task(subject.server.run())
        async with await subject.connect() as peer:
            await peer.send(f"{TEST}.Echo", {"text": "x"})
            with pytest.raises(ExceptionGroup) as caught:
                await asyncio.wait_for(running, 20)
        assert caught.value.subgroup(KeyError)
        subject.listener.close()

    asyncio.run(run())


# --- our own clients --------------------------------------------------------------------------------


def test_blocking_client(tmp_path: Path) -> None:
    def use(path: Path) -> None:
        with client.Client(path, timeout_s=20) as connection:
            assert connection.call(f"{TEST}.Echo", {"text": "x"}) == {"text": "x"}
            assert [r["number"] for r in connection.stream(f"{TEST}.Count", {"to": 3})] == [0, 1, 2, 3]
            with pytest.raises(VarlinkError, match="Refused"):
                connection.call(f"{TEST}.Refuse")
        with pytest.raises(Unavailable, match="cannot connect"):
            client.Client(path.with_name("nothing"))

    async def run() -> None:
        async with served(tmp_path) as subject:
            await asyncio.to_thread(use, subject.path)

    asyncio.run(run())


@pytest.mark.parametrize("answer", [b"", b"{}", b"no json\0", b"x" * (3 * limits.MESSAGE_BYTES)])
def test_clients_refuse_a_bad_answer(tmp_path: Path, answer: bytes) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    listener.listen()

    def answer_once() -> None:
        sock, _ = listener.accept()
        with sock, suppress(OSError):
            sock.recv(65536)
            sock.sendall(answer)

    async def call() -> None:
        connection = await varlink.connect(tmp_path / "socket")
        try:
            await varlink.call(connection, "a.B", {})
        finally:
            connection.close()

    def call_blocking() -> None:
        with client.Client(tmp_path / "socket") as connection:
            connection.call("a.B")

    for use in (call_blocking, lambda: asyncio.run(call())):
        thread = threading.Thread(target=answer_once)
        thread.start()
        with pytest.raises(Unavailable):
            use()
        thread.join()
    listener.close()


def test_connecting_to_nothing_leaves_nothing_open(tmp_path: Path) -> None:
    async def run() -> None:
        before = open_fds()
        with pytest.raises(Unavailable, match="cannot connect"):
            await varlink.connect(tmp_path / "nothing")
        assert open_fds() == before

    asyncio.run(run())
