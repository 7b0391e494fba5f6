"""What agents may do beyond answering: the part of io.nanoclaw.Agent that a model's tools call.

Each action passes the guard, with all that there is to it. It is done by one function, in the transaction
that has let it pass: be it that of the call, or later that of the guard, once a person has allowed it.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from nanoclawd import leases, limits, messages
from nanoclawd.agent_post import CHANNEL, account
from nanoclawd.agents import AgentConfig
from nanoclawd.asks import Asks
from nanoclawd.db import Database, Row, Transaction, now_ms
from nanoclawd.errors import NotFound, Refused
from nanoclawd.filestore import FileStore, Incoming, Stored, add_rows
from nanoclawd.guard import Guard, Handler, Held
from nanoclawd.ids import TERMINAL, AgentName, parse_agent_name
from nanoclawd.messages import DeliveryKind, Event, Place, Saying, SessionRow, Turn
from nanoclawd.outbox import Delivery
from nanoclawd.outlets import Outlets
from nanoclawd.privileges import Action, Say
from nanoclawd.queue import enqueue
from nanoclawd.rates import Rate
from nanoclawd.registry import Registry
from nanoclawd.server import Call, Caller, Method
from nanoclawd.session import Session
from nanoclawd.sessions import Sessions
from nanoclawd.states import ChatState
from nanoclawd.wire import Json

_KEY = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_HELD_FILE_S = limits.APPROVAL_OPEN_S + limits.APPROVAL_ONCE_S + 3600
_TEMPLATE = (
    "provider",
    "model",
    "image",
    "idle_seconds",
    "memory_max",
    "tasks_max",
    "cpu_quota",
    "runtime",
    "budget",
)
#: From the stricter to the looser.
_STRICT = (Say.DENY, Say.HOLD, Say.ALLOW)

#: Returns the session and the turn of a call, or raises what the runner has to hear.
Running = Callable[[Call], tuple[Session, Turn]]
#: Does an action; `turn` is there if its runner waits. Returns one line for the agent. Raises NanoclawError.
Act = Callable[[Transaction, Held, Turn | None], str]


@dataclass(eq=False, slots=True)
class _Upload:
    """A file that a runner hands over."""

    key: str
    incoming: Incoming


@dataclass(kw_only=True, eq=False)
class Tools:
    db: Database
    registry: Registry
    sessions: Sessions
    outlets: Outlets
    guard: Guard
    files: FileStore
    asks: Asks
    running: Running
    check_text: Callable[[str, str], None]
    forget_approvals: Callable[[str], Awaitable[None]]  #: of an agent that is gone

    def __post_init__(self) -> None:
        self._rates: dict[str, Rate] = {}  #: of what agents say to agents
        self._acts: dict[Action, Act] = {
            Action.SEND_ELSEWHERE: self._send,
            Action.SEND_FILE: self._send,
            Action.EDIT: self._edit,
            Action.REACT: self._react,
            Action.MESSAGE_AGENT: self._message_agent,
            Action.CREATE_AGENT: self._created,
        }
        self._prepare = {Action.CREATE_AGENT: self._create}
        for action, act in self._acts.items():
            self.guard.handlers[action] = Handler(
                carry_out=partial(_carry_out, act), prepare=self._prepare.get(action)
            )
        self.methods = {
            "SendMessage": Method(handler=self._send_message),
            "ListDestinations": Method(handler=self._list_destinations),
            "EditMessage": Method(handler=self._edit_message),
            "React": Method(handler=self._react_to),
            "PutFile": Method(handler=self._put_file),
            "SendFile": Method(handler=self._send_file),
            "ReadFile": Method(handler=self._read_file),
            "AskPerson": Method(handler=self._ask_person),
            "MessageAgent": Method(handler=self._message),
            "CreateAgent": Method(handler=self._create_agent),
        }

    # --- any action --------------------------------------------------------------------------------

    async def _act(
        self, call: Call, actions: list[Action], payload: Json, stored: Stored | None = None
    ) -> Json:
        """Do one thing if all of `actions` are allowed, or what the strictest of them says."""
        session, turn = self.running(call)
        key = _key(call, turn)
        say = self.registry.privileges(session.row.agent).say
        action = min(actions, key=lambda action: _STRICT.index(say(action)))
        held = Held(
            action=action,
            agent=session.row.agent,
            session=session.row.name,
            place=turn.place,
            payload={**payload, "key": key},
        )
        prepare = self._prepare.get(action)
        if prepare is not None and say(action) is Say.ALLOW:
            await prepare(held)

        def operation(tx: Transaction) -> tuple[Json, str, list[Delivery]]:
            self.running(call)  # it may have ended meanwhile
            if tx.one("find_published", key=key) is not None:
                return _outcome(key), "", []
            ruling = self.guard.check(
                tx, action, session=session.row, place=turn.place, call=key, payload=held.payload
            )
            if ruling.say is Say.DENY:
                return {}, ruling.message, []
            if stored is not None:
                kept_until = now_ms() + int(_HELD_FILE_S * 1000) if ruling.say is Say.HOLD else 0
                add_rows(tx, [stored], agent=session.row.agent, key=key, kept_until=kept_until)
            if ruling.say is Say.HOLD:
                return _outcome("", held=ruling.message), "", self.outlets.claim(tx)
            message = self._acts[action](tx, held, turn)
            sent = key if tx.one("find_published", key=key) is not None else ""
            return _outcome(sent, message), "", self.outlets.claim(tx)

        outcome, denied, deliveries = await self.db.write(operation)
        self.outlets.publish(deliveries)
        if denied:
            raise Refused(denied)
        return {"outcome": outcome}

    def _say(self, tx: Transaction, held: Held, turn: Turn | None, saying: Saying) -> None:
        """Publish something, in the turn that asks for it or after it."""
        key = held.payload["key"]
        if turn is not None:
            leases.send(tx, self._session(tx, held), turn, key, saying)
        else:
            leases.say(tx, held.agent, None, key, saying, place=saying.place or held.place)

    def _session(self, tx: Transaction, held: Held) -> SessionRow:
        row = tx.one("session_of", agent=held.agent, name=held.session)
        if row is None:
            raise Refused("its conversation is gone")
        return messages.session_row(row)

    # --- messages ----------------------------------------------------------------------------------

    async def _send_message(self, call: Call) -> Json:
        session, turn = self.running(call)
        text, destination = call.parameters["text"], call.parameters["destination"]
        self.check_text("text", text)
        if destination is not None:
            return await self._act(call, [Action.SEND_ELSEWHERE], {"to": destination, "text": text})
        key = _key(call, turn)

        def send(tx: Transaction) -> list[Delivery]:
            self.running(call)
            leases.send(tx, session.row, turn, key, Saying(text=text))
            return self.outlets.claim(tx)

        self.outlets.publish(await self.db.write(send))
        return {"outcome": _outcome(key)}

    def _send(self, tx: Transaction, held: Held, turn: Turn | None) -> str:
        """Send a text or a file to the chat, or elsewhere."""
        to = held.payload["to"]
        place = held.place if to is None else self._destination(tx, held.agent, to)
        self._say(tx, held, turn, Saying(text=held.payload["text"], place=place))
        return "" if to is None else f"sent to {to}"

    def _destination(self, tx: Transaction, agent: str, name: str) -> Place:
        rows = {row["name"]: row for row in tx.all("list_destinations", agent=agent)}
        if name not in rows:
            known = ", ".join(rows) or "none"
            raise Refused(f"there is no destination '{name[:64]}'", hint=f"there are: {known}")
        row = rows[name]
        if row["channel"] != TERMINAL and row["state"] != ChatState.OPEN:
            raise Refused(f"the chat of '{name}' is not open")
        return row["channel"], row["chat"], ""

    async def _list_destinations(self, call: Call) -> Json:
        session, _ = self.running(call)
        rows = await self.db.read("list_destinations", agent=session.row.agent)
        return {
            "destinations": [
                {"name": row["name"], "channel": row["channel"], "title": row["title"] or ""} for row in rows
            ],
            "agents": [name for name in self.registry.names() if name != session.row.agent],
        }

    async def _edit_message(self, call: Call) -> Json:
        session, turn = self.running(call)
        text, delivery = call.parameters["text"], call.parameters["delivery"]
        if text is not None:
            self.check_text("text", text)
        row = _first(await self.db.read("find_published", key=delivery))
        own = row is not None and row["agent"] == session.row.agent and row["kind"] in ("reply", "message")
        if row is None or not own or messages.place_of(row) != turn.place:
            raise Refused(
                "delivery: you have said no such thing in this chat", hint="ListDeliveries() names all"
            )
        return await self._act(call, [Action.EDIT], {"delivery": delivery, "text": text})

    def _edit(self, tx: Transaction, held: Held, turn: Turn | None) -> str:
        text, delivery = held.payload["text"], held.payload["delivery"]
        kind = DeliveryKind.REDACTION if text is None else DeliveryKind.EDIT
        self._say(tx, held, turn, Saying(kind=kind, text=text or "", target_key=delivery))
        return ""

    async def _react_to(self, call: Call) -> Json:
        _, turn = self.running(call)
        reaction = call.parameters["reaction"]
        if (
            not reaction.isprintable()
            or not 0 < len(reaction.encode()) <= limits.REACTION_BYTES
            or " " in reaction
        ):
            raise Refused(f"reaction: must be an emoji, of at most {limits.REACTION_BYTES} bytes")
        events = [m.event for m in turn.messages if m.id == call.parameters["message"] and m.is_event]
        if not events:
            raise Refused("message: the turn has no such message of a person")
        return await self._act(call, [Action.REACT], {"event": events[0], "reaction": reaction})

    def _react(self, tx: Transaction, held: Held, turn: Turn | None) -> str:
        what = held.payload
        self._say(
            tx,
            held,
            turn,
            Saying(kind=DeliveryKind.REACTION, text=what["reaction"], target_event=what["event"]),
        )
        return ""

    # --- files -------------------------------------------------------------------------------------

    async def _put_file(self, call: Call) -> Json:
        _, turn = self.running(call)
        key, offset = _key(call, turn), call.parameters["offset"]
        try:
            data = base64.b64decode(call.parameters["data"], validate=True)
        except ValueError:  # binascii.Error is one, and of what is not ASCII it is another
            raise Refused("data: is not base64") from None
        if len(data) > limits.FILE_CHUNK_BYTES:
            raise Refused(f"data: is more than {limits.FILE_CHUNK_BYTES >> 10} KiB")
        upload = _upload(call.caller)
        if upload is None or upload.key != key:
            self._end_upload(call.caller)
            if offset:
                return {"received": 0}
            upload = self._begin_upload(call.caller, key)
        incoming = upload.incoming
        if incoming.bytes + len(data) > limits.FILE_BYTES:
            self._end_upload(call.caller)
            raise Refused(f"the file is larger than {limits.FILE_BYTES >> 20} MiB")
        if offset == incoming.bytes:
            try:
                await self.files.write(incoming, data)
            except BaseException:
                self._end_upload(call.caller)
                raise
        return {"received": incoming.bytes}

    def _begin_upload(self, caller: Caller, key: str) -> _Upload:
        if "upload" not in caller.memory:
            caller.on_close.append(partial(self._end_upload, caller))
        upload = caller.memory["upload"] = _Upload(key, self.files.begin())
        return upload

    def _end_upload(self, caller: Caller) -> None:
        if (upload := _upload(caller)) is not None:
            caller.memory["upload"] = None
            self.files.discard(upload.incoming)

    async def _send_file(self, call: Call) -> Json:
        _, turn = self.running(call)
        parameters, key = call.parameters, _key(call, turn)
        if parameters["caption"]:
            self.check_text("caption", parameters["caption"])
        if not 0 <= parameters["bytes"] <= limits.FILE_BYTES:
            raise Refused(f"bytes: a file may be {limits.FILE_BYTES >> 20} MiB long")
        actions = [Action.SEND_FILE] + (
            [Action.SEND_ELSEWHERE] if parameters["destination"] is not None else []
        )
        if file := _first(await self.db.read("files_of_delivery", key=key)):  # of an earlier attempt
            return await self._act(call, actions, _file_payload(parameters, file["name"], file["sha256"]))
        upload = _upload(call.caller)
        if upload is None or upload.key != key or upload.incoming.bytes != parameters["bytes"]:
            return {"outcome": None}
        kept = False
        try:
            stored = await self.files.settle(upload.incoming, parameters["name"], parameters["mediaType"])
            call.caller.memory["upload"] = None
            answer = await self._act(
                call, actions, _file_payload(parameters, stored.name, stored.sha256), stored
            )
            kept = True
            self.files.forget([stored.id])
        finally:
            if not kept:
                self.files.discard(upload.incoming)
                call.caller.memory["upload"] = None
        return answer

    async def _read_file(self, call: Call) -> Json:
        _, turn = self.running(call)
        wanted, offset = call.parameters["id"], call.parameters["offset"]
        found = [file for message in turn.messages for file in message.files if file["id"] == wanted]
        if not found or offset < 0:
            raise NotFound("the turn has no such file")
        data = await self.files.read(found[0], offset, limits.FILE_CHUNK_BYTES)
        return {"data": base64.b64encode(data).decode()}

    # --- questions ---------------------------------------------------------------------------------

    async def _ask_person(self, call: Call) -> Json:
        session, turn = self.running(call)
        key, question = _key(call, turn), call.parameters["question"]
        options, wait_s = call.parameters["options"], call.parameters["timeoutSeconds"]
        self.check_text("question", question)
        if not 2 <= len(options) <= limits.ASK_OPTIONS:
            raise Refused(f"options: must be 2 to {limits.ASK_OPTIONS}")
        for option in options:
            if (
                not option.strip()
                or not option.isprintable()
                or len(option.encode()) > limits.ASK_OPTION_BYTES
            ):
                raise Refused(f"options: each is one line of at most {limits.ASK_OPTION_BYTES} bytes")
        if not 0 < wait_s <= limits.ASK_PERSON_MAX_S:
            raise Refused(f"timeoutSeconds: must be 1 to {limits.ASK_PERSON_MAX_S}")

        def ask(tx: Transaction) -> list[Delivery]:
            self.running(call)
            self.asks.ask(tx, session.row, turn, key, question, options, wait_s=wait_s)
            return self.outlets.claim(tx)

        if not await self.db.read("find_ask", key=key):
            self.outlets.publish(await self.db.write(ask))
        row = await self.asks.wait(key)
        if row["answer"] is not None:
            return {"state": "answered", "answer": row["answer"], "sender": row["answered_by"]}
        return {
            "state": "expired" if row["expires_at"] <= now_ms() else "waiting",
            "answer": "",
            "sender": "",
        }

    # --- agents ------------------------------------------------------------------------------------

    async def _message(self, call: Call) -> Json:
        session, turn = self.running(call)
        agent, text = call.parameters["agent"], call.parameters["text"]
        self.check_text("text", text)
        self._check_peer(session.row.agent, agent)
        if turn.hops >= limits.AGENT_HOPS:
            raise Refused(
                f"agents have answered each other {turn.hops} times since a person said something",
                hint="answer in the chat; a person may go on from there",
            )
        return await self._act(
            call, [Action.MESSAGE_AGENT], {"agent": agent, "text": text, "hops": turn.hops + 1}
        )

    def _check_peer(self, asking: str, name: str) -> None:
        if name == asking:
            raise Refused("agent: that is you")
        self.registry.config(self.registry.get(name).name)

    def _message_agent(self, tx: Transaction, held: Held, turn: Turn | None) -> str:
        name, key = held.payload["agent"], held.payload["key"]
        self._check_peer(held.agent, name)
        event = Event(
            channel=CHANNEL,
            chat=f"{held.agent}/{held.session}",
            thread="",
            event=key,
            revision=0,
            sender=account(held.agent),
            text=held.payload["text"],
        )
        if tx.one("find_delivered", agent=name, **event.key) is None and turn is not None:
            rate = self._rates.setdefault(
                held.agent, Rate(limits.AGENT_MESSAGES_PER_S, limits.AGENT_MESSAGES_BURST)
            )
            if rate.take():
                rate.take(-1)
                raise Refused("this is too much at once between agents; try again in a minute")
        _, fresh = enqueue(tx, AgentName(name), event, hops=held.payload["hops"])
        if fresh is not None:
            tx.then(partial(self.sessions.wake, fresh))
        return f"'{name}' has it; its answer comes as a message"

    async def _create_agent(self, call: Call) -> Json:
        session, _ = self.running(call)
        name, instructions = call.parameters["name"], call.parameters["instructions"]
        if self.registry.find(parse_agent_name(name)) is not None and not self._is_made(
            session.row.agent, call.parameters
        ):
            raise Refused(f"there is an agent named '{name}'")
        if len(instructions.encode()) > limits.TEXT_BYTES:
            raise Refused("instructions: are too long")
        payload = {name: call.parameters[name] for name in ("name", "description", "instructions")}
        return await self._act(call, [Action.CREATE_AGENT], payload)

    async def _create(self, held: Held) -> None:
        """Have the agent be there; it may be so already. Raises NanoclawError."""
        what = held.payload
        if self.registry.find(AgentName(what["name"])) is None:
            await self.forget_approvals(what["name"])
            values = self._template(held.agent, what["description"])
            await self.registry.add(what["name"], values, what["instructions"])
        elif not self._is_made(held.agent, what):
            raise Refused(f"there is another agent named '{what['name']}' by now")

    def _created(self, tx: Transaction, held: Held, turn: Turn | None) -> str:
        name = held.payload["name"]
        self.registry.config(name)
        return f"agent '{name}' is there"

    def _is_made(self, creator: AgentName, what: Json) -> bool:
        """Say whether the agent that is there is what would be made."""
        agent = self.registry.find(AgentName(what["name"]))
        if agent is None or agent.config is None:
            return False
        wanted = AgentConfig(name=agent.name, **self._template(creator, what["description"]))
        return agent.config == wanted and self.registry.instructions(agent.name) == what["instructions"]

    def _template(self, creator: AgentName, description: str) -> dict[str, Any]:
        """Return what an agent is made of that `creator` wants: it may nothing that this one may not."""
        config = self.registry.config(creator)
        guard = replace(config.guard, create_agent=Say.DENY)
        return {name: getattr(config, name) for name in _TEMPLATE} | {
            "description": " ".join(description.split()),
            "guard": guard,
        }


def _carry_out(act: Act, tx: Transaction, held: Held) -> str:
    return act(tx, held, None) or "done"


def _outcome(delivery: str, message: str = "", *, held: str = "") -> Json:
    return {"state": "held" if held else "done", "delivery": delivery, "message": held or message}


def _file_payload(parameters: Json, name: str, sha256: str) -> Json:
    return {
        "to": parameters["destination"],
        "text": parameters["caption"],
        "file": name,
        "bytes": parameters["bytes"],
        "sha256": sha256,
    }


def _key(call: Call, turn: Turn) -> str:
    """Return the key of what the call does, the same in each attempt. Raises Refused."""
    key: str = call.parameters["key"]
    if not _KEY.fullmatch(key):
        raise Refused("key: must be 1 to 64 of a-z, A-Z, 0-9, '-', '_' and '.'")
    return turn.full_key(key)


def _upload(caller: Caller) -> _Upload | None:
    return caller.memory.get("upload")


def _first(rows: list[Row]) -> Row | None:
    return rows[0] if rows else None
