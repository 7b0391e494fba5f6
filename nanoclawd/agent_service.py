"""io.nanoclaw.Agent: what a runner may ask of the router. Everything that comes in here is untrusted.

Which listener accepted the connection is who the caller is: call.caller.identity is its Session.
"""

from __future__ import annotations

from typing import cast

from nanoclawd import journal, leases, limits, paths
from nanoclawd.approvals import Approvals
from nanoclawd.asks import Asks
from nanoclawd.db import Database, now_ms
from nanoclawd.errors import ConfigError, NotFound, Refused
from nanoclawd.filestore import FileStore
from nanoclawd.guard import Guard
from nanoclawd.idl import read_interface
from nanoclawd.images import build_command
from nanoclawd.messages import Turn
from nanoclawd.outlets import Outlets
from nanoclawd.registry import Registry
from nanoclawd.server import Call, Method, Service
from nanoclawd.session import Session, describe_messages
from nanoclawd.sessions import Sessions
from nanoclawd.states import DeliveryState
from nanoclawd.tools import Tools
from nanoclawd.wire import Json, VarlinkError

INTERFACE = "io.nanoclaw.Agent"
PROTOCOL = 1
#: That an adapter has it at this moment is none of the agent's business.
_SHOWN_STATES = {
    DeliveryState.PENDING: "pending",
    DeliveryState.LEASED: "pending",
    DeliveryState.SENT: "sent",
    DeliveryState.DEAD: "failed",
}
_STREAM = 8  #: a runner gets at most a turn and a few stops before it must read


