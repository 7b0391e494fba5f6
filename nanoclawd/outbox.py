"""Deliveries: what may happen to them, each as one operation on the database, run by Database.write()."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from nanoclawd import journal, limits, paths
from nanoclawd.db import Row, Transaction, now_ms
from nanoclawd.errors import NotFound
from nanoclawd.ids import TERMINAL
from nanoclawd.messages import DeliveryKind, Place, is_event, place_of
from nanoclawd.states import DeliveryState
from nanoclawd.wire import Json

_EXCERPT = 60  #: characters of what an edit or a reaction is about, where it has to be said
#: Kinds with a target, and the capability that each needs.
_NEEDS = {
    DeliveryKind.EDIT: "edits",
    DeliveryKind.REACTION: "reactions",
    DeliveryKind.REDACTION: "redactions",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """Something for a chat, leased for an adapter."""

    key: str
    channel: str
    chat: str
    events: frozenset[str]  #: all that it answers
    shown: Json  #: the type Delivery of io.nanoclaw.Channel


def claim_next(tx: Transaction, channel: str, chat: str, thread: str) -> list[Delivery]:
    """Lease the oldest delivery of a chat for its adapter, if it is due and none is leased."""
    row = tx.one("next_delivery", channel=channel, chat=chat, thread=thread, now=now_ms())
    return [] if row is None else [_claim(tx, row)]


def claim_due(
    tx: Transaction, channel: str, *, chat: str | None = None, event: str | None = None, limit: int
) -> list[Delivery]:
    """The same for each chat of an adapter's, oldest first; with `event`, all that answers it and is due."""
    place = {"channel": channel, "chat": chat, "now": now_ms(), "limit": limit}
    if event is None:
        rows = tx.all("due_deliveries", **place)
    else:
        rows = tx.all("deliveries_of_event", event=event, **place)
    return [_claim(tx, row) for row in rows]


def _claim(tx: Transaction, row: Row) -> Delivery:
    tx.all("claim_delivery", seq=row["seq"])
    tell(tx, journal.info, "delivery-leased", row)
    events = {row["in_reply_to"]} - {None}
    if row["turn"] is not None:
        events |= {
            message["event"]
            for message in tx.all("messages_of_turn", turn=row["turn"])
            if is_event(message) and place_of(message) == place_of(row)
        }
        events |= {answer["event"] for answer in tx.all("answers_in_turn", turn=row["turn"])}
    shown = {
        **{name: row[name] for name in ("key", "chat", "thread", "agent")},
        "agentName": row["agent"],
        "inReplyTo": row["in_reply_to"],
        "events": sorted(events),
        "partsSent": row["parts_sent"],
        "choices": json.loads(row["choices"] or "[]"),
        **_as_shown(tx, row),
    }
    return Delivery(
        key=row["key"], channel=row["channel"], chat=row["chat"], events=frozenset(events), shown=shown
    )


def _as_shown(tx: Transaction, row: Row) -> Json:
    """Return kind, text, target and files; what the channel's adapter cannot do becomes what it can."""
    can: Json = {}
    if (said := tx.one("capabilities", channel=row["channel"])) is not None:
        can = json.loads(said["capabilities"])
    kind, text = row["kind"], row["body"]
    files = tx.all("files_of_delivery", key=row["key"])
    most = (can.get("fileBytes") or limits.FILE_BYTES) if can.get("files") else -1
    if any(file["bytes"] > most for file in files):  # there is one: each that an agent sends goes alone
        left_out, files = files, []
        text = "\n".join([*filter(None, (text,)), *(f"[file: {_describe(file, row)}]" for file in left_out)])
    target = row["target_event"]
    if row["target_key"] is not None:
        receipt = tx.one("first_receipt", key=row["target_key"])
        target = None if receipt is None else receipt["receipt"]
    if kind in _NEEDS and (target is None or not can.get(_NEEDS[kind])):
        about = _excerpt(tx, row)
        text = {
            DeliveryKind.EDIT: f"(edited) {text}",
            DeliveryKind.REACTION: f"{text} to: {about}",
            DeliveryKind.REDACTION: f"(taken back) {about}",
        }[DeliveryKind(kind)]
        kind, target = DeliveryKind.MESSAGE, None
    shown = [
        {"name": file["name"], "mediaType": file["media_type"], "bytes": file["bytes"]} for file in files
    ]
    return {"kind": kind, "text": text, "target": target, "files": shown}


def _excerpt(tx: Transaction, row: Row) -> str:
    """Return the beginning of what a delivery is about."""
    if row["target_key"] is not None:
        found = tx.one("find_delivery", channel=row["channel"], key=row["target_key"])
    else:
        place = {name: row[name] for name in ("channel", "chat", "thread")}
        found = tx.one("find_said", event=row["target_event"], **place)
    line = " ".join(found["body"].split()) if found is not None else ""
    return f"'{line}'" if len(line) <= _EXCERPT else f"'{line[: _EXCERPT - 1]}…'"


def _describe(file: Row, row: Row) -> str:
    """Return e.g. "report.pdf, 12 kB"; and where it is, to somebody on this host."""
    size = f"{file['bytes']} bytes" if file["bytes"] < 1000 else f"{file['bytes'] // 1000} kB"
    where = f": {paths.files() / file['id']}" if row["channel"] == TERMINAL else ""
    return f"{file['name']}, {size}{where}"


def end(
    tx: Transaction,
    channel: str,
    key: str,
    *,
    state: DeliveryState,
    receipt: str | None = None,
    reason: str | None = None,
) -> Row | None:
    """Note that a delivery was sent, or is dead; None if that was known. Raises NotFound."""
    row = tx.one(
        "end_delivery", channel=channel, key=key, state=state, now=now_ms(), receipt=receipt, reason=reason
    )
    if row is None:
        find(tx, channel, key)
    else:
        if receipt:
            tx.all("add_receipt", key=key, part=None, channel=channel, receipt=receipt)
        level = journal.info if state is DeliveryState.SENT else journal.error
        tell(tx, level, f"delivery-{state}", row, reason or "")
    return row


def find(tx: Transaction, channel: str, key: str) -> Row:
    """Return one delivery. Raises NotFound."""
    row = tx.one("find_delivery", channel=channel, key=key)
    if row is None:
        raise NotFound(f"no delivery {key[:80]!r} on channel '{channel}'")
    return row


def tell(tx: Transaction, level: Callable[..., None], event: str, row: Row, text: str = "") -> None:
    """Tell the journal of a delivery, with the ids of all messages that it answers."""
    messages = {row["message"]} if row["message"] is not None else set()
    if row["turn"] is not None:
        messages |= {message["id"] for message in tx.all("messages_of_turn", turn=row["turn"])}
    names = ("key", "turn", "agent", "channel", "attempts")
    size = len(row["body"].encode())
    tx.tell(
        level, event, text, message=sorted(messages), **{name: row[name] for name in names}, size_bytes=size
    )


def notify(tx: Transaction, key: str, place: Place, text: str, *, in_reply_to: str | None = None) -> None:
    """Have the router say something in a chat; once, by `key`."""
    channel, chat, thread = place
    tx.all(
        "publish",
        key=key,
        message=None,
        turn=None,
        agent="",
        channel=channel,
        chat=chat,
        thread=thread,
        kind=DeliveryKind.NOTICE,
        body=text,
        in_reply_to=in_reply_to,
        now=now_ms(),
    )
    tx.places.append(place)
