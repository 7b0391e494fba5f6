"""Who is heard in a chat of a platform, with systemd's varlinkctl in the place of an adapter."""

from __future__ import annotations

import itertools

from tests.e2e.test_operator import next_delivery, varlink
from tests.support.machine import Machine
from tests.support.product import ANNOUNCEMENT, RUNTIME, SETTLE_S, Json, Product

STRANGER = "@eve:evil.example"
OWNER = "@ada:example.org"
MATRIX = f"{RUNTIME}/channels/matrix/io.nanoclaw.Channel"


class Room:
    """A group of a platform, named after the test's agent."""

    def __init__(self, product: Product, machine: Machine, agent: str) -> None:
        self.product, self.machine, self.agent = product, machine, agent
        self.chat = f"!{agent}:example.org"
        self._events = itertools.count(1)
        product.add_channel("matrix")
        self.call("Announce", ANNOUNCEMENT)

    def say(self, text: str, sender: str, **more: object) -> Json:
        event = {"chat": self.chat, "thread": "", "event": f"e{next(self._events)}"}
        rest = {"revision": 0, "sender": sender, "text": text, **more}
        (reply,) = self.call("Deliver", {**event, **rest})
        return reply

    def call(self, method: str, parameters: Json) -> list[Json]:
        return varlink(self.machine, f"io.nanoclaw.Channel.{method}", parameters, channel=MATRIX)

    def reply(self) -> Json:
        """Return the next delivery to the room, and report it as sent."""
        delivery = next_delivery(self.machine, self.chat, channel=MATRIX)
        self.call("ReportSent", {"key": delivery["key"], "receipt": "r"})
        return delivery

    def number(self) -> str:
        chats = self.product.ask("chat", "list")["chats"]
        return next(str(chat["number"]) for chat in chats if chat["chat"] == self.chat)


def test_a_room_from_its_invitation_to_a_conversation(product: Product, machine: Machine) -> None:
    room = Room(product, machine, product.add())
    invitation = {"chat": room.chat, "sender": OWNER, "title": "Family"}

    (answer,) = room.call("Invite", invitation)
    held = room.say("hello?", OWNER, mentioned=True)
    chatter = room.say("just talk", STRANGER)

    assert (answer["state"], held["outcome"], chatter["outcome"]) == ("new", "held", "dropped")
    number = room.number()
    (asked,) = [a for a in product.ask("approval", "list")["approvals"] if a["chat"] == room.chat]
    assert (asked["kind"], asked["question"]["text"]) == ("chat", "hello?")

    code = product.ctl("pair", "matrix").stdout.strip()
    assert room.say(code, OWNER)["outcome"] == "dropped"
    assert room.reply()["text"] == "This account is owner's from now on."
    wired = product.ctl(
        "chat", "wire", number, room.agent, "--access", "ask", "--pattern", "^!deploy"
    ).stderr
    assert wired == f"'{room.agent}' listens in chat {number}.\n"

    delivery = room.reply()
    assert (delivery["text"], delivery["agent"], delivery["chat"]) == ("hello?", room.agent, room.chat)
    assert not [a for a in product.ask("approval", "list")["approvals"] if a["chat"] == room.chat]
    assert room.say("just talk", OWNER)["outcome"] == "dropped"
    assert room.say("!deploy it", OWNER)["outcome"] == "queued"
    assert room.reply()["text"] == "!deploy it"


def test_a_stranger_is_asked_about_let_in_and_shut_out(product: Product, machine: Machine) -> None:
    room = Room(product, machine, product.add())
    room.say("knock", STRANGER, kind="direct", senderName="Your owner")
    number = room.number()
    product.ctl("chat", "wire", number, room.agent, "--access", "ask")
    machine.systemctl("restart", "nanoclaw.service")

    room.say("let me in", STRANGER, kind="direct", senderName="Your owner")
    (asked,) = [a for a in product.ask("approval", "list")["approvals"] if a["chat"] == room.chat]
    shown = product.ctl("approval", "show", asked["id"]).stdout
    allowed = product.ctl("approval", "allow", asked["id"]).stderr

    assert f"Account:          {STRANGER}" in shown and "Calls itself:     Your owner" in shown
    assert allowed == f"{asked['id']} is allowed.\n"
    assert [room.reply()["text"] for _ in range(2)] == ["knock", "let me in"]
    product.ctl("member", "deny", STRANGER, number)
    assert room.say("still here", STRANGER, kind="direct")["outcome"] == "dropped"
    chat = product.ask("chat", "show", number)["chat"]
    assert (chat["held"], chat["dropped"]) == (0, 1)
    events = [row["event"] for row in product.ask("audit", "list", "--limit", "20")["rows"]]
    assert {"WireChat", "approval_allowed", "SetRoleOf"} <= {*events}

    (session,) = [s["session"] for s in product.ask("message", "list", room.agent)["messages"]][:1]
    product.ctl("session", "close", room.agent, session, "--purge")
    machine.wait_for(lambda: not product.ask("session", "list", room.agent)["sessions"], within_s=SETTLE_S)
