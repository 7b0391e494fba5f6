"""What goes to a room for a delivery: events, each under a transaction id of its own; pure.

The ids follow from the delivery's key, so that whoever sends it again makes nothing new of it: the
homeserver answers with the event that it made of the first. In an encrypted room too, where the content is
another each time.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from nanoclaw_matrix.markup import clean, html_of, split

#: Of a content, as JSON: with more its HTML is left out, so that the event stays below 65,536 bytes when
#: encrypted.
CONTENT_BYTES = 40_000
MAX_CHOICES = 10
FALLBACK_CHARACTERS = 500

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One event to send, or one to take back."""

    txn: str
    kind: str  #: its type; "": `target` is taken back
    content: Json
    target: str = ""
    file: int | None = None  #: which file of the delivery comes first, and fills the content


def transaction(key: str, part: str) -> str:
    """Return the transaction id of a part of a delivery."""
    return f"nc-{hashlib.sha256(key.encode()).hexdigest()[:40]}-{part}"


def plan(delivery: Json, *, prefix: bool, avatar: str = "", answer: bool = True) -> list[Step]:
    """Return what is to be sent for a Delivery of io.nanoclaw.Channel, in order.

    prefix: the text begins with the agent's name. answer: what is answered is shown with it, outside of
    threads.
    """
    key, kind = delivery["key"], delivery["kind"]
    target = delivery.get("target") or ""
    if kind == "redaction":
        return [Step(txn=transaction(key, "0"), kind="", content={}, target=target)]
    if kind == "reaction":
        relation = {"rel_type": "m.annotation", "event_id": target, "key": delivery["text"]}
        return [Step(txn=transaction(key, "0"), kind="m.reaction", content={"m.relates_to": relation})]
    steps = []
    speaker = _Speaker(delivery, prefix=prefix, avatar=avatar)
    relation = _relation(delivery, answer=answer)
    text = clean(delivery["text"])
    for number, part in enumerate(split(text) if text.strip() else []):
        content = speaker.say(part)
        if kind == "edit" and number == 0:
            content = {
                "msgtype": content["msgtype"],
                "body": f"* {content['body'][:FALLBACK_CHARACTERS]}",  # for clients that know no edits
                "m.mentions": {},
                "m.new_content": content,
                "m.relates_to": {"rel_type": "m.replace", "event_id": target},
            }
        elif relation:
            content["m.relates_to"] = relation
        steps.append(Step(txn=transaction(key, str(number)), kind="m.room.message", content=content))
    for number in range(len(delivery.get("files") or ())):
        content = {**speaker.profile(), **({"m.relates_to": relation} if relation else {})}
        txn = transaction(key, f"file-{number}")
        steps.append(Step(txn=txn, kind="m.room.message", content=content, file=number))
    return steps


def choice_steps(delivery: Json, event: str) -> list[Step]:
    """Return the reactions that are put under a question, one for each choice, to be clicked."""
    steps = []
    for number, choice in enumerate((delivery.get("choices") or ())[:MAX_CHOICES]):
        emoji = choice if _is_emoji(choice) else "🔟" if number == 9 else f"{number + 1}\ufe0f\u20e3"
        relation = {"rel_type": "m.annotation", "event_id": event, "key": emoji}
        txn = transaction(delivery["key"], f"choice-{number}")
        steps.append(Step(txn=txn, kind="m.reaction", content={"m.relates_to": relation}))
    return steps


def _is_emoji(choice: str) -> bool:
    return len(choice) <= 8 and not any(c.isascii() or c.isalnum() or c.isspace() for c in choice)


class _Speaker:
    """Who speaks: one account may be several agents."""

    def __init__(self, delivery: Json, *, prefix: bool, avatar: str) -> None:
        self._name = clean(delivery.get("agentName") or delivery["agent"])
        self._agent = delivery["agent"]
        self._notice = delivery["kind"] == "notice"
        self._prefix = prefix and bool(self._agent)
        self._avatar = avatar

    def profile(self) -> Json:
        """Return what clients that know profiles of messages (MSC4144) show in place of the account's."""
        if not self._agent:
            return {}
        profile: Json = {"id": self._agent, "displayname": self._name}
        if self._avatar:
            profile["avatar_url"] = self._avatar
        if self._prefix:
            profile["has_fallback"] = True
        return {"com.beeper.per_message_profile": profile}

    def say(self, text: str) -> Json:
        content: Json = {
            "msgtype": "m.notice" if self._notice else "m.text",
            **self.profile(),
            "m.mentions": {},
        }
        html = html_of(text)
        if self._prefix:
            name = _escape(self._name)
            fallback = f"<strong data-mx-profile-fallback>{name}: </strong>"
            html = _behind(fallback, html if html is not None else _paragraph(text))
            text = f"{self._name}: {text}"
        content["body"] = text
        if html is None:
            return content
        formatted = {**content, "format": "org.matrix.custom.html", "formatted_body": html}
        return formatted if len(json.dumps(formatted)) <= CONTENT_BYTES else content


def _relation(delivery: Json, *, answer: bool) -> Json:
    thread, answered = delivery["thread"], delivery.get("inReplyTo")
    if thread:
        # Clients that know no threads show it as an answer.
        return {
            "rel_type": "m.thread",
            "event_id": thread,
            "is_falling_back": True,
            "m.in_reply_to": {"event_id": answered or thread},
        }
    if answered and answer:
        return {"m.in_reply_to": {"event_id": answered}}
    return {}


def _behind(first: str, html: str) -> str:
    """Return `html` with `first` at the beginning of its first paragraph."""
    return f"<p>{first}{html[3:]}" if html.startswith("<p>") else f"<p>{first}</p>{html}"


def _paragraph(text: str) -> str:
    return "<p>" + _escape(text).replace("\n", "<br />") + "</p>"


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
