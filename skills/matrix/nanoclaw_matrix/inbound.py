"""What an event of a room says, out of JSON that anybody may have written; pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nanoclaw_matrix.markdown_html import markdown_of

ID_BYTES = 255  #: of an event, a room, an account; see the specification, "Size limits"
FILE_KINDS = ("m.file", "m.image", "m.audio", "m.video")
TEXT_KINDS = ("m.text", "m.notice", "m.emote")
#: The quotation with which older clients begin an answer.
QUOTATION = re.compile(r"\A(?:> ?<[^\n]*>[^\n]*\n)(?:>[^\n]*\n)*\n?")

Json = Mapping[str, Any]


class Malformed(Exception):
    """An event is not as it must be; whoever wrote it made a mistake, or wants to see what happens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attachment:
    """A file that came with a message."""

    name: str
    media_type: str
    url: str  #: mxc://
    size: int  #: as its sender says; 0: says nothing
    key: Json | None = None  #: how to decrypt it; None: it is not encrypted


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """Somebody wrote or edited a message."""

    event: str
    sender: str
    text: str  #: Markdown
    thread: str = ""
    answers: str | None = None  #: the event that it answers
    edits: str | None = None  #: the event that it replaces
    mentions: frozenset[str] | None = None  #: accounts; None: the client does not say
    notice: bool = False  #: written by a program
    attachment: Attachment | None = field(default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reacted:
    event: str
    sender: str
    target: str
    reaction: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TookBack:
    event: str
    sender: str
    target: str


def parse_event(source: Json) -> Said | Reacted | TookBack | None:
    """Return what an event says; None if it is nothing for an agent. Raises Malformed."""
    kind = source.get("type")
    if kind not in ("m.room.message", "m.reaction", "m.room.redaction", "m.sticker"):
        return None
    event, sender = _id(source, "event_id"), _id(source, "sender")
    content = source.get("content")
    if not isinstance(content, Mapping):
        raise Malformed("content: must be an object")
    if kind == "m.room.redaction":
        # In rooms of version 11 and later it is part of the content.
        return TookBack(
            event=event, sender=sender, target=_id(content if "redacts" in content else source, "redacts")
        )
    relation = content.get("m.relates_to", {})
    if not isinstance(relation, Mapping):
        raise Malformed("m.relates_to: must be an object")
    if kind == "m.reaction":
        if relation.get("rel_type") != "m.annotation":
            return None  # taken back meanwhile
        return Reacted(
            event=event,
            sender=sender,
            target=_id(relation, "event_id"),
            reaction=_text(relation, "key")[:255],
        )
    if not content:
        return None  # taken back meanwhile
    return _parse_message(event, sender, content, relation)


def _parse_message(event: str, sender: str, content: Json, relation: Json) -> Said | None:
    edits = None
    if relation.get("rel_type") == "m.replace":
        edits = _id(relation, "event_id")
        content = content.get("m.new_content", {})
        if not isinstance(content, Mapping):
            raise Malformed("m.new_content: must be an object")
    kind = content.get("msgtype", "m.image")  # a sticker has none
    if kind not in (*TEXT_KINDS, *FILE_KINDS):
        return None
    thread, answers = "", None
    answered = relation.get("m.in_reply_to")
    if isinstance(answered, Mapping):
        answers = _id(answered, "event_id")
    if relation.get("rel_type") == "m.thread":
        thread = _id(relation, "event_id")
        if relation.get("is_falling_back") is True:
            answers = None  # only for clients that know no threads
    attachment = _attachment(content) if kind in FILE_KINDS else None
    text = _body(content, answers is not None, attachment)
    if kind == "m.emote":
        text = f"*{text}*"
    return Said(
        event=event,
        sender=sender,
        text=text,
        thread=thread,
        answers=answers,
        edits=edits,
        mentions=_mentions(content),
        notice=kind == "m.notice",
        attachment=attachment,
    )


def _body(content: Json, answers: bool, attachment: Attachment | None) -> str:
    body = _text(content, "body")
    if attachment is not None and body == content.get("filename", body):
        return ""  # no caption, but the file's name
    formatted = content.get("formatted_body")
    if content.get("format") == "org.matrix.custom.html" and isinstance(formatted, str):
        return markdown_of(formatted)
    if answers:
        body = QUOTATION.sub("", body)
    return body


def _attachment(content: Json) -> Attachment:
    info, file = content.get("info"), content.get("file")
    info = info if isinstance(info, Mapping) else {}
    size, media_type = info.get("size"), info.get("mimetype")
    name = content.get("filename") or content.get("body")
    name = name if isinstance(name, str) else ""
    key = file if isinstance(file, Mapping) else None
    if key is not None:
        # Plain values, for the hash and the key are looked into by the library.
        key = json.loads(json.dumps(dict(key)))
    return Attachment(
        name=clean_name(name),
        media_type=media_type if isinstance(media_type, str) and media_type.isprintable() else "",
        url=_text(content if key is None else key, "url"),
        size=size if type(size) is int and size > 0 else 0,
        key=key,
    )


def clean_name(name: str) -> str:
    """Return a file's name without directories and invisible characters, and not empty."""
    line = "".join(c for c in name.replace("\\", "/").rsplit("/", 1)[-1] if c.isprintable()).strip(" .")
    return line.encode()[:200].decode(errors="ignore") or "file"


def _mentions(content: Json) -> frozenset[str] | None:
    mentions = content.get("m.mentions")
    if not isinstance(mentions, Mapping):
        return None
    users = mentions.get("user_ids", [])
    return (
        frozenset(user for user in users if isinstance(user, str))
        if isinstance(users, list)
        else frozenset()
    )


def names_account(text: str, account: str, display_name: str) -> bool:
    """Say whether a text names an account, for clients that do not say whom a message mentions.

    Its id, the part before the colon after an @, or what it is called, each as a word.
    """
    names = [re.escape(account), "@" + re.escape(account[1:].split(":", 1)[0])]
    if display_name.strip():
        names.append(re.escape(display_name.strip()))
    return re.search(rf"(?<!\w)(?:{'|'.join(names)})(?!\w)", text, re.IGNORECASE) is not None


def _text(source: Json, name: str) -> str:
    value = source.get(name)
    if not isinstance(value, str):
        raise Malformed(f"{name}: must be a text")
    # A lone surrogate has a place in JSON, and none in UTF-8; the router takes no NUL.
    return value.encode(errors="replace").decode().replace("\0", "\ufffd")


def _id(source: Json, name: str) -> str:
    value = source.get(name)
    if not isinstance(value, str) or not value.isprintable() or not 1 < len(value) <= ID_BYTES:
        raise Malformed(f"{name}: must be an id")
    if len(value.encode(errors="replace")) > ID_BYTES:
        raise Malformed(f"{name}: is longer than {ID_BYTES} bytes")
    return value
