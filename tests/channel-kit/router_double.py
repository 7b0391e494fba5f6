"""A router for one adapter: speaks io.nanoclaw.Channel, holds each call to the contract, and notes it."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanoclawd.idl import read_interface
from nanoclawd.wire import WireError

Json = dict[str, Any]
NAME = "io.nanoclaw.Channel"
INTERFACE = read_interface(Path(__file__).resolve().parents[2] / "nanoclawd/interfaces" / f"{NAME}.varlink")
MESSAGE_BYTES = 1 << 20
DELIVERY: Json = {
    "thread": "",
    "agent": "berta",
    "agentName": "Berta",
    "kind": "message",
    "target": None,
    "choices": [],
    "files": [],
    "inReplyTo": None,
    "events": [],
}
#: In all that it sends: what an adapter does not know it ignores.
FUTURE = {"future": {"of": ["whatever"]}}


@dataclass
class Call:
    method: str
    parameters: Json
    connection: int


@dataclass(eq=False)
class _Connection:
    number: int
    writer: asyncio.StreamWriter
    calls: list[str] = field(default_factory=list)
    attached: bool = False
    chat: str | None = None  #: of this one only


class RouterDouble:
    """Listens from start() to stop(); what it was told stays, as the real one's database does."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.calls: list[Call] = []
        self.violations: list[str] = []  #: of the contract
        self.held: set[str] = set()  #: methods that are not answered
        self.errors: dict[str, list[str]] = defaultdict(list)  #: of the next calls of a method
        self.chat_state = "open"  #: what Invite() is answered
        self.announced: Json | None = None
        self.sent: dict[str, list[str]] = defaultdict(list)  #: receipts by key
        self.parts: dict[str, int] = defaultdict(int)
        self.failed: dict[str, list[bool]] = defaultdict(list)  #: by key: retryable
        self._deliveries: dict[str, Json] = {}  #: not ended
        self._known: set[tuple[str, str, str, int]] = set()
        self._numbers = itertools.count(1)
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, self._path, limit=2 * MESSAGE_BYTES)

    def stop(self) -> None:
        """End as a router does that is restarted."""
        assert self._server is not None
        self._server.close()
        self.hang_up()

    def hang_up(self) -> None:
        for connection in self._connections:
            connection.writer.transport.abort()

    def of(self, method: str, **wanted: Any) -> list[Call]:
        """Return the calls of a method with these parameters."""
        return [
            call
            for call in self.calls
            if call.method == method and all(call.parameters[key] == value for key, value in wanted.items())
        ]

    def is_attached(self) -> bool:
        return any(connection.attached for connection in self._connections)

    def deliver(self, chat: str, text: str, *, parts: int = 0, **more: Any) -> str:
        """Have something sent to a chat, with `more` fields of a Delivery; return its key."""
        key = f"k{next(self._numbers)}"
        self._deliveries[key] = {
            **DELIVERY,
            "key": key,
            "chat": chat,
            "text": text,
            "partsSent": parts,
            **more,
        }
        self.push({"delivery": self._deliveries[key]})
        return key

    def push(self, item: Json) -> None:
        """Send something to who is attached."""
        for connection in self._connections:
            if connection.attached and self._is_for(connection, item):
                self._push(connection, item)

    def _is_for(self, connection: _Connection, item: Json) -> bool:
        chats = {value["chat"] for value in item.values() if "chat" in value}
        return connection.chat is None or not chats or connection.chat in chats

    def _push(self, connection: _Connection, item: Json) -> None:
        # New kinds of items come as fields, of which the adapter knows none.
        shown = {key: {**value, **FUTURE} for key, value in item.items()}
        self._write(connection, {"parameters": {**shown, **FUTURE}, "continues": True})

    def push_again(self, key: str) -> None:
        """What was put off, or not reported, comes again with its key."""
        delivery = self._deliveries[key]
        delivery["partsSent"] = max(delivery["partsSent"], self.parts[key])
        self.push({"delivery": delivery})

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(next(self._numbers), writer)
        self._connections.add(connection)
        try:
            with suppress(OSError, EOFError):
                while True:
                    self._take(connection, (await reader.readuntil(b"\0"))[:-1])
        except (ValueError, asyncio.LimitOverrunError) as exc:
            self.violations.append(f"a message that is none: {exc}")
        finally:
            self._connections.discard(connection)
            writer.close()

    def _take(self, connection: _Connection, data: bytes) -> None:
        message = json.loads(data)
        interface, _, method = message.get("method", "").rpartition(".")
        if interface != NAME or method not in INTERFACE.methods or len(data) > MESSAGE_BYTES:
            self.violations.append(f"called {message.get('method')!r} with {len(data)} bytes")
            return self._write(connection, {"error": "org.varlink.service.MethodNotFound", "parameters": {}})
        try:
            parameters = INTERFACE.check_parameters(method, message.get("parameters") or {})
        except WireError as exc:
            self.violations.append(f"{method}: {exc}")
            wrong = {"error": "org.varlink.service.InvalidParameter", "parameters": {"parameter": exc.path}}
            return self._write(connection, wrong)
        if method in ("Attach", "Deliver", "Invite") and "Announce" not in connection.calls:
            self.violations.append(f"{method} before Announce")
        connection.calls.append(method)
        self.calls.append(Call(method, parameters, connection.number))
        if method == "Attach":
            connection.chat = parameters["chat"]
            return self._attach(connection, more=message.get("more", False))
        if method in self.held:
            return None
        if self.errors[method]:
            error = {"message": "the kit says no", "hint": "", **FUTURE}
            name = f"{NAME}.{self.errors[method].pop(0)}"
            return self._write(connection, {"error": name, "parameters": error})
        return self._write(connection, {"parameters": {**self._answer(method, parameters), **FUTURE}})

    def _attach(self, connection: _Connection, *, more: bool) -> None:
        if not more:
            self.violations.append('Attach without "more"')
        connection.attached = True
        for key in [*self._deliveries]:
            self._deliveries[key]["partsSent"] = max(self._deliveries[key]["partsSent"], self.parts[key])
            item = {"delivery": self._deliveries[key]}
            if self._is_for(connection, item):
                self._push(connection, item)

    def _answer(self, method: str, parameters: Json) -> Json:
        match method:
            case "Announce":
                self.announced = parameters
                return {"channel": "kit"}
            case "Deliver":
                known = tuple(parameters[key] for key in ("chat", "thread", "event", "revision"))
                duplicate = known in self._known
                self._known.add(known)  # type: ignore[arg-type]  # checked
                return {"outcome": "queued", "message": "m1", "duplicate": duplicate}
            case "Invite":
                return {"state": self.chat_state}
            case "React":
                return {"outcome": "kept", "duplicate": False}
            case "Retract":
                return {"unseen": True}
            case "StopTurn":
                return {"stopped": False}
            case "ReportSent":
                self.sent[parameters["key"]].append(parameters["receipt"])
                self._deliveries.pop(parameters["key"], None)
            case "ReportPart":
                self.parts[parameters["key"]] = max(self.parts[parameters["key"]], parameters["parts"])
            case "ReportFailed":
                self.failed[parameters["key"]].append(parameters["retryable"])
                if not parameters["retryable"]:
                    self._deliveries.pop(parameters["key"], None)
        return {}

    def _write(self, connection: _Connection, message: Json) -> None:
        connection.writer.write(json.dumps(message).encode() + b"\0")
