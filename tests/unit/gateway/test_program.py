"""The program itself: its process, its Varlink service, and the real SDK of the agents through it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import pytest

from nanoclawd import budget, credentials, varlink
from nanoclawd.ids import CredentialName
from nanoclawd.policy import Rule, to_json
from nanoclawd.wire import Json, VarlinkError
from tests.support.messages_api import MessagesApi
from tests.unit.gateway.harness import KEY, listen

ROOT = Path(__file__).resolve().parents[3]
QUESTION: Any = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}


class Program:
    """The gateway as systemd starts it: with its socket, and someone to notify."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "io.nanoclaw.Gateway"
        self.log = directory / "log"
        self._listener = listen(self.path)
        self._notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notified.bind(str(directory / "notify"))
        self._notified.settimeout(20)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        # LISTEN_PID= is known only after fork(); Python must not be forked from a process with threads.
        shell = 'exec 3<&0 < /dev/null; export LISTEN_PID=$$; exec "$0" -m nanoclawd.gateway'
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["sh", "-c", shell, sys.executable],
                stdin=self._listener.fileno(),
                stderr=log,
                cwd=ROOT,
                env={
                    **{name: value for name, value in os.environ.items() if name != "JOURNAL_STREAM"},
                    "LISTEN_FDS": "1",
                    "LISTEN_FDNAMES": "gateway",
                    "NOTIFY_SOCKET": str(self.directory / "notify"),
                },
            )
        self.wait_notified("READY=1")

    def wait_notified(self, wanted: str) -> None:
        while wanted not in self._notified.recv(4096).decode().splitlines():
            pass

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(30)

    def call(self, method: str, parameters: Json | None = None, *, fd: int | None = None) -> Json:
        async def main() -> Json:
            connection = await varlink.connect(self.path)
            try:
                return await varlink.call(connection, method, parameters or {}, fd=fd)
            finally:
                connection.close()

        return asyncio.run(main())

    def attach(self, listener: socket.socket, session: str = "s1") -> None:
        rules = [to_json(Rule(route="anthropic"))]
        spent = {"day": budget.today(), "tokens": 0, "microdollars": 0, "sessions": []}
        told = {"agent": "berta", "budget": budget.to_json(budget.NO_LIMITS), **spent}
        self.call("io.nanoclaw.Gateway.SetBudget", told)
        self.call("io.nanoclaw.Gateway.SetPolicy", {"agent": "berta", "unknown": "deny", "rules": rules})
        self.call("io.nanoclaw.Gateway.Attach", {"agent": "berta", "session": session}, fd=listener.fileno())

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._listener.close()
        self._notified.close()


def configure(port: int) -> None:
    path = Path(os.environ["XDG_CONFIG_HOME"]) / "nanoclaw" / "nanoclaw.toml"
    path.write_text(f'[providers.anthropic]\nendpoint = "http://127.0.0.1:{port}"\n')


@pytest.fixture
def api() -> Iterator[MessagesApi]:
    with MessagesApi([], require_key=KEY.decode()) as running:
        yield running


@pytest.fixture
def program(directory: Path, api: MessagesApi) -> Iterator[Program]:
    configure(api.port)
    running = Program(directory)
    try:
        running.start()
        yield running
    finally:
        running.close()


@pytest.fixture
def listener(directory: Path, program: Program) -> Iterator[socket.socket]:
    with listen(directory / "gateway.sock") as sock:
        program.attach(sock)
        yield sock


@pytest.fixture
def client(directory: Path, listener: socket.socket) -> Iterator[anthropic.Anthropic]:
    transport = httpx2.HTTPTransport(uds=str(directory / "gateway.sock"), verify=False)
    with anthropic.Anthropic(
        base_url="http://gateway/anthropic",
        api_key="the-gateway-has-it",
        http_client=httpx2.Client(transport=transport, timeout=20),
        max_retries=0,
    ) as sdk:
        yield sdk


