"""The audit trail: an append-only table, each row of which has the hash of the row before it.

A row's hash is the SHA-256 of a JSON array, in ASCII and without blanks: [seq, at, kind, event, agent,
detail, before], where `detail` is the text of the column and `before` the hash of the row before, 64 zeros
in the first. Whoever changes, inserts or takes out a row would have to write all later ones anew, and then
the newest hash is not the one that the journal has.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import takewhile
from typing import Any

from nanoclawd import journal, limits
from nanoclawd.db import Database, Row, Transaction, now_ms
from nanoclawd.wire import Json

NOTHING = "0" * 64  #: what the first row has in place of a hash before
_HASHED = ("seq", "at", "kind", "event", "agent", "detail", "before")


class Kind(StrEnum):
    REQUEST = "request"  #: an agent asked the gateway for something
    CONTROL = "control"  #: a person had something done
    TRAIL = "trail"  #: about the trail: what was lost, and what retention took out


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a look at the whole chain found."""

    rows: int  #: that are in order, up to the first that is not
    head: str  #: hash of the last of them
    broken: int | None = None  #: number of the first row that is not in order
    problem: str = ""  #: what is wrong with it


def _encode(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def hash_of(row: Mapping[str, Any] | Row) -> str:
    """Return the hash that the row should have."""
    return hashlib.sha256(_encode([row[column] for column in _HASHED]).encode()).hexdigest()


def append(
    tx: Transaction, kind: Kind, event: str, detail: Json, *, agent: str = "", at: int | None = None
) -> None:
    """Add a row about what happened at `at` (ms), by default now."""
    text = _encode(detail)
    if len(text) > limits.AUDIT_CHARACTERS:
        text = _encode({"sha256": hashlib.sha256(text.encode()).hexdigest(), "characters": len(text)})
    (newest,) = tx.all("newest_audit")
    row = {
        "seq": (newest["seq"] or 0) + 1,
        "at": now_ms() if at is None else at,
        "kind": kind,
        "event": event,
        "agent": agent[: limits.NAME_BYTES],
        "detail": text,
        "before": newest["hash"] or NOTHING,
    }
    tx.all("add_audit", **row, hash=hash_of(row))


class Audit:
    """The trail in the router's database."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._whole = asyncio.Lock()  #: nothing is taken out while somebody looks at all of it

    async def note(self, event: str, detail: Json, *, agent: str = "") -> None:
        """Add a row about what a person does; on return it is on disk. Raises Unavailable."""
        await self._db.write(partial(append, kind=Kind.CONTROL, event=event, detail=detail, agent=agent))

    async def take_over(self, life: str, records: Sequence[Json]) -> None:
        """Add what the gateway decided since its start `life`, each once however often it comes.

        Numbers that are missing are of what it had no room for. Raises Unavailable.
        """
        await self._db.write(partial(_take_over, life=life, records=records))

    async def verify(self) -> Verdict:
        """Look at all rows. Raises Unavailable."""
        async with self._whole:
            return await self._verify()

    async def _verify(self) -> Verdict:
        rows, last, head = 0, 0, NOTHING

        def broken(number: int, problem: str) -> Verdict:
            return Verdict(rows=rows, head=head, broken=number, problem=problem)

        while found := await self._db.read(
            "list_audit", first=last + 1, since=-1, agent=None, kind=None, limit=limits.AUDIT_AT_ONCE
        ):
            for row in found:
                if not last and row["seq"] > 1:
                    last, head = await self._anchor()
                if row["seq"] != last + 1:
                    return broken(last + 1, f"it is missing; row {row['seq']} comes next")
                if hash_of(row) != row["hash"]:
                    return broken(row["seq"], "it was changed after it was written")
                if row["before"] != head:
                    return broken(max(last, 1), f"it is not the row that row {row['seq']} was written after")
                rows, last, head = rows + 1, row["seq"], row["hash"]
        ((newest, _),) = await self._db.read("newest_audit")
        if (newest or 0) > last:
            return broken(last + 1, f"it is missing; the last one was row {newest}")
        return Verdict(rows=rows, head=head)

    async def _anchor(self) -> tuple[int, str]:
        """Return number and hash of the last row that retention took out."""
        for row in await self._db.read("audit_anchor"):
            try:
                detail = json.loads(row["detail"])
                return int(detail["through"]), str(detail["hash"])
            except (ValueError, TypeError, KeyError):
                break  # somebody wrote it anew
        return 0, NOTHING

    async def prune(self, *, before: int) -> None:
        """Take out what is older than `before` (ms), a little at a time. Raises Unavailable."""
        async with self._whole:
            while await self._db.write(partial(_prune, before=before)):
                pass

    async def tell_head(self) -> None:
        """Write the newest hash to the journal, where who can write the database cannot change it."""
        ((number, head),) = await self._db.read("newest_audit")
        journal.info("audit-head", row=number or 0, hash=head or NOTHING)


def _take_over(tx: Transaction, life: str, records: Sequence[Json]) -> None:
    (read,) = tx.all("gateway_read")
    number = read["gateway_read"]
    if life != read["gateway_life"]:
        append(tx, Kind.TRAIL, "gateway_started", {"life": life})
        number = 0
    for record in records:
        if record["number"] <= number:
            continue
        if lost := record["number"] - number - 1:
            append(tx, Kind.TRAIL, "lost", {"records": lost})
        number = record["number"]
        detail = {key: value for key, value in record.items() if value not in ("", 0)}
        for key in ("number", "at", "event", "agent"):
            detail.pop(key, None)
        # One from the future would keep retention from all later ones.
        at = round(max(0, min(record["at"] * 1000, now_ms())))
        append(tx, Kind.REQUEST, record["event"], detail, agent=record["agent"], at=at)
    tx.all("set_gateway_read", life=life, number=number)


def _prune(tx: Transaction, before: int) -> bool:
    """Take out some of the oldest rows; return whether there may be more."""
    oldest = tx.all("oldest_audit", limit=limits.AUDIT_AT_ONCE)
    old = list(takewhile(lambda row: row["at"] < before, oldest))
    if not old:
        return False
    through = {"through": old[-1]["seq"], "hash": old[-1]["hash"]}
    append(tx, Kind.TRAIL, "pruned", {**through, "rows": len(old)})
    tx.all("prune_audit", through=old[-1]["seq"])
    return len(old) == len(oldest)
