#!/usr/bin/python3
"""An adapter for a platform that exists for tests alone: what docs/channels.md explains, whole."""

import asyncio
import json
import os
import sys
import tomllib
from contextlib import closing, suppress
from pathlib import Path

NAME = "example-adapter 1"
SETTINGS = tomllib.loads(Path(os.environ["NANOCLAW_CHANNEL_CONFIG"]).read_text())["example"]
LOGIN = Path(os.environ["CREDENTIALS_DIRECTORY"]) / "login"
POSITION = Path(os.environ["STATE_DIRECTORY"]) / "position"
AGAIN_S = 0.2  # until a connection that broke is made again
HEALTH_S = 60
MESSAGE_BYTES = 1 << 20
PART_BYTES = 2000
ABOUT_OTHERS = ("edit", "reaction", "redaction")  # kinds of deliveries that have a target
CAPABILITIES = {
    "threads": True,
    "edits": True,
    "reactions": True,
    "redactions": True,
    "files": False,
    "typing": False,
    "textBytes": PART_BYTES,
    "fileBytes": 0,
    "markup": "plain",
}


class Line:
    """JSON in both directions: a message of the router ends with NUL, one of this platform with its line."""

    def __init__(self, reader, writer, end):
        self.reader, self.writer, self.end = reader, writer, end

    async def send(self, message):
        self.writer.write(json.dumps(message).encode() + self.end)
        await self.writer.drain()

    async def receive(self):
        """Return the next message; None for one that is too long, or none. Raises EOFError, OSError."""
        try:
            return json.loads((await self.reader.readuntil(self.end))[:-1])
        except (ValueError, RecursionError):
            return None
        except asyncio.LimitOverrunError as exc:
            while True:  # throw it away, piece by piece
                await self.reader.readexactly(exc.consumed)
                try:
                    await self.reader.readuntil(self.end)
                    return None
                except asyncio.LimitOverrunError as more:
                    exc = more

    async def ask(self, message):
        """Return the answer. Raises EOFError, OSError."""
        await self.send(message)
        if (answer := await self.receive()) is None:
            raise EOFError
        return answer

    def close(self):
        self.writer.close()


class RouterError(Exception):
    def __init__(self, reply):
        self.name = reply["error"].rpartition(".")[2]
        super().__init__(reply.get("parameters", {}).get("message", self.name))


async def call(router, method, **parameters):
    reply = await router.ask({"method": f"io.nanoclaw.Channel.{method}", "parameters": parameters})
    if "error" in reply:
        raise RouterError(reply)
    return reply["parameters"]


async def connect_router():
    socket = os.environ["NANOCLAW_CHANNEL_SOCKET"]
    router = Line(*await asyncio.open_unix_connection(socket, limit=2 * MESSAGE_BYTES), b"\0")
    await call(
        router,
        "Announce",
        protocol=1,
        adapter=NAME,
        capabilities=CAPABILITIES,
        accounts=[SETTINGS["user"]],
    )
    return router


async def connect_platform(health):
    token = LOGIN.read_text() if LOGIN.exists() else ""
    streams = await asyncio.open_connection(SETTINGS["host"], SETTINGS["port"], limit=MESSAGE_BYTES)
    platform = Line(*streams, b"\n")
    if "error" in await platform.ask({"login": token}):
        health.say("login", "the platform refuses the token")
        platform.close()
        raise ConnectionError
    return platform


class Health:
    """Tells the router how it is, when that changes and once a minute."""

    def __init__(self):
        self.state, self.text, self.changed = "connecting", "", asyncio.Event()

    def say(self, state, text=""):
        if (state, text) != (self.state, self.text):
            self.state, self.text = state, text
            self.changed.set()

    async def report(self):
        with closing(await connect_router()) as router:
            while True:
                self.changed.clear()
                await call(router, "ReportHealth", state=self.state, text=self.text)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.changed.wait(), HEALTH_S)


# --- from the platform to the router ----------------------------------------------------------------


async def hear(health):
    """Hand over event by event, and move the position behind each one that the router has."""
    with closing(await connect_platform(health)) as platform, closing(await connect_router()) as router:
        position = int(POSITION.read_text()) if POSITION.exists() else 0
        for invitation in (await platform.ask({"invitations": True}))["invitations"]:
            await answer_invitation(router, platform, invitation)
        with closing(await connect_platform(health)) as events:
            await events.send({"sync": position})
            health.say("connected")
            while True:
                message = await events.receive()
                if message is None or "event" not in message:
                    continue  # nothing that the router could be told
                await hand_over(router, platform, message["event"])
                write_position(message["event"]["number"])


