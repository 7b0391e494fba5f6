"""What a check sees: the adapter, its platform by the driver, and the router double."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from router_double import RouterDouble

Json = dict[str, Any]
WITHIN_S = float(os.environ.get("KIT_WITHIN_S", "20"))  #: only ever reached by what fails
START_S = 20.0  #: until an adapter takes deliveries
POLL_S = 0.02
LINE_BYTES = 64 << 20


class NotApplicable(Exception):
    """The platform, or what drives it, has not got what a check is about."""


class Failed(Exception):
    """The adapter does not do what the contract says."""


class Driver:
    """The author's program that plays the people on the platform; see docs/channels.md."""

    def __init__(self, command: str, directory: Path) -> None:
        self._command, self._directory = command, directory
        self._process: asyncio.subprocess.Process

    async def start(self) -> None:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *shlex.split(self._command),
            stdin=pipe,
            stdout=pipe,
            limit=LINE_BYTES,
            env={**os.environ, "KIT_DIRECTORY": str(self._directory)},
        )

    async def __call__(self, do: str, **parameters: Any) -> Json:
        """Have it do something. Raises NotApplicable if it cannot, Failed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **parameters}).encode() + b"\n")
        async with asyncio.timeout(4 * WITHIN_S):
            line = await self._process.stdout.readline()
        if not line:
            raise Failed(f"the driver ended when it was asked to '{do}'")
        answer: Json = json.loads(line)
        if answer.get("unsupported"):
            raise NotApplicable(f"the driver cannot '{do}'")
        if "error" in answer:
            raise Failed(f"the driver: {do}: {answer['error']}")
        return answer

    async def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # its end is what it waits for
        try:
            async with asyncio.timeout(WITHIN_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


class World:
    """One adapter with all that its unit would give it."""

    def __init__(self, adapter: str, driver: str, directory: Path) -> None:
        self._command, self._directory = adapter, directory
        self.router = RouterDouble(directory / "io.nanoclaw.Channel")
        self.driver = Driver(driver, directory)
        self._adapter: asyncio.subprocess.Process | None = None
        self._without: list[str] = []  #: what the driver says that the platform has not got

    async def start(self) -> None:
        for name in ("state", "credentials"):
            (self._directory / name).mkdir()
        await self.driver.start()
        given = await self.driver("start")
        self._without = given.get("without", [])
        (self._directory / "channel.toml").write_text(given["config"])
        (self._directory / "credentials/login").write_text(given["login"])
        await self.router.start()
        await self.run_adapter()

    async def run_adapter(self) -> None:
        """Start it, and return when it takes deliveries."""
        environment = {
            "NANOCLAW_CHANNEL_SOCKET": str(self._directory / "io.nanoclaw.Channel"),
            "NANOCLAW_CHANNEL_CONFIG": str(self._directory / "channel.toml"),
            "STATE_DIRECTORY": str(self._directory / "state"),
            "CREDENTIALS_DIRECTORY": str(self._directory / "credentials"),
        }
        log = (self._directory / "adapter.log").open("ab")
        with log:
            self._adapter = await asyncio.create_subprocess_exec(
                *shlex.split(self._command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        await self.until(self.router.is_attached, "Attach", within_s=max(WITHIN_S, START_S))

    async def kill_adapter(self) -> None:
        """End it by kill -9, with all that it has started."""
        if self._adapter is not None:
            process, self._adapter = self._adapter, None
            if process.returncode is None:
                os.killpg(process.pid, 9)
            await process.wait()
            self.router.hang_up()

    async def stop(self) -> None:
        await self.kill_adapter()
        self.router.stop()
        await self.driver.stop()

    async def until(self, condition: Callable[[], object], what: str, *, within_s: float = WITHIN_S) -> None:
        """Return as soon as `condition` holds. Raises Failed with what was waited for."""
        end = time.monotonic() + within_s
        while not condition():
            if self._adapter is not None and self._adapter.returncode is not None:
                await self.kill_adapter()
                await self.run_adapter()  # as systemd would
            if time.monotonic() > end:
                raise Failed(f"not within {within_s:.0f} s: {what}")
            await asyncio.sleep(POLL_S)

    # --- what most checks do -----------------------------------------------------------------------

    def can(self, capability: str) -> None:
        """Raise NotApplicable unless the adapter has said that it, or its platform, can do this."""
        if self.router.announced is None or not self.router.announced["capabilities"][capability]:
            raise NotApplicable(f"it has no {capability}")

    def needs(self, what: str) -> None:
        """Raise NotApplicable if the driver has said that there is no such thing."""
        if what in self._without:
            raise NotApplicable(f"its platform has no {what}")

    async def chat(self, **how: Any) -> str:
        return str((await self.driver("chat", **how))["chat"])

    async def say(self, chat: str, text: str, **how: Any) -> str:
        """Have a person say something, and return when the router has been told: the event's id."""
        event = str((await self.driver("say", chat=chat, text=text, **how))["event"])
        await self.until(lambda: self.delivered(chat, event), f"Deliver of {text!r}")
        return event

    def delivered(self, chat: str, event: str) -> list[Json]:
        return [call.parameters for call in self.router.of("Deliver", chat=chat, event=event)]

    async def texts(self, chat: str) -> list[str]:
        """Return what the adapter's accounts have said in a chat, as the platform has it."""
        assert self.router.announced is not None
        messages = (await self.driver("messages", chat=chat))["messages"]
        return [m["text"].strip() for m in messages if m["sender"] in self.router.announced["accounts"]]

    async def reported(self, key: str) -> None:
        await self.until(lambda: self.router.sent[key], f"ReportSent of {key}")