def test_sdk_streams_a_turn_with_a_tool(api: MessagesApi, client: anthropic.Anthropic) -> None:
    api.add({"text": "let me look", "tool_use": [{"name": "clock", "input": {"zone": "UTC"}}]})

    with client.messages.stream(**QUESTION) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()

    assert text == "let me look"
    assert message.stop_reason == "tool_use"
    assert message.content[1].type == "tool_use" and message.content[1].input == {"zone": "UTC"}
    (request,) = api.requests
    assert request["headers"]["x-api-key"] == KEY.decode()
    assert "authorization" not in request["headers"]
    assert request["headers"]["host"] == f"127.0.0.1:{api.port}"


def test_sdk_gets_an_event_before_the_next_is_sent(api: MessagesApi, client: anthropic.Anthropic) -> None:
    api.add({"text": "one two", "hold_after": 3})

    with client.messages.stream(**QUESTION) as stream:
        texts = iter(stream.text_stream)
        first = next(texts)
        api.release()
        rest = "".join(texts)

    assert (first, rest) == ("one ", "two")


def test_beta_methods_and_plain_answers_pass(api: MessagesApi, client: anthropic.Anthropic) -> None:
    api.add({"text": "hello"}, {"text": "again"})

    assert client.beta.messages.create(**QUESTION, betas=["x-1"]).content[0].type == "text"
    assert client.messages.create(**QUESTION).content[0].type == "text"

    assert api.requests[0]["headers"]["anthropic-beta"] == "x-1"


def test_sdk_sees_a_stream_that_breaks_off(api: MessagesApi, client: anthropic.Anthropic) -> None:
    api.add({"text": "one two three", "drop_after": 4})

    with (
        pytest.raises((anthropic.APIConnectionError, httpx2.HTTPError)),
        client.messages.stream(**QUESTION) as stream,
    ):
        stream.get_final_message()


def test_sdk_sees_rate_limits(api: MessagesApi, client: anthropic.Anthropic) -> None:
    api.add({"status": 429, "headers": {"retry-after": "7"}})

    with pytest.raises(anthropic.RateLimitError) as caught:
        client.messages.create(**QUESTION)

    assert caught.value.response.headers["retry-after"] == "7"


def test_sdk_tells_about_a_missing_key(client: anthropic.Anthropic) -> None:
    credentials.remove(CredentialName("anthropic"))

    with pytest.raises(anthropic.AuthenticationError, match="nanoclawctl secret set anthropic"):
        client.messages.create(**QUESTION)


def test_sdk_tells_about_a_refused_path(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.PermissionDeniedError, match="does not forward"):
        client.messages.batches.list()


def test_stop_lets_a_stream_finish(api: MessagesApi, program: Program, client: anthropic.Anthropic) -> None:
    api.add({"text": "one two", "hold_after": 3})

    with client.messages.stream(**QUESTION) as stream:
        texts = iter(stream.text_stream)
        next(texts)
        program.signal(signal.SIGTERM)
        program.wait_notified("STOPPING=1")
        api.release()
        rest = "".join(texts)

    assert rest == "two"
    assert program.wait() == 0


def test_restart_answers_what_waited(
    api: MessagesApi, program: Program, listener: socket.socket, client: anthropic.Anthropic
) -> None:
    api.add({"text": "hello"})
    program.signal(signal.SIGKILL)
    program.wait()
    answers: list[anthropic.types.Message] = []
    asking = threading.Thread(target=lambda: answers.append(client.messages.create(**QUESTION)))

    asking.start()
    program.start()
    program.attach(listener)
    asking.join()

    assert answers[0].stop_reason == "end_turn"


def test_reload_reads_the_settings_again(
    api: MessagesApi, program: Program, client: anthropic.Anthropic
) -> None:
    with MessagesApi([{"text": "from the other"}], require_key=KEY.decode()) as other:
        configure(other.port)
        program.signal(signal.SIGHUP)
        program.wait_notified("RELOADING=1")
        program.wait_notified("READY=1")

        client.messages.create(**QUESTION)

        assert len(other.requests) == 1


