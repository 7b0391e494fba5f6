"""Messages that ended long ago are deleted with their deliveries, as are those that nobody let through,
approvals and old rows of the audit trail; sessions that nobody uses are closed, and usage is summed up: at
start, and then once a day.

The file does not shrink, but what becomes free in it is used again. Giving pages back would need
auto_vacuum, which must be there from the first table on and moves pages at each commit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from nanoclawd import journal, limits
from nanoclawd.audit import Audit
from nanoclawd.db import Database, Transaction, now_ms
from nanoclawd.errors import Failed, Unavailable
from nanoclawd.filestore import FileStore
from nanoclawd.questions import end_answered
from nanoclawd.settings import Settings
from nanoclawd.usage import Usage

DAY_S = 86_400


async def run(
    db: Database,
    audit: Audit,
    usage: Usage,
    files: FileStore,
    settings: Callable[[], Settings],
    close_sessions: Callable[[int], Awaitable[None]],
) -> None:
    """Prune once a day until cancelled, as the settings at that moment say; `close_sessions` closes those
    that were last used before some time (ms).
    """
    while True:
        try:
            if days := settings().session_days:
                await close_sessions(now_ms() - days * DAY_S * 1000)
            if days := settings().retention_days:
                await prune(db, before=now_ms() - days * DAY_S * 1000)
            if days := settings().audit_days:
                await audit.prune(before=now_ms() - days * DAY_S * 1000)
            await db.write(_drop_held)
            await files.prune()
            if days := settings().usage_days:
                await usage.prune(days)
            await audit.tell_head()
        except (Unavailable, Failed, TimeoutError) as exc:
            journal.warning("prune-failed", f"{exc}, trying again in a day")
        await asyncio.sleep(DAY_S)


async def prune(db: Database, *, before: int) -> None:
    """Delete what ended before `before` (ms) and is not needed, a little at a time. Raises Unavailable."""
    pruned = 0
    while rows := await db.read("find_old", before=before, limit=limits.PRUNED_AT_ONCE):
        ids = [row["id"] for row in rows]
        await db.write(partial(_delete, ids=ids))
        pruned += len(ids)
    approvals = partial(
        Transaction.all, query="delete_approvals", before=before, limit=limits.PRUNED_AT_ONCE
    )
    while await db.write(approvals):
        pass
    deliveries, old = 0, partial(Transaction.all, query="delete_old_deliveries", before=before)
    while rows := await db.write(partial(old, limit=limits.PRUNED_AT_ONCE)):
        deliveries += len(rows)
    if pruned or deliveries:
        await db.write(_remove_sessions)
        journal.info("pruned", messages=pruned, deliveries_alone=deliveries)


def _delete(tx: Transaction, ids: Sequence[str]) -> None:
    for id in ids:
        tx.all("delete_deliveries", message=id)
        tx.all("delete_message", id=id)


def _remove_sessions(tx: Transaction) -> None:
    """Delete the sessions that were closed, or whose agents were removed, once no message names them."""
    for row in tx.all("find_gone_agents"):
        tx.all("remove_sessions", agent=row["agent"])
    tx.all("remove_closed_sessions")


def _drop_held(tx: Transaction) -> None:
    """Give up messages that nobody has answered for about their senders or chats."""
    before = now_ms() - limits.HELD_DAYS * DAY_S * 1000
    for row in tx.all("drop_old_held", before=before):
        tx.all("count_dropped", id=row["chat"], number=1)
    end_answered(tx)
    tx.all("forget_new_chats", before=before)
