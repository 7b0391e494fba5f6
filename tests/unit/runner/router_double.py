"""A test double of the router's side of io.nanoclaw.Agent: a real wire, no router behind it but this file.

It serves the session's socket to a real runner process, hands out turns, and remembers every call. Its
listener outlives restart(), as systemd keeps the router's.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nanoclawd.idl import read_interface

CONTRACT = read_interface(
    Path(__file__).parents[3] / "nanoclawd" / "interfaces" / "io.nanoclaw.Agent.varlink"
)
WAIT_S = 30.0  # a limit for a test that fails, no pause


Outcome = dict[str, Any]
DONE: Outcome = {"outcome": {"state": "done", "delivery": "m-t1/k", "message": ""}}


class RouterDouble:
    def __init__(self, path: Path, **settings: Any) -> None:
        self.settings = {
            "agent": "berta",
            "session": "s1",
            "provider": "echo",
            "model": "",
            "instructions": "",
            "heartbeatSeconds": 5,
            "idleSeconds": 60,
            **settings,
        }
        self.calls: list[tuple[str, dict[str, Any]]] = []  #: every call but Work(), in the order of arrival
        self.turn: dict[str, Any] | None = None  #: what a new Work() is told; None once it is finished
        self.errors: dict[str, tuple[str, dict[str, Any]]] = {}  #: method → the error it gets, for ever
        self.stay = False  #: the answer to Goodbye()
        self.joining: list[dict[str, Any]] = []  #: messages that the next TakeMessages() gets
        self.deliveries: list[dict[str, Any]] = []  #: the answer to ListDeliveries()
        #: What methods of tools get, or what says so.
        self.outcomes: dict[str, Outcome | Callable[[dict[str, Any]], Outcome]] = {"SendMessage": DONE}
        self.finish_is_lost = (
            False  #: the next FinishTurn() loses its connection instead of getting its answer
        )
        self.hello_at = 0.0  #: time.monotonic() of the first Hello()
        self._changed = threading.Condition()
        self._connections: set[socket.socket] = set()
        self._work: socket.socket | None = None
        self._down = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(16)
        threading.Thread(target=self._accept, daemon=True).start()

    # what a test does

    def give(
        self,
        text: str,
        *,
        id: str = "t1",
        attempt: int = 1,
        sent: dict[str, str] | None = None,
        context: Sequence[dict[str, object]] = (),
        files: Sequence[dict[str, object]] = (),
        command: str | None = None,
    ) -> None:
        """Hand out a turn of one message, now or at the next Work()."""
        turn = {
            "id": id,
            "attempt": attempt,
            "messages": [
                {
                    "id": f"m-{id}",
                    "sender": "Ada",
                    "receivedAt": 1_800_000_000.5,
                    "text": text,
                    "context": [*context],
                    "files": [*files],
                    "command": command,
                }
            ],
            "alreadySent": [{"key": key, "text": text} for key, text in (sent or {}).items()],
        }
        with self._changed:
            self.turn = turn
            if self._work is not None:
                self._reply(self._work, {"turn": turn}, continues=True)

    def stop(self, turn: str = "t1") -> None:
        with self._changed:
            assert self._work is not None
            self._reply(self._work, {"stop": turn}, continues=True)

    def restart(self) -> Callable[[], None]:
        """Cut every connection and answer no new one until the returned function is called."""
        with self._changed:
            self._down = True
            for connection in self._connections:
                connection.shutdown(socket.SHUT_RDWR)
            self._work = None

        def up() -> None:
            with self._changed:
                self._down = False
                self._changed.notify_all()

        return up

    def wait(self, method: str, count: int = 1) -> dict[str, Any]:
        """Wait for the call number `count` of that method; return its parameters."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._of(method)) >= count, WAIT_S), self.calls
            return self._of(method)[count - 1]

    def wait_activity(self, kind: str, text: str = "") -> None:
        def has_come() -> bool:
            return any(c["kind"] == kind and text in c["text"] for c in self._of("ReportActivity"))

        with self._changed:
            assert self._changed.wait_for(has_come, WAIT_S), self.calls

    def count(self, method: str) -> int:
        with self._changed:
            return len(self._of(method))

    def close(self) -> None:
        self._listener.close()
        self.restart()

    # the router's side

    def _of(self, method: str) -> list[dict[str, Any]]:
        return [parameters for name, parameters in self.calls if name == method]

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._down)
            self._connections.add(connection)
        buffer = b""
        try:
            while data := connection.recv(65536):
                buffer += data
                while b"\0" in buffer:
                    raw, _, buffer = buffer.partition(b"\0")
                    with self._changed:
                        self._answer(connection, json.loads(raw))
                        self._changed.notify_all()
        except OSError:
            pass
        finally:
            with self._changed:
                self._connections.discard(connection)
            connection.close()

    def _answer(self, connection: socket.socket, call: dict[str, Any]) -> None:
        method = call["method"].removeprefix("io.nanoclaw.Agent.")
        parameters = call["parameters"]
        CONTRACT.check_parameters(method, parameters)  # raises, and the test fails
        if method == "Work":
            assert call["more"]
            self._work = connection
            if self.turn is not None:
                self._reply(connection, {"turn": self.turn}, continues=True)
            return
        self.calls.append((method, parameters))
        if call.get("oneway"):
            return
        if method in self.errors:
            name, details = self.errors[method]
            self._send(connection, {"error": f"io.nanoclaw.Agent.{name}", "parameters": details})
        elif method == "Hello":
            self.hello_at = self.hello_at or time.monotonic()
            self._reply(connection, self.settings)
        elif method == "FinishTurn" and self.finish_is_lost:
            self.finish_is_lost = False
            connection.shutdown(socket.SHUT_RDWR)
        elif method == "Goodbye":
            self._reply(connection, {"stay": self.stay})
        elif method == "ListDeliveries":
            self._reply(connection, {"deliveries": self.deliveries})
        elif method in ("RenewTurn", "TakeMessages", "FinishTurn", *self.outcomes):
            if self.turn is None or self.turn["id"] != parameters["turn"]:
                error = "io.nanoclaw.Agent.NoSuchTurn"
                self._send(connection, {"error": error, "parameters": {"turn": parameters["turn"]}})
                return
            if method == "TakeMessages":
                joining, self.joining = self.joining, []
                self._reply(connection, {"messages": joining})
                return
            if method == "FinishTurn":
                self.turn = None
            outcome = self.outcomes.get(method, {})
            self._reply(connection, outcome(parameters) if callable(outcome) else outcome)
        else:
            raise AssertionError(call)

    def _reply(
        self, connection: socket.socket, parameters: dict[str, Any], *, continues: bool = False
    ) -> None:
        self._send(connection, {"parameters": parameters, **({"continues": True} if continues else {})})

    def _send(self, connection: socket.socket, reply: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it was cut off: the runner will come back
            connection.sendall(json.dumps(reply).encode() + b"\0")