def test_broken_settings_at_a_reload_change_nothing(
    api: MessagesApi, program: Program, client: anthropic.Anthropic
) -> None:
    api.add({"text": "hello"})
    (Path(os.environ["XDG_CONFIG_HOME"]) / "nanoclaw" / "nanoclaw.toml").write_text("nonsense = 1\n")
    program.signal(signal.SIGHUP)
    program.wait_notified("READY=1")

    client.messages.create(**QUESTION)

    assert "nonsense" in program.log.read_text()


def test_sandbox_that_is_required_and_not_active_ends_all_requests(
    api: MessagesApi, program: Program, client: anthropic.Anthropic
) -> None:
    settings = Path(os.environ["XDG_CONFIG_HOME"]) / "nanoclaw" / "nanoclaw.toml"
    settings.write_text(f"require_sandbox = true\n{settings.read_text()}")
    program.signal(signal.SIGHUP)
    program.wait_notified("RELOADING=1")
    program.wait_notified("READY=1")

    with pytest.raises(anthropic.InternalServerError, match="parts of the sandbox are not active"):
        client.messages.create(**QUESTION)

    assert not api.requests


def test_status_tells_what_there_is(program: Program, listener: socket.socket) -> None:
    status = program.call("io.nanoclaw.Gateway.Status")

    assert status["sessions"] == ["berta/s1"]
    assert status["routes"][0]["credentialState"] == f"usable, but {credentials.UNENCRYPTED}"
    checks = {check["name"]: check["active"] for check in status["sandbox"]}
    assert checks["system-calls"] is False  # nothing confines a test


def test_detach_closes(program: Program, directory: Path, listener: socket.socket) -> None:
    program.call("io.nanoclaw.Gateway.Detach", {"agent": "berta", "session": "s1"})

    assert program.call("io.nanoclaw.Gateway.Status")["sessions"] == []


def unlistened() -> socket.socket:
    return socket.socket(socket.AF_UNIX)


def datagrams(directory: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(directory / "datagrams"))
    return sock


def internet() -> socket.socket:
    sock = socket.socket(socket.AF_INET)
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    return sock


@pytest.mark.parametrize("kind", ["nothing", "file", "unlistened", "datagrams", "internet", "name"])
def test_attach_refuses_what_is_no_listener(program: Program, directory: Path, kind: str) -> None:
    made: dict[str, Any] = {
        "file": lambda: (directory / "file").open("w"),
        "unlistened": unlistened,
        "datagrams": lambda: datagrams(directory),
        "internet": internet,
        "name": lambda: listen(directory / "x.sock"),
    }
    parameters = {"agent": "../berta" if kind == "name" else "berta", "session": "s1"}

    with pytest.raises(VarlinkError) as caught:
        if kind == "nothing":
            program.call("io.nanoclaw.Gateway.Attach", parameters)
        else:
            with made[kind]() as file:
                program.call("io.nanoclaw.Gateway.Attach", parameters, fd=file.fileno())

    assert caught.value.name == "io.nanoclaw.Gateway.Refused"
    assert program.call("io.nanoclaw.Gateway.Status")["sessions"] == []


def test_log_has_one_line_a_request_and_no_content(
    api: MessagesApi, program: Program, client: anthropic.Anthropic
) -> None:
    api.add({"text": "the-answer"})
    question = {**QUESTION, "messages": [{"role": "user", "content": "the-question"}]}

    client.messages.create(**question)
    program.signal(signal.SIGTERM)
    program.wait()

    log = program.log.read_text()
    (line,) = [line for line in log.splitlines() if "request:" in line]
    assert (
        "agent=berta session=s1 way=route route=anthropic method=POST path=/anthropic/v1/messages rule=1 "
        "status=200" in line
    )
    assert not any(word in log for word in ("the-question", "the-answer", KEY.decode()))


def test_key_is_not_in_the_environment(program: Program, client: anthropic.Anthropic) -> None:
    assert program.process is not None

    for name in ("environ", "cmdline"):
        with contextlib.suppress(PermissionError):  # it is not dumpable: for all but root that is closed
            assert KEY not in Path(f"/proc/{program.process.pid}/{name}").read_bytes()


def test_start_by_hand_says_what_to_do() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nanoclawd.gateway"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert "systemctl --user start nanoclaw-gateway.socket" in done.stderr
