"""The check: what people saw and what the database says must be what was promised, whoever died and when."""

from __future__ import annotations

import re
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from nanoclawd import limits
from tests.crash.record import Fault, Record, Shown
from tests.crash.script import Message

Found = tuple[Fault, str]
ENDS = ("answered", "stopped", "dead")

FAILURES_OF_SCRIPT = 2  #: of one message that is answered in the end

#: What our runners say: r(eply) or s(ent in mid-turn), marker of the message, number.
WORDS = re.compile(r"([rs]):([a-z]+\d+-(\d+)):(\d+)")


def check(record: Record, database: Path, *, deaths: int) -> list[Found]:
    """Return all that is wrong at the end of a conversation in which the router died `deaths` times."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        inbox = {row["event"]: row for row in rows_of(connection, "inbox", record)}
        outbox = {row["key"]: row for row in rows_of(connection, "outbox", record)}
        files = {row["id"] for row in connection.execute("SELECT id FROM file")}
        checks = [[*connection.execute(f"PRAGMA {name}_check")] for name in ("integrity", "foreign_key")]
    found = [*_check_inbox(record, inbox, deaths), *_check_outbox(record, outbox), *_check_repeats(record)]
    for chat in record.plan.chats:
        found += _check_order([shown for shown in record.shown.values() if shown.chat == chat.name])
    kept = {path.name for path in (database.parent / "files").iterdir()}
    found += [(Fault.ORPHAN, f"file {name} has no row") for name in kept - files]
    found += [(Fault.LOST, f"the row of file {name} has no file") for name in files - kept]
    problems = [tuple(row) for rows in checks for row in rows]
    if problems != [("ok",)]:
        found.append((Fault.OTHER, f"the database is damaged: {problems}"))
    return found


def answered_events(database: Path) -> set[str]:
    """Return the events of the messages that count as answered."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return {event for (event,) in connection.execute("SELECT event FROM inbox WHERE state = 'answered'")}


def rows_of(connection: sqlite3.Connection, table: str, record: Record) -> list[sqlite3.Row]:
    """Return the rows of the chats of this conversation, oldest first."""
    chats = {chat.id for chat in record.plan.chats}
    rows = connection.execute(f"SELECT * FROM {table} ORDER BY seq").fetchall()
    return [row for row in rows if row["chat"] in chats]


def _check_inbox(record: Record, inbox: dict[str, sqlite3.Row], deaths: int) -> Iterator[Found]:
    """Each message that was acknowledged is there, has ended as it must, and its end was told.

    One whose attempts were used up counts as poison if the script alone would not have used them up.
    """
    told = {shown.text for shown in record.seen_or_refused()}
    for marker, message in record.messages.items():
        row = inbox.get(marker)
        if marker not in record.acknowledged:
            yield Fault.OTHER, f"{marker} was never acknowledged"
        elif row is None or record.acknowledged[marker] not in (None, row["id"]):
            yield Fault.LOST, f"{marker} was acknowledged and is not in the inbox"
        elif row["state"] not in ENDS:
            yield Fault.LOST, f"{marker} is still {row['state']}: {row['reason']}"
        elif row["state"] == "answered" and (unsaid := {*message.replies()} - told):
            yield Fault.LOST, f"{marker} counts as answered without {unsaid}"
        elif row["state"] != "answered" and not any(
            shown.is_end and marker in shown.events for shown in record.seen_or_refused()
        ):
            yield Fault.LOST, f"{marker} is {row['state']}, and nobody was told: {row['reason']}"
        elif (
            row["state"] == "dead"
            and row["attempts"] >= limits.ATTEMPTS
            and deaths >= limits.ATTEMPTS - FAILURES_OF_SCRIPT
        ):
            continue
        elif row["state"] != (end := _end_of(message, record)):
            yield Fault.LOST, f"{marker} is {row['state']} and not {end}: {row['reason']}"
        elif message.order == "poison" and row["state"] == "dead" and row["attempts"] < limits.ATTEMPTS:
            yield Fault.LOST, f"{marker} was given up after {row['attempts']} attempts: {row['reason']}"


def _end_of(message: Message, record: Record) -> str:
    if message.marker in record.told_to_stop:
        return "stopped"
    return "dead" if message.order in ("die", "poison") else "answered"


def _check_outbox(record: Record, outbox: dict[str, sqlite3.Row]) -> Iterator[Found]:
    """What is in the outbox is what the platform has, and all that runners sent is there."""
    for key, row in outbox.items():
        if row["state"] not in ("sent", "dead"):
            yield Fault.LOST, f"{key} is still {row['state']}: {row['body']}"
        elif (row["state"] == "sent") != (key in record.shown):
            yield Fault.LOST, f"{key} counts as {row['state']}, shown: {key in record.shown}: {row['body']}"
    for key in {*record.shown, *record.refused} - {*outbox}:
        yield Fault.LOST, f"{key} was handed over and is not in the outbox"
    for text in record.sent - {row["body"] for row in outbox.values()}:
        yield Fault.LOST, f"the router took {text} from a runner and has it not"


def _check_repeats(record: Record) -> Iterator[Found]:
    """Nothing comes twice, be it under another key; a message has one end."""
    texts = Counter(shown.text for shown in record.seen_or_refused() if shown.kind != "notice")
    for text, times in texts.items():
        if times > 1:
            yield Fault.REPEATED, f"{text} was shown {times} times"
    ends: dict[str, list[str]] = defaultdict(list)
    for shown in record.seen_or_refused():
        if shown.is_end:
            for marker in shown.events:
                ends[marker].append(shown.text)
        elif shown.kind == "reply" and (words := WORDS.fullmatch(shown.text)):
            ends[words[2]].append("a reply")
    for marker, told in ends.items():
        if len({*told}) > 1 or (len(told) > 1 and told[0] != "a reply"):
            yield Fault.REPEATED, f"{marker} had several ends: {told}"


def _check_order(shown: list[Shown]) -> Iterator[Found]:
    """Replies, and what was sent on the way, come in the order of what they answer."""
    last: dict[str, tuple[int, int]] = {"r": (0, 0), "s": (0, 0)}
    for each in shown:
        if words := WORDS.fullmatch(each.text):
            kind, place = words[1], (int(words[3]), int(words[4]))
        elif each.is_end and each.text != "Stopped.":
            # Those of one turn may come as one: it is about all of them.
            kind, place = "r", (max(int(event.partition("-")[2]) for event in each.events), 0)
        else:  # what waited is stopped before what runs
            continue
        if place < last[kind]:
            yield Fault.ORDER, f"{each.text} came after {last[kind]}: {[one.text for one in shown]}"
        if kind == "s" and place[0] <= last["r"][0]:
            yield Fault.ORDER, f"{each.text} came after its reply: {[one.text for one in shown]}"
        last[kind] = max(last[kind], place)
