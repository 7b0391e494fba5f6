"""io.nanoclaw.Agent: what a runner may ask of the router. Everything that comes in here is untrusted.

Which listener accepted the connection is who the caller is: call.caller.identity is its Session.
"""

from __future__ import annotations

import re
from typing import cast

from nanoclawd import journal, limits, paths, queue
from nanoclawd.db import Database, Row, Transaction, now_ms
from nanoclawd.errors import ConfigError, NotFound, Refused
from nanoclawd.idl import read_interface
from nanoclawd.images import build_command
from nanoclawd.outlets import Outlets
from nanoclawd.queue import MessageState, Turn
from nanoclawd.registry import Registry
from nanoclawd.server import Call, Method, Service
from nanoclawd.session import Session
from nanoclawd.sessions import Sessions
from nanoclawd.wire import Json, VarlinkError

INTERFACE = "io.nanoclaw.Agent"
PROTOCOL = 1
_KEY = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_STREAM = 8  #: a runner gets at most a turn and a few stops before it must read


class AgentService:
    def __init__(self, *, db: Database, registry: Registry, sessions: Sessions, outlets: Outlets) -> None:
        self._db = db
        self._registry = registry
        self._sessions = sessions
        self._turns = sessions.turns
        self._outlets = outlets
        self.service = Service(
            interface=read_interface(paths.INTERFACES / f"{INTERFACE}.varlink"),
            methods={
                "Hello": Method(handler=self._hello),
                "Work": Method(handler=self._work, more=True),
                "RenewTurn": Method(handler=self._renew),
                "ReportActivity": Method(handler=self._report_activity),
                "SendMessage": Method(handler=self._send),
                "FinishTurn": Method(handler=self._finish),
                "Goodbye": Method(handler=self._goodbye),
            },
        )

    async def _hello(self, call: Call) -> Json:
        session = cast(Session, call.caller.identity)
        if call.parameters["protocol"] != PROTOCOL:
            self._sessions.refuse(session, self._mismatch(session))
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
                self._sessions.expect_work(session)
        raise VarlinkError(f"{INTERFACE}.OutOfOrder", {"reason": "a newer Work() call has taken over"})

    async def _renew(self, call: Call) -> Json:
        session, turn = _running(call)
        if not await self._turns.renew(session, turn):
            raise _no_such_turn(turn.id)
        return {}

    async def _report_activity(self, call: Call) -> Json:
        session, turn = _running(call)
        text = call.parameters["text"].encode()[: limits.ACTIVITY_BYTES].decode(errors="ignore")
        self._outlets.report_activity(session.row, call.parameters["kind"], text, turn.event)
        return {}

    async def _send(self, call: Call) -> Json:
        session, turn = _running(call)
        key, text = call.parameters["key"], call.parameters["text"]
        if not _KEY.fullmatch(key):
            raise Refused("key: must be 1 to 64 of a-z, A-Z, 0-9, '-', '_' and '.'")
        _check_text("text", text)

        def send(tx: Transaction) -> list[Row]:
            if session.turn is not turn:  # ended meanwhile
                raise _no_such_turn(turn.id)
            queue.send_message(tx, session.row, turn, key, text)
            return self._outlets.claim(tx, session.row, turn.event)

        self._outlets.publish(await self._db.write(send))
        return {}

    async def _finish(self, call: Call) -> Json:
        session, turn = _running(call)
        outcome, replies, error = (call.parameters[name] for name in ("outcome", "replies", "error"))
        if (outcome == "failed") != (error is not None):
            raise Refused("error: must be there exactly if outcome is 'failed'")
        if len(replies) > limits.REPLIES_PER_TURN:
            raise Refused(f"replies: are more than {limits.REPLIES_PER_TURN}")
        for number, text in enumerate(replies):
            _check_text(f"replies[{number}]", text)
        try:
            if outcome == "failed":
                await self._fail(session, turn, error)
            else:
                await self._turns.end_turn(
                    session, turn, lambda tx: _finish(tx, session, turn, outcome == "stopped", replies)
                )
                journal.info(
                    "message-answered",
                    message=turn.message,
                    unit=session.unit,
                    agent=session.row.agent,
                    attempt=turn.attempt,
                    outcome=outcome,
                    replies=len(replies),
                )
        except NotFound as exc:
            raise _no_such_turn(turn.id) from exc
        return {}

    async def _fail(self, session: Session, turn: Turn, error: Json) -> None:
        line = " ".join(error["message"].split())[:500] or error["code"]
        after_s = error["retryAfterSeconds"]
        await self._turns.fail_turn(
            session,
            turn,
            reason=f"{line} ({error['code'][:40]})",
            retryable=error["retryable"],
            retry_after_ms=None
            if after_s is None
            else int(max(0.0, min(after_s, limits.BACKOFF_MAX_S)) * 1000),
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
        self._sessions.leave(session)
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


def _check_text(path: str, text: str) -> None:
    size = len(text.encode())
    if size > limits.TEXT_BYTES:
        raise Refused(
            f"{path}: is {size} bytes long, and {limits.TEXT_BYTES} is the limit", hint="send it in parts"
        )
    if not text.strip():
        raise Refused(f"{path}: is empty")


def _finish(tx: Transaction, session: Session, turn: Turn, stopped: bool, replies: list[str]) -> None:
    state = MessageState.STOPPED if stopped else MessageState.ANSWERED
    queue.finish_turn(tx, session.row, turn, state, replies)
    if stopped:
        queue.publish_stopped(tx, session.row, turn.message, turn.event)
