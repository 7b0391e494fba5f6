"""What tests/crash/power_cut.py records: database and registry at work, through upgrade and restart.

    python -m tests.crash.power_cut_script ACKS

All but systemd and the check of units is real. What a caller was told is done is noted in the file ACKS at
that moment, as a line of JSON; nothing else is under way then, but for messages that are stored together.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

from nanoclawd import leases, messages, outbox, paths, quadlet_check, queue
from nanoclawd.db import Database, Transaction
from nanoclawd.dbfile import upgrade
from nanoclawd.errors import NanoclawError
from nanoclawd.ids import AgentName
from nanoclawd.messages import Event
from nanoclawd.registry import Registry
from nanoclawd.settings import parse_settings
from nanoclawd.states import DeliveryState, MessageState
from nanoclawd.systemd import Systemd

OLD_MESSAGES = 3
CHECKPOINT_PAGES = 24  #: so that the log is begun anew every few commits


class Host:
    """Stands in for systemd."""

    async def reload(self) -> None:
        pass


async def check_units(texts: dict[AgentName, str]) -> dict[AgentName, NanoclawError]:
    return {}


@asynccontextmanager
async def started() -> AsyncIterator[tuple[Database, Registry]]:
    """Start database and registry as the router does."""
    db = await Database.open(paths.state() / "nanoclaw.db")
    running = asyncio.create_task(db.run())
    try:
        registry = Registry(db=db, systemd=cast(Systemd, Host()), settings=parse_settings(""))
        with mock.patch.object(quadlet_check, "check_units", check_units):
            await registry.load()
            yield db, registry
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await db.close()


class Script:
    def __init__(self, acks: Path) -> None:
        self._acks = os.open(acks, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._events = 0

    def ack(self, **fact: Any) -> None:
        os.write(self._acks, json.dumps(fact).encode() + b"\n")

    def old_life(self) -> None:
        """Leave the database of an older program, with messages that wait."""
        with closing(sqlite3.connect(paths.state() / "nanoclaw.db", isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = WAL").fetchall()
            upgrade(connection, 0, 1)
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("INSERT INTO agent VALUES ('berta', 0, 0, 1)")
            connection.execute("INSERT INTO session VALUES (1, 'berta', 'c_1', 'c', 'chat0', '', 1)")
            for number in range(OLD_MESSAGES):
                connection.execute(
                    "INSERT INTO inbox (id, session, channel, chat, thread, event, revision, sender, body,"
                    " received_at) VALUES (?, 1, 'c', 'chat0', '', ?, 0, 's', 'old', 1)",
                    (f"old{number}", f"old{number}"),
                )
                self.ack(stored=f"old{number}")

    async def life(self, *, first: bool) -> None:
        async with started() as (db, registry):
            db._writer.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
            self.ack(started=True)
            if first:
                await registry.add("berta", {"provider": "echo"}, "Be kind.\n")
                self.ack(agent="berta", memory="1G")
                await registry.add("emil", {"provider": "echo", "memory_max": "2G"}, None)
                self.ack(agent="emil", memory="2G")
            for round_ in range(6 if first else 2):
                await asyncio.gather(*(self._store(db, f"chat{chat}", round_) for chat in range(3)))
                await self._answer(db)
            if not first:
                return
            await registry.change("berta", {"memory_max": "3G"}, "Be brief.\n")
            self.ack(agent="berta", memory="3G")
            await registry.hold("berta", True)
            self.ack(held="berta")
            backup = paths.state() / "backup"
            await db.backup(backup)
            self.ack(backup=str(backup), messages=OLD_MESSAGES + self._events)
            await registry.remove("emil")
            self.ack(removed="emil")

    async def _store(self, db: Database, chat: str, round_: int) -> None:
        self._events += 1
        event = Event(
            channel="c",
            chat=chat,
            thread="",
            event=f"e{self._events}",
            revision=0,
            sender="s",
            text="text " * (round_ * round_ * 400),
        )
        message, _ = await db.write(lambda tx: queue.enqueue(tx, AgentName("berta"), event))
        self.ack(stored=message)

    async def _answer(self, db: Database) -> None:
        for row in [messages.session_row(row) for row in await db.read("list_sessions", agent=None)]:
            turn = await db.write(lambda tx, row=row: leases.claim_turn(tx, row, attempts=4))  # type: ignore[misc]
            if turn is None:
                continue
            key, said = turn.full_key("key"), messages.Saying(text="wait")
            await db.write(partial(leases.send, session=row, turn=turn, key=key, saying=said))
            self.ack(sent=key)

            def finish(tx: Transaction, row: Any = row, turn: Any = turn) -> None:
                leases.finish_turn(tx, row, turn, MessageState.ANSWERED, ["reply " * 100])

            await db.write(finish)
            self.ack(answered=[message.id for message in turn.messages])
        deliveries = await db.write(lambda tx: outbox.claim_due(tx, "c", limit=64))
        for delivery in deliveries:
            await db.write(
                lambda tx, key=delivery.key: outbox.end(tx, "c", key, state=DeliveryState.SENT, receipt="r")  # type: ignore[misc]
            )
            self.ack(delivered=delivery.key)


def main() -> None:
    script = Script(Path(sys.argv[1]))
    script.old_life()
    asyncio.run(script.life(first=True))
    asyncio.run(script.life(first=False))


if __name__ == "__main__":
    main()