def write_position(number):
    new = POSITION.with_suffix(".new")
    with open(new, "w") as file:
        file.write(str(number))
        file.flush()
        os.fsync(file.fileno())
    new.rename(POSITION)


async def hand_over(router, platform, event):
    """Return once the router has an event, or has said that it never will."""
    if event["sender"] == SETTINGS["user"]:
        return
    place = {"chat": event["chat"], "thread": event["thread"]}
    while True:
        try:
            if event["type"] == "invitation":
                await answer_invitation(router, platform, event)
            elif event["type"] == "redaction":
                await call(router, "Retract", event=event["target"], **place)
            elif event["type"] in ("reaction", "unreaction"):
                await call(
                    router,
                    "React",
                    event=event["id"],
                    target=event["target"],
                    sender=event["sender"],
                    senderName=event["name"],
                    reaction=event["text"],
                    removed=event["type"] == "unreaction",
                    **place,
                )
            elif event["type"] == "message":
                await call(
                    router,
                    "Deliver",
                    event=event["id"],
                    revision=event["revision"],  # 0; an edit has the number of the edit
                    sender=event["sender"],
                    senderName=event["name"],
                    text=event["text"],
                    mentioned=event["mentioned"],
                    kind="direct" if event["direct"] else "group",
                    **place,
                )
            return
        except RouterError as error:
            if error.name == "Unavailable":  # it is the router's business, and passes
                await asyncio.sleep(AGAIN_S)
                continue
            text = f"This message was not taken: {error}"
            transaction = f"refused-{event['id']}-{event['revision']}"
            await platform.ask({"send": {**place, "text": text, "transaction": transaction}})
            return


async def answer_invitation(router, platform, event):
    """Join, decline, or leave it open until the owner has said; see speak()."""
    parameters = {"chat": event["chat"], "sender": event["sender"], "senderName": event["name"]}
    await follow(platform, event["chat"], (await call(router, "Invite", **parameters))["state"])


async def follow(platform, chat, state):
    if state in ("open", "blocked"):
        await platform.ask({"join" if state == "open" else "leave": chat})


# --- from the router to the platform ----------------------------------------------------------------


async def speak(health):
    """Send what the router hands over, one after the other, and report it."""
    with (
        closing(await connect_platform(health)) as platform,
        closing(await connect_router()) as router,
        closing(await connect_router()) as stream,
    ):
        await stream.send({"method": "io.nanoclaw.Channel.Attach", "parameters": {}, "more": True})
        while True:
            reply = await stream.receive()
            if "error" in reply:
                raise RouterError(reply)
            item = reply["parameters"]
            if item.get("chat"):
                await follow(platform, item["chat"]["chat"], item["chat"]["state"])
            if item.get("delivery"):
                await send(router, platform, item["delivery"])


async def send(router, platform, delivery):
    key, receipt = delivery["key"], ""
    kind = delivery["kind"] if delivery["kind"] in ABOUT_OTHERS else "message"
    parts = split(delivery["text"]) if kind == "message" else [delivery["text"]]
    place = {"chat": delivery["chat"], "thread": delivery["thread"]}
    for number, text in enumerate(parts, 1):
        if number <= delivery["partsSent"]:
            continue
        # The platform knows by the transaction what it has already, so that nothing is shown twice.
        message = {"type": kind, "target": delivery["target"], "text": text, **place}
        answer = await platform.ask({"send": {**message, "transaction": f"{key}.{number}"}})
        if "error" in answer:
            retryable = answer["retry"]
            await call(router, "ReportFailed", key=key, reason=answer["error"], retryable=retryable)
            return
        receipt = answer["id"]
        if number < len(parts):
            await call(router, "ReportPart", key=key, parts=number, receipt=receipt)
    await call(router, "ReportSent", key=key, receipt=receipt)


def split(text):
    """Return the parts of a text, the same ones each time: at ends of lines, where there are any."""
    parts = []
    while len(text.encode()) > PART_BYTES:
        head = text.encode()[:PART_BYTES].decode(errors="ignore")
        end = head.rfind("\n") + 1 or len(head)
        parts.append(text[:end])
        text = text[end:]
    return [*parts, text]


# --- all of it --------------------------------------------------------------------------------------


async def keep(task, health):
    """Do a task again whenever a connection breaks: what was not answered comes again, or is said again."""
    while True:
        with suppress(OSError, EOFError, RouterError):
            await task()
        if health.state == "connected":
            health.say("connecting", "a connection broke")
        await asyncio.sleep(AGAIN_S)


async def main():
    health = Health()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(keep(lambda: hear(health), health))
        tasks.create_task(keep(lambda: speak(health), health))
        tasks.create_task(keep(health.report, health))


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
