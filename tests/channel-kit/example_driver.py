#!/usr/bin/python3
"""A platform that exists for tests alone, and the kit's driver for it: see docs/channels.md.

Serves the platform on a port of the loopback: lines of JSON, for example_adapter.py. What the kit asks for
comes on stdin and is answered on stdout, a line each.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
from contextlib import suppress
from typing import Any

Json = dict[str, Any]
BOT, TOKEN = "@bot", "a token"


class Platform:
    """Chats, what was said in them, and who is connected. Numbers events for all, as one row."""

    def __init__(self) -> None:
        self.events: list[Json] = []
        self.invitations: dict[str, Json] = {}
        self.joined: set[str] = set()
        self.direct: set[str] = set()
        self.sent: dict[str, Json] = {}  #: the message of each transaction
        self.failure: Json | None = None  #: of all that is sent
        self._changed = asyncio.Event()
        self._closed = False
        self._numbers = itertools.count(1)
        self._writers: set[asyncio.StreamWriter] = set()

    def add(self, kind: str, chat: str, sender: str, **more: Any) -> Json:
        number = next(self._numbers)
        event = {
            "number": number,
            "type": kind,
            "chat": chat,
            "sender": sender,
            "name": sender.strip("@").title(),
            "id": f"m{number}",
            "thread": "",
            "text": "",
            "revision": 0,
            "target": None,
            "mentioned": False,
            "direct": chat in self.direct,
            **more,
        }
        self.events.append(event)
        self._tell()
        return event

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def send_raw(self, data: bytes) -> None:
        """Have those who listen get something else in between, as a hostile server does."""
        for writer in self._writers:
            writer.write(data)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with suppress(OSError, EOFError, ValueError):
            login = json.loads(await reader.readuntil(b"\n"))
            if login.get("login") != TOKEN:
                await self._write(writer, {"error": "wrong token"})
                return
            await self._write(writer, {"user": BOT})
            while True:
                ask = json.loads(await reader.readuntil(b"\n"))
                if "sync" in ask:
                    await self._stream(writer, ask["sync"])
                    break
                await self._write(writer, self._answer(ask))
        self._writers.discard(writer)
        writer.close()

    async def _stream(self, writer: asyncio.StreamWriter, position: int) -> None:
        while not self._closed:
            changed = self._changed
            for event in [e for e in self.events if e["number"] > position]:
                await self._write(writer, {"event": event})
                position = event["number"]
            await changed.wait()

    def _answer(self, ask: Json) -> Json:
        if chat := ask.get("join") or ask.get("leave"):
            self.invitations.pop(chat, None)
            if "join" in ask:
                self.joined.add(chat)
            return {}
        if "invitations" in ask:
            return {"invitations": [*self.invitations.values()]}
        message = ask["send"]
        if self.failure is not None:
            return self.failure
        if message["transaction"] not in self.sent:
            more = {key: message.get(key) for key in ("thread", "text", "target")}
            kind = message.get("type", "message")
            self.sent[message["transaction"]] = self.add(kind, message["chat"], BOT, **more)
        return {"id": self.sent[message["transaction"]]["id"]}

    async def _write(self, writer: asyncio.StreamWriter, message: Json) -> None:
        writer.write(json.dumps(message).encode() + b"\n")
        await writer.drain()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    def close(self) -> None:
        """Let all connections end."""
        self._closed = True
        self._tell()
        self.cut()


class Driver:
    """Does what the kit asks for; each method is a command of its protocol."""

    def __init__(self) -> None:
        self.platform = Platform()
        self._chats = itertools.count(1)
        self._server: asyncio.Server
        self._port = 0

    async def start(self) -> Json:
        self._server = await asyncio.start_server(self.platform.serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        settings = f'host = "127.0.0.1"\nport = {self._port}\nuser = "{BOT}"\n'
        return {"config": f'kind = "example"\n\n[example]\n{settings}', "login": TOKEN}

    async def stop(self) -> None:
        """End; no command of the protocol."""
        await self.cut()
        await self._server.wait_closed()
        self.platform.close()

    async def chat(self, direct: bool = False) -> Json:
        chat = f"c{next(self._chats)}"
        self.platform.joined.add(chat)
        if direct:
            self.platform.direct.add(chat)
        return {"chat": chat}

    async def say(self, chat: str, text: str, thread: str = "", mention: bool = False) -> Json:
        event = self.platform.add("message", chat, "@ada", text=text, thread=thread, mentioned=mention)
        return {"event": event["id"], "sender": "@ada"}

    async def edit(self, chat: str, event: str, text: str) -> Json:
        revision = 1 + sum(e["id"] == event and e["revision"] > 0 for e in self.platform.events)
        self.platform.add("message", chat, "@ada", text=text, id=event, revision=revision)
        return {}

    async def redact(self, chat: str, event: str) -> Json:
        self.platform.add("redaction", chat, "@ada", target=event)
        return {}

    async def react(self, chat: str, target: str, reaction: str) -> Json:
        return {"event": self.platform.add("reaction", chat, "@ada", target=target, text=reaction)["id"]}

    async def unreact(self, chat: str, event: str) -> Json:
        (found,) = [e for e in self.platform.events if e["id"] == event]
        more = {key: found[key] for key in ("target", "text", "id")}
        self.platform.add("unreaction", chat, "@ada", **more)
        return {}

    async def shown(self, chat: str, id: str) -> Json:
        (text,) = [e["text"] for e in self.platform.events if e["id"] == id and not e["revision"]]
        about = [e for e in self.platform.events if e["target"] == id]
        return {
            "text": next((e["text"] for e in reversed(about) if e["type"] == "edit"), text),
            "reactions": [e["text"] for e in about if e["type"] == "reaction"],
            "redacted": any(e["type"] == "redaction" for e in about),
        }

    async def own(self, chat: str, text: str) -> Json:
        return {"event": self.platform.add("message", chat, BOT, text=text)["id"]}

    async def invite(self) -> Json:
        chat = f"c{next(self._chats)}"
        self.platform.invitations[chat] = self.platform.add("invitation", chat, "@ada")
        return {"chat": chat, "sender": "@ada"}

    async def membership(self, chat: str) -> Json:
        if chat in self.platform.joined:
            return {"membership": "joined"}
        return {"membership": "invited" if chat in self.platform.invitations else "left"}

    async def thread(self, chat: str) -> Json:
        return {"thread": f"t-{chat}"}

    async def messages(self, chat: str) -> Json:
        found = [e for e in self.platform.events if e["chat"] == chat and e["type"] == "message"]
        return {"messages": [{key: e[key] for key in ("id", "sender", "text", "thread")} for e in found]}

    async def fail(self, how: str) -> Json:
        failures = {
            "retryable": {"error": "busy", "retry": True},
            "permanent": {"error": "no", "retry": False},
        }
        self.platform.failure = failures.get(how)
        return {}

    async def cut(self) -> Json:
        self._server.close()
        self.platform.cut()
        return {}

    async def heal(self) -> Json:
        await self.start()
        return {}

    async def garbage(self) -> Json:
        self.platform.send_raw(
            b"[" * 100_000 + b"\n" + b"x" * (3 << 20) + b'\n{"event": 3\n\xff\n{"other": 1}\n'
        )
        return {}


async def main() -> None:
    driver = Driver()
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        method = getattr(driver, command.pop("do"), None)
        answer = {"unsupported": True} if method is None else await method(**command)
        print(json.dumps(answer), flush=True)
    os._exit(0)  # whoever is connected goes with us


if __name__ == "__main__":
    asyncio.run(main())