class AgentService:
    def __init__(
        self,
        *,
        db: Database,
        registry: Registry,
        sessions: Sessions,
        outlets: Outlets,
        guard: Guard,
        files: FileStore,
        asks: Asks,
        approvals: Approvals,
    ) -> None:
        self._db = db
        self._registry = registry
        self._containers = sessions.containers
        self._turns = sessions.turns
        self._outlets = outlets
        tools = Tools(
            db=db,
            registry=registry,
            sessions=sessions,
            outlets=outlets,
            guard=guard,
            files=files,
            asks=asks,
            running=_running,
            check_text=_check_text,
            forget_approvals=approvals.forget,
        )
        self.service = Service(
            interface=read_interface(paths.INTERFACES / f"{INTERFACE}.varlink"),
            methods={
                "Hello": Method(handler=self._hello),
                "Work": Method(handler=self._work, more=True),
                "RenewTurn": Method(handler=self._renew),
                "ReportActivity": Method(handler=self._report_activity),
                "TakeMessages": Method(handler=self._take),
                "ListDeliveries": Method(handler=self._list_deliveries),
                "FinishTurn": Method(handler=self._finish),
                "Goodbye": Method(handler=self._goodbye),
                **tools.methods,
            },
        )

    async def _hello(self, call: Call) -> Json:
        session = cast(Session, call.caller.identity)
        if call.parameters["protocol"] != PROTOCOL:
            self._containers.refuse(session, self._mismatch(session))
            journal.error(
                "protocol-mismatch",
                str(session.refused),
                unit=session.unit,
                theirs=call.parameters["protocol"],
                ours=PROTOCOL,
            )
            raise VarlinkError(f"{INTERFACE}.ProtocolMismatch", {"supported": PROTOCOL})
        config = self._registry.config(session.row.agent)
        if not session.hello:
            journal.info("runner-hello", unit=session.unit, version=call.parameters["version"][:64])
        session.hello = True
        call.caller.memory["hello"] = True
        return {
            "agent": session.row.agent,
            "session": session.row.name,
            "provider": config.provider,
            "model": config.model,
            "instructions": self._registry.instructions(session.row.agent),
            "heartbeatSeconds": int(limits.HEARTBEAT_S),
            "idleSeconds": config.idle_seconds,
        }

    def _mismatch(self, session: Session) -> ConfigError:
        image = self._registry.config(session.row.agent).image
        return ConfigError(
            f"its image '{image}' is of another version of NanoClaw", hint=f"run: {build_command(image)}"
        )

    async def _work(self, call: Call) -> Json:
        session = _introduced(call)
        session.end_stream()  # of an older call: there is one runner
        stream = session.open_stream(_STREAM)
        try:
            await self._turns.resume(session)
            while (work := await stream.get()) is not None:
                await call.send(work)
        finally:
            if session.stream is stream:
                session.stream = None
                self._containers.expect_work(session)
        raise VarlinkError(f"{INTERFACE}.OutOfOrder", {"reason": "a newer Work() call has taken over"})

    async def _renew(self, call: Call) -> Json:
        session, turn = _running(call)
        if not await self._turns.renew(session, turn):
            raise _no_such_turn(turn.id)
        return {}

    async def _report_activity(self, call: Call) -> Json:
        session, turn = _running(call)
        text = call.parameters["text"].encode()[: limits.ACTIVITY_BYTES].decode(errors="ignore")
        self._outlets.report_activity(
            session.row.agent, turn.place, call.parameters["kind"], text, turn.events
        )
        return {}

    async def _take(self, call: Call) -> Json:
        session, turn = _running(call)
        last = call.parameters["last"]
        return {"messages": describe_messages(await self._turns.join(session, turn, last))}

    async def _list_deliveries(self, call: Call) -> Json:
        session = _introduced(call)
        channel, chat, thread = session.row.place if session.turn is None else session.turn.place
        recent = await self._db.read(
            "recent_deliveries",
            agent=session.row.agent,
            channel=channel,
            chat=chat,
            thread=thread,
            limit=limits.RECENT_DELIVERIES,
        )
        deliveries = [
            {
                "id": delivery["key"],
                "kind": delivery["kind"],
                "text": delivery["body"][: limits.ALREADY_SENT_CHARACTERS],
                "state": _SHOWN_STATES[DeliveryState(delivery["state"])],
                "attempts": delivery["attempts"],
                "reason": delivery["reason"] or "",
            }
            for delivery in reversed(recent)
        ]
        return {"deliveries": deliveries}

    async def _finish(self, call: Call) -> Json:
        session, turn = _running(call)
        outcome, replies, error = (call.parameters[name] for name in ("outcome", "replies", "error"))
        if (outcome == "failed") != (error is not None):
            raise Refused("error: must be there exactly if outcome is 'failed'")
        if len(replies) > limits.REPLIES_PER_TURN:
            raise Refused(f"replies: are more than {limits.REPLIES_PER_TURN}")
        for number, text in enumerate(replies):
            _check_text(f"replies[{number}]", text)
        answers, last = call.parameters["answers"] or [], call.parameters["last"]
        if answers and len(answers) != len(replies):
            raise Refused("answers: must be one for each of replies")
        try:
            if outcome == "failed":
                await self._fail(session, turn, error)
            else:
                stopped = outcome == "stopped"
                await self._turns.finish_turn(
                    session, turn, stopped=stopped, replies=replies, answers=answers, last=last
                )
        except NotFound as exc:
            raise _no_such_turn(turn.id) from exc
        return {}

    async def _fail(self, session: Session, turn: Turn, error: Json) -> None:
        code = _line(error["code"], 40)
        line = _line(error["message"], 500) or code
        after_s = min(max(0.0, error["retryAfterSeconds"] or 0.0), limits.RETRY_AFTER_MAX_S)
        await self._turns.fail_turn(
            session,
            turn,
            reason=f"{line} ({code})",
            how=leases.treatment(error["code"], retryable=error["retryable"], shared=len(turn.messages) > 1),
            retry_after_ms=int(after_s * 1000),
        )

    async def _goodbye(self, call: Call) -> Json:
        session = _introduced(call)
        if session.turn is not None or session.taking:
            return {"stay": True}
        # A message that is on its way into the database wakes a new life, unless it is being leased to this
        # one, as does one that must wait for its next attempt; one that is due keeps this one.
        waiting = await self._db.read("next_message", session=session.row.id)
        due = bool(waiting) and waiting[0]["not_before"] <= now_ms()
        if due or session.turn is not None or session.taking:
            await self._turns.offer(session)  # unless one is on its way already
            return {"stay": True}
        self._containers.leave(session)
        return {"stay": False}


def _introduced(call: Call) -> Session:
    session = cast(Session, call.caller.identity)
    if not call.caller.memory.get("hello"):
        raise VarlinkError(
            f"{INTERFACE}.OutOfOrder", {"reason": "Hello() must be the first call on a connection"}
        )
    return session


def _running(call: Call) -> tuple[Session, Turn]:
    session = _introduced(call)
    wanted = call.parameters["turn"]
    turn = session.find_turn(wanted)
    if turn is None:
        raise _no_such_turn(wanted)
    return session, turn


def _no_such_turn(turn: str) -> VarlinkError:
    return VarlinkError(f"{INTERFACE}.NoSuchTurn", {"turn": turn[:64]})


def _line(text: str, characters: int) -> str:
    """Return the beginning of what an agent wrote as one line that moves no cursor."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:characters]).split())


def _check_text(path: str, text: str) -> None:
    size = len(text.encode())
    if size > limits.TEXT_BYTES:
        raise Refused(
            f"{path}: is {size} bytes long, and {limits.TEXT_BYTES} is the limit", hint="send it in parts"
        )
    if not text.strip():
        raise Refused(f"{path}: is empty")
