"""The conformance kit's driver for Matrix: people, and a way to their homeserver that can fail.

    kit_driver.py HOMESERVER_URL

What the kit asks for comes on stdin and is answered on stdout, a line each; docs/channels.md says what that
is.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import sys
from typing import Any
from urllib.parse import quote

from aiohttp import ClientSession, web

Json = dict[str, Any]
PASSWORD = "correct horse"
API = "/_matrix/client/v3"
EVENT_BYTES = 60_000  # the homeserver takes no longer one


class Account:
    """Somebody at the homeserver, by its plain API."""

    def __init__(self, session: ClientSession, url: str, name: str) -> None:
        self._session, self._url = session, url
        self._name = f"{name}{secrets.token_hex(4)}"
        self.id, self._token = "", ""
        self._numbers = itertools.count(1)

    async def register(self) -> None:
        body = {"username": self._name, "password": PASSWORD, "auth": {"type": "m.login.dummy"}}
        made = await self.call("POST", f"{API}/register", body)
        self.id, self._token = made["user_id"], made["access_token"]

    async def call(self, method: str, path: str, body: Json | None = None) -> Json:
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        async with self._session.request(method, self._url + path, json=body, headers=headers) as answer:
            result: Json = await answer.json()
            if answer.status != 200:
                raise RuntimeError(f"{method} {path}: {result}")
            return result

    async def send(self, chat: str, content: Json, kind: str = "m.room.message") -> str:
        path = f"{API}/rooms/{quote(chat)}/send/{kind}/{next(self._numbers)}"
        event: str = (await self.call("PUT", path, {"msgtype": "m.text", **content}))["event_id"]
        return event


class Way:
    """All that the adapter asks of the homeserver passes here."""

    def __init__(self, session: ClientSession, url: str) -> None:
        self._session, self._url = session, url
        self.failure = ""
        self.garbage = 0
        self._runner: web.ServerRunner | None = None
        self.port = 0

    async def open(self) -> None:
        self._runner = web.ServerRunner(web.Server(self._pass), shutdown_timeout=0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]

    async def close(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        if "/send/" in request.path and self.failure == "retryable":
            return web.json_response({"errcode": "M_UNKNOWN", "error": "busy"}, status=503)
        if "/send/" in request.path and self.failure == "permanent":
            return web.json_response({"errcode": "M_FORBIDDEN", "error": "no"}, status=403)
        if request.path.endswith("/sync") and self.garbage:
            self.garbage -= 1
            return web.Response(text="[" * 100_000 if self.garbage else '{"next_batch": 3, "rooms": []}')
        data = await request.read()
        headers = {
            name: request.headers[name]
            for name in ("Authorization", "Content-Type")
            if name in request.headers
        }
        async with self._session.request(
            request.method, self._url + request.raw_path, data=data, headers=headers
        ) as answer:
            body = await answer.read()
            return web.Response(body=body, status=answer.status, content_type=answer.content_type)


class Driver:
    """Does what the kit asks for; each method is a command of its protocol."""

    def __init__(self, session: ClientSession, url: str) -> None:
        self._way = Way(session, url)
        self._ada, self._eve, self._bot = (Account(session, url, name) for name in ("ada", "eve", "bot"))

    async def start(self) -> Json:
        for account in (self._ada, self._eve, self._bot):
            await account.register()
        await self._way.open()
        settings = f'homeserver = "http://127.0.0.1:{self._way.port}"\nuser = "{self._bot.id}"\n'
        return {"config": f'kind = "matrix"\n\n[matrix]\n{settings}', "login": PASSWORD}

    async def invite(self) -> Json:
        return {"chat": await self._make([self._bot]), "sender": self._ada.id}

    async def _make(self, accounts: list[Account]) -> str:
        body = {"preset": "private_chat", "invite": [account.id for account in accounts]}
        room: str = (await self._ada.call("POST", f"{API}/createRoom", body))["room_id"]
        return room

    async def chat(self, direct: bool = False) -> Json:
        others = [self._bot] if direct else [self._bot, self._eve]
        room = await self._make(others)
        for account in others:
            await account.call("POST", f"{API}/join/{quote(room)}", {})
        return {"chat": room}

    async def membership(self, chat: str) -> Json:
        state = await self._ada.call(
            "GET", f"{API}/rooms/{quote(chat)}/state/m.room.member/{quote(self._bot.id)}"
        )
        return {"membership": {"join": "joined", "invite": "invited"}.get(state["membership"], "left")}

    async def say(self, chat: str, text: str, thread: str = "", mention: bool = False) -> Json:
        if len(text) > EVENT_BYTES:
            return {"unsupported": True}
        content: Json = {"body": text, "m.mentions": {"user_ids": [self._bot.id]} if mention else {}}
        if thread:
            content["m.relates_to"] = {"rel_type": "m.thread", "event_id": thread}
        return {"event": await self._ada.send(chat, content), "sender": self._ada.id}

    async def edit(self, chat: str, event: str, text: str) -> Json:
        relation = {"rel_type": "m.replace", "event_id": event}
        new = {"msgtype": "m.text", "body": text}
        await self._ada.send(chat, {"body": f"* {text}", "m.new_content": new, "m.relates_to": relation})
        return {}

    async def redact(self, chat: str, event: str) -> Json:
        await self._ada.call(
            "PUT", f"{API}/rooms/{quote(chat)}/redact/{quote(event)}/r{secrets.token_hex(4)}", {}
        )
        return {}

    async def react(self, chat: str, target: str, reaction: str) -> Json:
        relation = {"rel_type": "m.annotation", "event_id": target, "key": reaction}
        return {"event": await self._ada.send(chat, {"m.relates_to": relation}, "m.reaction")}

    async def unreact(self, chat: str, event: str) -> Json:
        return await self.redact(chat, event)

    async def shown(self, chat: str, id: str) -> Json:
        room = f"rooms/{quote(chat)}"
        event = await self._ada.call("GET", f"{API}/{room}/event/{quote(id)}")
        about = await self._ada.call("GET", f"/_matrix/client/v1/{room}/relations/{quote(id)}")
        text, reactions = event["content"].get("body", ""), []
        for each in reversed(about["chunk"]):  # oldest first
            if each["type"] == "m.reaction":
                reactions.append(each["content"]["m.relates_to"]["key"])
            elif "m.new_content" in each["content"]:
                text = each["content"]["m.new_content"]["body"]
        redacted = "redacted_because" in event.get("unsigned", {})
        return {"text": text, "reactions": reactions, "redacted": redacted}

    async def own(self, chat: str, text: str) -> Json:
        return {"event": await self._bot.send(chat, {"body": text})}

    async def thread(self, chat: str) -> Json:
        return {"thread": await self._ada.send(chat, {"body": "the root"})}

    async def messages(self, chat: str) -> Json:
        path = f"{API}/rooms/{quote(chat)}/messages?dir=f&limit=500"
        found = []
        for event in (await self._ada.call("GET", path))["chunk"]:
            content = event["content"]
            if event["type"] == "m.room.message" and "body" in content:
                relation = content.get("m.relates_to", {})
                thread = relation.get("event_id", "") if relation.get("rel_type") == "m.thread" else ""
                said = {"id": event["event_id"], "sender": event["sender"], "text": content["body"]}
                found.append({**said, "thread": thread})
        return {"messages": found}

    async def fail(self, how: str) -> Json:
        self._way.failure = "" if how == "not" else how
        return {}

    async def cut(self) -> Json:
        await self._way.close()
        return {}

    async def heal(self) -> Json:
        await self._way.open()
        return {}

    async def garbage(self) -> Json:
        self._way.garbage = 2
        return {}


async def main() -> None:
    async with ClientSession() as session:
        driver = Driver(session, sys.argv[1])
        while line := await asyncio.to_thread(sys.stdin.readline):
            command = json.loads(line)
            method = getattr(driver, command.pop("do"), None)
            try:
                answer = {"unsupported": True} if method is None else await method(**command)
            except RuntimeError as exc:
                answer = {"error": str(exc)}
            print(json.dumps(answer), flush=True)
        await driver.cut()


if __name__ == "__main__":
    asyncio.run(main())
