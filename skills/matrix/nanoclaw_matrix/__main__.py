"""nanoclaw-matrix: one account of Matrix as a channel of NanoClaw.

Talks to:   its homeserver, over TLS (untrusted); the router, over the channel's socket.
May touch:  its state directory; its credential (read-only). No database, no agent, no other channel.
Trusts:     nothing that comes from the homeserver; see homeserver.py for lengths, inbound.py for events.
On trouble: reports it with ReportHealth(), and tries again; exits on a bug, and systemd restarts it. What
was not
            answered or reported comes again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from nanoclaw_matrix.confirm import confirm
from nanoclaw_matrix.crosssigning import CrossSigning
from nanoclaw_matrix.health import Health, State
from nanoclaw_matrix.homeserver import Away, LoggedOut, Refused
from nanoclaw_matrix.login import LoginRefused, known_account, log_in
from nanoclaw_matrix.reader import Reader
from nanoclaw_matrix.rooms import Rooms
from nanoclaw_matrix.router import Line, Router, pauses
from nanoclaw_matrix.settings import Settings, SettingsError, read_settings
from nanoclaw_matrix.store import Store
from nanoclaw_matrix.varlink import CallError
from nanoclaw_matrix.verification import Verifications
from nanoclaw_matrix.writer import Writer

REPORT_S = 30  #: health is told so often, and at once when it changes
REFUSED_S = 600  #: a password that was refused is not tried again before; a new one restarts the adapter

log = logging.getLogger("matrix")


async def run(socket_path: str, directory: Path) -> None:
    """Serve the account until cancelled."""
    health, router, store = Health(), Router(socket_path), Store(directory)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_serve_for_ever(router, directory, store, health), name="service")
            tasks.create_task(_report(router, health), name="health")
    finally:
        store.close()


async def _serve_for_ever(router: Router, directory: Path, store: Store, health: Health) -> None:
    retries = pauses()
    while True:
        try:
            settings = read_settings()
            router.introduce(known_account(settings, store), settings.max_file_bytes)
            await _serve(settings, router, directory, store, health)
        except SettingsError as exc:
            health.set(State.FAILED, str(exc))
            await asyncio.sleep(REFUSED_S)
        except LoginRefused as exc:
            health.set(State.LOGIN, str(exc))
            await asyncio.sleep(REFUSED_S)
        except (Away, Refused) as exc:
            health.set(State.CONNECTING, str(exc))
            await asyncio.sleep(max(next(retries), getattr(exc, "retry_after_s", 0.0)))
        else:
            retries = pauses()
            log.warning("the homeserver has logged this device out, logging in again")


async def _serve(settings: Settings, router: Router, directory: Path, store: Store, health: Health) -> None:
    """Log in and serve; returns when the token is not taken any more."""
    client = await log_in(settings, store, directory)
    router.introduce(client.user_id, settings.max_file_bytes)
    inbound, outbound = Line(router), Line(router)
    try:
        signing = CrossSigning(client, store, settings)
        await signing.ensure()
        rooms = Rooms(client, store, inbound)
        verifications = Verifications(client, signing, settings, health, directory)
        reader = Reader(client, store, inbound, rooms, verifications, health, settings, directory)
        writer = Writer(client, store, router, outbound, rooms, settings)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(reader.run(), name="reader")
            tasks.create_task(verifications.run(), name="verifications")
            await reader.caught_up.wait()
            tasks.create_task(writer.run(), name="writer")
    except* LoggedOut:
        pass
    finally:
        inbound.close()
        outbound.close()
        await client.close()
        if client.store is not None:
            client.store.database.close()


async def _report(router: Router, health: Health) -> None:
    """Tell the router how it is, for ever."""
    line, told = Line(router), ""
    try:
        while True:
            health.changed.clear()
            state, text = health.show()
            if f"{state} {text}" != told:
                told = f"{state} {text}"
                log.info("%s", told)
            try:
                await line.call("ReportHealth", {"state": state, "text": text[:500]})
            except CallError as exc:
                log.warning("cannot report: %s", exc)
            with suppress(TimeoutError):
                async with asyncio.timeout(REPORT_S):
                    await health.changed.wait()
    finally:
        line.close()


async def _until_told(socket_path: str, directory: Path) -> None:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        await run(socket_path, directory)
    except asyncio.CancelledError:
        log.info("told to end")


def main() -> int:
    if len(sys.argv) > 1:
        return confirm(sys.argv[1:])
    os.umask(0o077)
    # The journal has the time, and takes the level from the prefix; see man 3 sd-daemon.
    logging.addLevelName(logging.INFO, "<6>")
    logging.addLevelName(logging.WARNING, "<5>")
    logging.addLevelName(logging.ERROR, "<3>")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s%(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("nio").setLevel(logging.ERROR)
    socket_path, directory = os.environ.get("NANOCLAW_CHANNEL_SOCKET"), os.environ.get("STATE_DIRECTORY")
    if not socket_path or not directory:
        print("error: this is started by nanoclaw-channel@NAME.service", file=sys.stderr)
        return 2
    asyncio.run(_until_told(socket_path, Path(directory)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
