"""The part of io.nanoclaw.Control that is about people and chats."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from nanoclawd import journal, limits, people, questions
from nanoclawd.access import Access, Role, Standing
from nanoclawd.channel_service import ChannelService
from nanoclawd.db import Database, Row, Transaction
from nanoclawd.engagement import Engagement, SessionMode
from nanoclawd.errors import NotFound, Refused
from nanoclawd.ids import TERMINAL
from nanoclawd.outlets import Outlets
from nanoclawd.pairing import Pairings
from nanoclawd.patterns import check_pattern
from nanoclawd.people import Answerer
from nanoclawd.questions import About
from nanoclawd.registry import Registry
from nanoclawd.routing import block_chat, remove_wirings
from nanoclawd.server import Call, Method
from nanoclawd.states import ChatState
from nanoclawd.wire import Json

T = TypeVar("T")
#: Parameters of WireChat() by their columns, with the defaults.
_WIRING: dict[str, tuple[str, Any]] = {
    "engagement": ("engagement", Engagement.MENTION),
    "pattern": ("pattern", ""),
    "stickySeconds": ("sticky_seconds", 600),
    "priority": ("priority", 0),
    "exclusive": ("exclusive", False),
    "sessionMode": ("session_mode", SessionMode.THREAD),
    "access": ("access", Access.STRICT),
    "keepContext": ("keep_context", 0),
}
_PRIORITY_MAX = 1000


@dataclass(kw_only=True, eq=False)
class PeopleControl:
    db: Database
    registry: Registry
    outlets: Outlets
    pairings: Pairings
    channels: ChannelService

    def __post_init__(self) -> None:
        self.methods = {
            "ListChats": Method(handler=self._list_chats),
            "ShowChat": Method(handler=self._show_chat),
            "WireChat": Method(handler=self._wire),
            "UnwireChat": Method(handler=self._unwire),
            "BlockChat": Method(handler=self._block),
            "ListPeople": Method(handler=self._list_people),
            "LinkPerson": Method(handler=self._link),
            "SetRole": Method(handler=self._set_role),
            "SetRoleOf": Method(handler=self._set_role_of),
            "Pair": Method(handler=self._pair),
        }

    # --- chats -------------------------------------------------------------------------------------

    async def _list_chats(self, call: Call) -> Json:
        async def chats() -> AsyncIterator[Json]:
            for row in await self.db.read("list_chats", id=None):
                yield {"chat": await self._describe(row)}

        return await call.send_all(chats(), {"chat": None})

    async def _show_chat(self, call: Call) -> Json:
        number = call.parameters["number"]
        row = await self._find(number)
        names = {member["name"] for member in await self.db.read("list_members", person=None, chat=number)}
        held = await self.db.read("list_held", chat=number)
        return {
            "chat": await self._describe(row),
            "people": [person async for person in self._people() if person["name"] in names],
            "held": [
                {
                    "sender": message["sender"],
                    "senderName": message["sender_name"],
                    "text": message["body"][: limits.EXCERPT_CHARACTERS],
                    "receivedAt": message["received_at"] / 1000,
                }
                for message in held
            ],
        }

    async def _wire(self, call: Call) -> Json:
        number, parameters = call.parameters["number"], call.parameters
        agent = self.registry.get(parameters["agent"]).name
        row = await self._find(number)
        rows = await self.db.read("list_wirings", chat=number)
        known = next((wiring for wiring in rows if wiring["agent"] == agent), None)
        values: dict[str, Any] = {}
        for name, (column, default) in _WIRING.items():
            old = default if known is None else known[column]
            values[column] = old if parameters[name] is None else parameters[name]
        if values["engagement"] != Engagement.PATTERN and parameters["pattern"] is None:
            values["pattern"] = ""
        _check_wiring(values)
        values["exclusive"] = int(values["exclusive"])

        def wire(tx: Transaction) -> None:
            tx.all("set_wiring", chat=number, agent=agent, **values)
            tx.all("set_chat_state", id=number, state=ChatState.OPEN)

        await self.channels.decide(wire)
        journal.info("chat-wired", agent=agent, channel=row["channel"], number=number)
        return await self._answer(row, ChatState.OPEN)

    async def _unwire(self, call: Call) -> Json:
        number, agent = call.parameters["number"], call.parameters["agent"]
        row = await self._find(number)

        def unwire(tx: Transaction) -> ChatState:
            if not remove_wirings(tx, chat=number, agent=agent):
                who = f"'{agent}' does not listen" if agent else "no agent listens"
                hint = f"'nanoclawctl chat show {number}' shows who does"
                raise NotFound(f"{who} in chat {number}", hint=hint)
            return ChatState(tx.all("get_chat", id=number)[0]["state"])

        return await self._answer(row, await self.channels.decide(unwire))

    async def _block(self, call: Call) -> Json:
        number = call.parameters["number"]
        row = await self._find(number)
        await self.channels.decide(lambda tx: block_chat(tx, number))
        journal.info("chat-blocked", channel=row["channel"], number=number)
        return await self._answer(row, ChatState.BLOCKED)

    async def answer(
        self, approval: Row, sha256: str, *, allow: bool, by: Callable[[Transaction], Answerer]
    ) -> None:
        """Do what an answer to a question about a sender or a chat says. Raises Refused, Unavailable."""
        agents = self.registry.names()
        number = questions.check(approval, sha256).number
        row = await self._find(number)

        def operation(tx: Transaction) -> ChatState:
            question = questions.answer(tx, approval, sha256, allow=allow, by=by(tx))
            if question.about is About.SENDER:
                person = people.person_of(tx, question.channel, question.user)
                role = Role.MEMBER if allow else Role.DENIED
                people.set_role(tx, person, Standing(role, chat=number))
            elif not allow:
                block_chat(tx, number)
            elif len(agents) == 1:
                values = {**dict(_WIRING.values()), "exclusive": 0}
                tx.all("set_wiring", chat=number, agent=agents[0], **values)
                tx.all("set_chat_state", id=number, state=ChatState.OPEN)
            else:
                hint = f"'nanoclawctl chat wire {number} AGENT' answers this, too"
                raise Refused("there is more than one agent that could listen there", hint=hint)
            return ChatState(tx.all("get_chat", id=number)[0]["state"])

        await self._answer(row, await self.channels.decide(operation))

    async def _find(self, number: int) -> Row:
        rows = await self.db.read("list_chats", id=number)
        if not rows:
            raise NotFound(f"there is no chat {number}", hint="'nanoclawctl chat list' shows all")
        return rows[0]

    async def _answer(self, before: Row, state: ChatState) -> Json:
        """Tell adapters what has become of a chat, and return it as it is now."""
        if state != before["state"] and state is not ChatState.NEW:
            self.outlets.report_chat(before["channel"], before["chat"], state)
        return {"chat": await self._describe(await self._find(before["id"]))}

    async def _describe(self, row: Row) -> Json:
        wirings = await self.db.read("list_wirings", chat=row["id"])
        return {
            "number": row["id"],
            **{name: row[name] for name in ("channel", "chat", "kind", "title", "state", "held", "dropped")},
            "wirings": [
                {
                    "agent": wiring["agent"],
                    **{name: wiring[column] for name, (column, _) in _WIRING.items()},
                    "exclusive": bool(wiring["exclusive"]),
                }
                for wiring in wirings
            ],
        }

    # --- people ------------------------------------------------------------------------------------

    async def _list_people(self, call: Call) -> Json:
        people = ({"person": person} async for person in self._people())
        return await call.send_all(people, {"person": None})

    async def _people(self, name: str | None = None) -> AsyncIterator[Json]:
        for row in await self.db.read("list_people"):
            if name in (None, row["name"]):
                identities = await self.db.read("list_identities", person=row["id"])
                members = await self.db.read("list_members", person=row["id"], chat=None)
                yield {
                    "name": row["name"],
                    "identities": [
                        {key: each[key] for key in ("channel", "user", "how")} for each in identities
                    ],
                    "standings": [
                        {"role": each["role"], "agent": each["agent"] or None, "chat": each["chat"]}
                        for each in members
                    ],
                }

    async def _link(self, call: Call) -> Json:
        name, channel, user = (call.parameters[key] for key in ("person", "channel", "user"))
        _check_account(channel, user)

        def link(tx: Transaction) -> None:
            if call.parameters["unlink"]:
                people.unlink(tx, people.find_person(tx, name), channel, user)
            else:
                people.link(tx, people.ensure_person(tx, name), channel, user, how="linked")

        await self.channels.decide(link)
        return await self._person(name)

    async def _set_role(self, call: Call) -> Json:
        name, role = call.parameters["person"], call.parameters["role"]
        standing = await self._standing(call)

        def change(tx: Transaction) -> None:
            if role is None:
                people.remove_role(tx, people.find_person(tx, name), standing)
            else:
                people.set_role(tx, people.ensure_person(tx, name), standing)

        await self.channels.decide(change)
        return await self._person(name)

    async def _set_role_of(self, call: Call) -> Json:
        channel, user = call.parameters["channel"], call.parameters["user"]
        _check_account(channel, user)
        standing = await self._standing(call)

        def change(tx: Transaction) -> str:
            person = people.person_of(tx, channel, user)
            people.set_role(tx, person, standing)
            return str(person["name"])

        return await self._person(await self.channels.decide(change))

    async def _standing(self, call: Call) -> Standing:
        """Return the role that a call is about. Raises Refused if no such role fits, NotFound."""
        agent, chat = call.parameters["agent"], call.parameters["chat"]
        role = Role(call.parameters["role"] or Role.MEMBER)  # to take one away, all of a kind are alike
        if agent is not None and chat is not None:
            raise Refused("a role is for an agent or for a chat, not for both")
        if agent is not None:
            self.registry.get(agent)
        if chat is not None:
            await self._find(chat)
        fits = {
            Role.OWNER: agent is None and chat is None,
            Role.ADMIN: chat is None,
            Role.MEMBER: agent is not None or chat is not None,
            Role.DENIED: chat is not None,
        }
        if call.parameters["role"] is not None and not fits[role]:
            raise Refused(
                f"'{role}' is not a role for {'a chat' if chat else 'an agent' if agent else 'all'}",
                hint="owners are so everywhere, admins there or of an agent, members of an agent or of a"
                " chat, and denied is who may talk to nobody in a chat",
            )
        return Standing(role, agent or "", chat)

    async def _person(self, name: str) -> Json:
        return {"person": await anext(self._people(name))}

    async def _pair(self, call: Call) -> Json:
        channel, name = call.parameters["channel"], call.parameters["person"]
        if channel == TERMINAL:
            raise Refused("the terminal needs no code: whoever sits there is the owner")
        _check_account(channel, "-")
        await self.db.write(lambda tx: people.ensure_person(tx, name))
        return {"code": self.pairings.begin(channel, name), "seconds": int(limits.PAIRING_S)}


def _check_wiring(values: dict[str, Any]) -> None:
    """Raise Refused if the parts do not fit together."""
    if values["engagement"] == Engagement.PATTERN:
        check_pattern(values["pattern"])
    elif values["pattern"]:
        raise Refused(
            f"a pattern goes with the engagement 'pattern', not with '{values['engagement']}'",
            hint="say both, or give an empty pattern",
        )
    for name, low, high in (
        ("sticky_seconds", 1, limits.STICKY_MAX_S),
        ("priority", -_PRIORITY_MAX, _PRIORITY_MAX),
        ("keep_context", 0, limits.CONTEXT_MESSAGES),
    ):
        if not low <= values[name] <= high:
            raise Refused(f"{name}: must be from {low} to {high}")


def _check_account(channel: str, user: str) -> None:
    for name, value in (("channel", channel), ("user", user)):
        if not value or not value.isprintable() or len(value.encode()) > limits.NAME_BYTES:
            raise Refused(f"{name}: must be 1 to {limits.NAME_BYTES} bytes without control characters")
