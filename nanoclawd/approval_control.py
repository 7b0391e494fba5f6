"""The part of io.nanoclaw.Control that is about approvals."""

from __future__ import annotations

import json
import pwd
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial

from nanoclawd import asking, limits, people, policy
from nanoclawd.answers import Answers
from nanoclawd.approvals import Approvals, Scope, request_of
from nanoclawd.asking import Request
from nanoclawd.db import Database, Row
from nanoclawd.guard import held_of
from nanoclawd.policy import Way
from nanoclawd.privileges import TABLE
from nanoclawd.questions import About, Question, question_of
from nanoclawd.registry import Registry
from nanoclawd.server import Call, Method
from nanoclawd.wire import Json

_WHY = {
    About.SENDER: "This account is nothing to the agent in this chat, and its access there is 'ask'.",
    About.CHAT: "No agent listens in this chat.",
}
_PEER = struct.Struct("3i")  # man 7 unix, SO_PEERCRED: pid, uid, gid


@dataclass(eq=False, kw_only=True)
class ApprovalControl:
    db: Database
    registry: Registry
    approvals: Approvals
    answers: Answers

    def __post_init__(self) -> None:
        self.methods = {
            "ListApprovals": Method(handler=self._list),
            "ShowApproval": Method(handler=self._show),
            "AnswerApproval": Method(handler=self._answer),
        }

    async def _list(self, call: Call) -> Json:
        wanted = {name: call.parameters[name] for name in ("agent", "state")}
        rows = await self.db.read("list_approvals", limit=limits.APPROVALS_LISTED, **wanted)
        if not rows and wanted["agent"] is not None:
            self.registry.get(wanted["agent"])

        async def approvals() -> AsyncIterator[Json]:
            for row in rows:  # one at a time, since requests may be long
                for found in await self.db.read("find_approval", id=row["id"]):
                    yield {"approval": await self._describe(found)}

        return await call.send_all(approvals(), {"approval": None})

    async def _show(self, call: Call) -> Json:
        row = await self.approvals.find(call.parameters["id"])
        if (question := question_of(row)) is not None:
            why, choices = _WHY[question.about], _answers(question)
        elif (held := held_of(row)) is not None:
            why, choices = f"[guard] holds '{held.action}'.", _ACTION_CHOICES
        elif (request := request_of(row)) is not None:
            why, choices = self.approvals.decide(request).message, _choices(request)
        else:
            why, choices = "", []
        return {"approval": await self._describe(row), "why": why, "choices": choices}

    async def _answer(self, call: Call) -> Json:
        parameters = call.parameters
        row = await self.approvals.find(parameters["id"])
        allow, scope = parameters["answer"] == "allow", Scope(parameters["scope"])
        row, sent, rule = await self.answers.answer(
            row,
            parameters["sha256"],
            allow=allow,
            scope=scope,
            seconds=parameters["seconds"],
            by=partial(people.answerer_here, by=_person(call)),
        )
        return {"approval": await self._describe(row), "sent": sent, "rule": rule and str(rule)}

    async def _describe(self, row: Row) -> Json:
        shown = _describe(row)
        if (held := held_of(row)) is not None:
            votes = await self.db.read("votes", approval=row["id"])
            shown["action"] = {
                "action": held.action,
                "what": TABLE[held.action].what,
                "payload": json.dumps(held.payload, ensure_ascii=False, indent=2, sort_keys=True),
                "needed": row["needed"],
                "allowedBy": [vote["name"] for vote in votes],
                "outcome": row["outcome"],
            }
        return shown


def _person(call: Call) -> str:
    """Say who is at the other end of the call, by the kernel's word."""
    sock = call.connection.sock
    _, uid, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def _describe(row: Row) -> Json:
    """Return the row as the interface has it; a request that somebody wrote anew is not shown as one."""
    names = ("id", "kind", "agent", "session", "channel", "chat", "thread", "sha256", "state", "scope")
    shown: Json = {name: row[name] for name in names}
    shown |= {"askedAt": row["asked_at"] / 1000, "expiresAt": row["expires_at"] / 1000}
    shown |= {"decidedAt": row["decided_at"] and row["decided_at"] / 1000, "decidedBy": row["decided_by"]}
    if (question := question_of(row)) is not None:
        asked = {name: getattr(question, name) for name in ("number", "title", "user", "name", "text")}
        return {**shown, "request": None, "question": asked, "action": None}
    shown |= {"question": None, "action": None}
    if (request := request_of(row)) is None:
        return {**shown, "request": None}
    told = asking.to_json(request)
    wanted = {name: told[name] for name in ("way", "method", "host", "port", "headers", "body")}
    return {**shown, "request": {**wanted, "url": request.url, "bodyBytes": len(request.body_bytes)}}


_ACTION_CHOICES: list[Json] = [
    {"answer": "allow", "scope": "once", "what": "the router does this, as it is shown, once"},
    {"answer": "deny", "scope": "once", "what": "not this, and for an hour not the same again"},
]


def _answers(question: Question) -> list[Json]:
    """The same for a question about a sender or a chat."""
    if question.about is About.SENDER:
        allow = f"{question.user} may talk to each agent of chat {question.number}; what waits goes on"
        deny = f"{question.user} is heard by no agent of chat {question.number}; what waits is dropped"
    else:
        wire = f"'nanoclawctl chat wire {question.number} AGENT'"
        allow = f"the agent listens there, if it is the only one that there is; else say {wire}"
        deny = "nothing is taken from that chat; what waits is dropped"
    return [
        {"answer": "allow", "scope": "always", "what": allow},
        {"answer": "deny", "scope": "always", "what": deny},
    ]


def _choices(request: Request) -> list[Json]:
    """Say what each answer would allow or deny, and nothing else."""
    rule, host = request.rule(), policy.authority(request.host, request.port)
    size = f"{rule.max_up_bytes >> 20} MiB up and {rule.max_down_bytes >> 20} MiB down"
    size += f" in {rule.timeout_seconds} s"
    if request.way is Way.TUNNEL:
        # Its rule cannot tell both apart.
        what = f"each tunnel and each http:// request to {host}, whatever is said in it, of up to {size}"
        once = f"one tunnel to {host}, whatever is said in it, of up to {size}"
    else:
        below = f"{rule.path} and all below it" if rule.path else "each path"
        what = (
            f"{request.method} of {below} at http://{host}, with any query, headers and body, up to {size}"
        )
        once = "this request, with these headers and this body"
    wait_s = int(limits.APPROVAL_ONCE_S)
    denied = f"whatever is asked of {host} and no other rule decides"
    agents = "in all chats of this agent"
    return [
        {
            "answer": "allow",
            "scope": "once",
            "what": f"{once}; now, or when it comes again within {wait_s} s",
        },
        {"answer": "allow", "scope": "for", "what": f"for so long, {agents}: {what}"},
        {"answer": "allow", "scope": "always", "what": f"by a rule in its file, {agents}: {what}"},
        {"answer": "deny", "scope": "once", "what": "only this; the next one is asked about again"},
        {"answer": "deny", "scope": "for", "what": f"for so long, {agents}: {denied}"},
        {"answer": "deny", "scope": "always", "what": f"by a rule in its file, {agents}: {denied}"},
    ]
