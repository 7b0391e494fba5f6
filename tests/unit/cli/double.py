"""A double of the router: real Varlink with the real interfaces, and nothing behind it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from nanoclawd import idl, paths, policy
from nanoclawd.errors import NanoclawError, NotFound, Refused
from nanoclawd.ids import no_agent
from nanoclawd.server import Call, Method, Server, Service
from nanoclawd.varlink import Connection
from nanoclawd.wire import Json

WITHIN_S = 10.0

CONFIGURATION: Json = {
    "name": "berta",
    "description": "helps",
    "provider": "echo",
    "model": "",
    "image": "localhost/nanoclaw-agent:latest",
    "idleSeconds": 600,
    "memoryMax": "1G",
    "tasksMax": 256,
    "cpuQuota": "",
    "runtime": "",
    "unknown": "deny",
    "mounts": [{"source": "/home/ada/src", "target": "/mnt/src", "readOnly": True}],
}
RUNTIME: Json = {
    "state": "ready",
    "problem": "",
    "unitTemplate": "nanoclaw-berta@.service",
    "hostUid": 101999,
    "sessions": 1,
    "running": 0,
    "queued": 0,
}
SESSION: Json = {
    "agent": "berta",
    "session": "s1",
    "unit": "nanoclaw-berta@s1.service",
    "channel": "terminal",
    "chat": "berta",
    "thread": "",
    "state": "ready",
    "detail": "",
    "queued": 0,
    "message": None,
    "usedAt": 1_800_000_000.0,
    "closesAt": None,
}
MESSAGE: Json = {
    "id": "m0123456789abcdef",
    "agent": "berta",
    "session": "s1",
    "unit": "nanoclaw-berta@s1.service",
    "channel": "terminal",
    "chat": "berta",
    "thread": "",
    "event": "e1",
    "revision": 0,
    "sender": "ada",
    "text": "What is\x1b new?\n",
    "state": "dead",
    "receivedAt": 1.0,
    "attempts": 4,
    "deferrals": 2,
    "notBefore": None,
    "leaseExpiresAt": None,
    "endedAt": 2.0,
    "turn": "t0123456789abcdef",
    "firstTurn": "t0123456789abcdef",
    "reason": "it broke",
    "revived": 0,
    "dropped": False,
}
DELIVERY: Json = {
    "key": "m0123456789abcdef.notice",
    "message": "m0123456789abcdef",
    "turn": None,
    "agent": "berta",
    "channel": "terminal",
    "chat": "berta",
    "thread": "",
    "kind": "notice",
    "text": "Your message could not be answered",
    "state": "dead",
    "createdAt": 2.0,
    "attempts": 1,
    "partsSent": 0,
    "notBefore": None,
    "endedAt": 3.0,
    "receipt": None,
    "reason": "no such chat",
    "dropped": False,
}
DESTINATION: Json = {
    "agent": "berta",
    "name": "family",
    "channel": "matrix",
    "chat": "!x:example.org",
    "title": "Family",
}
AUDIT: list[Json] = [
    {"seq": 6, "at": 1.001, "kind": "control", "event": "StopAgent", "agent": "berta"}
    | {"detail": '{"n":1}', "before": "0" * 64, "hash": "e" * 64},
    {"seq": 7, "at": 2.0, "kind": "request", "event": "denied", "agent": "berta"}
    | {"detail": '{"count":3,"host":"a.example:80","method":"GET","path":"/\\u001b","reason":"no-rule"}'}
    | {"before": "e" * 64, "hash": "f" * 64},
]
BUDGET: Json = {"tokensPerDay": 5000, "tokensPerSession": None, "requestsPerMinute": None}
BUDGET |= {"moneyPerDay": 2_500_000, "moneyPerSession": None}
USAGE: Json = {"agent": "berta", "session": "", "day": "", "calls": 12, "estimated": 2, "unpriced": 1}
USAGE |= {"input": 100, "output": 50, "cacheWrite": 20, "cacheRead": 900, "microdollars": 1_020_300}
USAGE |= {"tokensLeft": 3930, "microdollarsLeft": 1_479_700}
APPROVAL: Json = {
    "id": "a0123abcd",
    "kind": "request",
    "agent": "berta",
    "session": "s1",
    "channel": "terminal",
    "chat": "berta",
    "thread": "",
    "sha256": "5" * 64,
    "state": "pending",
    "askedAt": 1.0,
    "expiresAt": 4e9,
    "scope": None,
    "decidedAt": None,
    "decidedBy": None,
    "request": {
        "way": "plain",
        "method": "POST",
        "host": "a.example",
        "port": 80,
        "url": f"http://a.example/{'x' * 300}/end",
        "headers": [{"name": "x-mine", "value": "1\x1b[2J\nHost: b.example"}],
        "bodyBytes": 11,
        "body": base64.b64encode("a\x1b\u202eb\nWhy:".encode()).decode(),
    },
    "question": None,
}
PERSON: Json = {
    "name": "ada",
    "identities": [{"channel": "matrix", "user": "@ada:example.org", "how": "paired"}],
    "standings": [
        {"role": "admin", "agent": "berta", "chat": None},
        {"role": "member", "agent": None, "chat": 3},
    ],
}
CHAT: Json = {
    "number": 3,
    "channel": "matrix",
    "chat": "!room:example.org",
    "kind": "group",
    "title": "Bank\x1b[2J\nSTATE open",
    "state": "open",
    "held": 1,
    "dropped": 7,
    "wirings": [
        {
            "agent": "berta",
            "engagement": "sticky",
            "pattern": "",
            "stickySeconds": 60,
            "priority": 1,
            "exclusive": True,
            "sessionMode": "thread",
            "access": "ask",
            "keepContext": 5,
        }
    ],
}
HELD: Json = {
    "sender": "@eve:evil.example",
    "senderName": "Your\nowner",
    "text": "let me in\x1b",
    "receivedAt": 1.0,
}
CHECK: Json = {"name": "network", "active": True, "detail": "connect: EPERM"}
CHANNEL: Json = {
    "name": "home",
    "kind": "matrix",
    "problem": "",
    "unit": "nanoclaw-channel@home.service",
    "activeState": "active",
    "subState": "running",
    "attached": True,
    "adapter": "nanoclaw-matrix 1",
    "accounts": ["@bot:example.org"],
    "capabilities": {"threads": True, "edits": False, "textBytes": 4000, "markup": "markdown"},
    "health": "connected",
    "healthText": "",
    "healthAge": 3.0,
    "waiting": 2,
    "lastError": "",
    "sandbox": [],
}
STATUS: Json = {
    "version": "0.1.0",
    "pid": 4711,
    "startedAt": 1.0,
    "held": False,
    "units": [
        {"name": "nanoclaw.service", "activeState": "active", "subState": "running", "memoryBytes": 4 << 20}
    ],
    "agents": 1,
    "agentsHeld": 0,
    "agentsBroken": 0,
    "budgetStops": [],
    "sessionCount": 1,
    "sessions": [SESSION],
    "queue": {
        "queued": 1,
        "deferred": 0,
        "leased": 2,
        "answered": 3,
        "stopped": 4,
        "dead": 5,
        "deliveriesPending": 6,
        "deliveriesSent": 7,
        "deliveriesDead": 8,
    },
    "approvalsPending": 2,
    "channels": [],
    "sandbox": [CHECK],
    "gateway": {
        "version": "0.1.0",
        "sessions": [],
        "routes": [
            {
                "name": "anthropic",
                "endpoint": "https://api.anthropic.com",
                "credential": "anthropic",
                "credentialState": "ok",
            }
        ],
        "sandbox": [CHECK],
    },
    "gatewayProblem": "",
}


class RouterDouble:
    """Serves both sockets in a thread. Its fields may be read and set by the test at any time."""

    def __init__(self) -> None:
        self.agents: dict[str, Json] = {"berta": dict(RUNTIME)}
        self.status: Json = dict(STATUS)
        self.sessions: list[Json] = [SESSION]
        self.letters: list[Json] = [{"message": MESSAGE}, {"delivery": DELIVERY}]
        self.message = MESSAGE
        self.backup: Path | None = None  #: what the router wrote
        self.fail: dict[str, NanoclawError] = {}  #: by method
        self.calls: list[tuple[str, Json]] = []
        self.trash: str | None = None
        self.chat: Json | None = CHAT
        self.rules: policy.Rules = ()
        self.unknown = policy.Unknown.DENY
        self.approvals: list[Json] = [APPROVAL]
        self.sent = True  #: what is allowed still waited
        self.trail: list[Json] = list(AUDIT)
        self.verdict: Json = {"rows": 2, "head": "f" * 64, "broken": None, "problem": ""}
        self.usage: Json | None = USAGE
        self.received: list[bytes] = []  #: what files that came with the last message hold
        self.channel: Json = dict(CHANNEL)
        self.channel_turns: list[Json] = []  #: what ShowChannel() shows of it each time
        self.messages: dict[str, Json] = {}  #: by event
        self.pending: list[Json] = []  #: deliveries that are not reported
        self.reports: list[str] = []  #: keys
        self.stops = 0
        self.stop_answered = True  #: False: a turn that is stopped does not end
        self.answer: Callable[[Json], list[Json]] = echo  #: what Attach() sends for a message
        self.hang_up_after_storing = False  #: once
        self._changed = threading.Condition()
        self._streams: list[tuple[Call, asyncio.Queue[Json]]] = []
        self._connections: list[Connection] = []
        self._loop = asyncio.new_event_loop()
        self._listeners = [_listen(paths.control_socket()), _listen(paths.terminal_socket())]
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))
        self._thread.start()

    # For tests

    def wait(self, condition: Callable[[], Any]) -> None:
        """Wait until `condition` holds; it is looked at after each call that the double answers."""
        with self._changed:
            assert self._changed.wait_for(condition, WITHIN_S), "the double did not get what it waits for"

    def send(self, *items: Json) -> None:
        """Push deliveries and activities to who is attached; deliveries wait for who attaches later."""
        self._loop.call_soon_threadsafe(self._push, items)

    def hang_up(self) -> None:
        """Close all connections, as a router that restarts; systemd keeps the listeners."""

        def close() -> None:
            for connection in self._connections:
                with contextlib.suppress(OSError):  # closed already
                    connection.sock.shutdown(socket.SHUT_RDWR)
            self._connections.clear()

        self._loop.call_soon_threadsafe(close)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()
        for listener in self._listeners:
            listener.close()

    # The service

    async def _serve(self) -> None:
        control, channel = (
            idl.read_interface(paths.INTERFACES / f"io.nanoclaw.{name}.varlink")
            for name in ("Control", "Channel")
        )
        servers = [
            Server(self._service(control), self._listeners[0]),
            Server(self._service(channel), self._listeners[1], max_fds=10),
        ]
        tasks = [asyncio.create_task(server.run()) for server in servers]
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait([*tasks, stopped], return_when=asyncio.FIRST_COMPLETED)
        for task in (*tasks, stopped):
            task.cancel()
        # A bug of the double, or of the server, is raised in its thread; pytest makes it a failure.
        for result in await asyncio.gather(*tasks, stopped, return_exceptions=True):
            if isinstance(result, Exception):
                raise result

    def _service(self, interface: idl.Interface) -> Service:
        streams = {"Attach": True}
        table = {
            name: Method(
                handler=self._noting(interface, name, getattr(self, f"_{name}", None)),
                more=streams.get(name),
            )
            for name in interface.methods
        }
        return Service(interface=interface, methods=table)

    def _noting(
        self,
        interface: idl.Interface,
        name: str,
        handler: Callable[[Call], Coroutine[Any, Any, Json]] | None,
    ) -> Callable[[Call], Coroutine[Any, Any, Json]]:
        async def answer(call: Call) -> Json:
            with self._changed:
                self.calls.append((name, call.parameters))
            self._connections.append(call.connection)
            try:
                if name in self.fail:
                    raise self.fail[name]
                if (
                    "name" in call.parameters
                    and "Channel" not in name
                    and name != "AddAgent"
                    and call.parameters["name"] not in self.agents
                ):
                    raise no_agent(call.parameters["name"], self.agents)
                reply = await handler(call) if handler is not None else {}
                return interface.check_reply(name, reply)
            finally:
                with self._changed:
                    self._changed.notify_all()

        return answer

    async def _Status(self, _call: Call) -> Json:
        return self.status

    async def _Announce(self, call: Call) -> Json:
        return {"channel": "terminal"}

    async def _AddChannel(self, call: Call) -> Json:
        return {"channel": self.channel}

    async def _ListChannels(self, call: Call) -> Json:
        return {"channel": self.channel}

    async def _ShowChannel(self, call: Call) -> Json:
        self.channel |= self.channel_turns.pop(0) if self.channel_turns else {}
        places = {"file": "/f", "directory": "/d", "socket": "/s", "credential": "channel-home"}
        return {"channel": self.channel, **places}

    async def _RemoveChannel(self, call: Call) -> Json:
        return {"trash": None}

    async def _ListChats(self, call: Call) -> Json:
        return {"chat": self.chat}

    async def _ShowChat(self, call: Call) -> Json:
        assert self.chat is not None
        return {"chat": self.chat, "people": [PERSON], "held": [HELD]}

    async def _WireChat(self, call: Call) -> Json:
        return {"chat": self.chat}

    _UnwireChat = _BlockChat = _WireChat

    async def _ListDestinations(self, call: Call) -> Json:
        return {"destination": DESTINATION}

    async def _AddDestination(self, call: Call) -> Json:
        return {}

    _RemoveDestination = _AddDestination

    async def _ListPeople(self, call: Call) -> Json:
        return {"person": PERSON}

    async def _SetRole(self, call: Call) -> Json:
        return {"person": PERSON}

    _SetRoleOf = _LinkPerson = _SetRole

    async def _Pair(self, call: Call) -> Json:
        return {"code": "ABCD-EFGH", "seconds": 600}

    async def _ResetSession(self, call: Call) -> Json:
        return {"trash": self.trash}

    _CloseSession = _ResetSession

    async def _Backup(self, _call: Call) -> Json:
        return {"file": str(self.backup)}

    async def _ListMessages(self, _call: Call) -> Json:
        return {"message": self.message}

    async def _ShowMessage(self, call: Call) -> Json:
        await call.send({"message": MESSAGE})
        return {"delivery": DELIVERY}

    async def _ListDeadLetters(self, call: Call) -> Json:
        for letter in self.letters[:-1]:
            await call.send(letter)
        return self.letters[-1] if self.letters else {}

    async def _RetryDeadLetter(self, call: Call) -> Json:
        if "gone" in call.parameters["id"]:
            raise Refused("there is no agent 'gone' any more", hint="add it")
        return {"id": call.parameters["id"]}

    async def _DropDeadLetter(self, call: Call) -> Json:
        return {"id": call.parameters["id"]}

    async def _ListAudit(self, call: Call) -> Json:
        for row in self.trail[:-1]:
            await call.send({"row": row})
        return {"row": self.trail[-1] if self.trail else None}

    async def _SetBudget(self, call: Call) -> Json:
        return {"budget": BUDGET}

    async def _ListUsage(self, call: Call) -> Json:
        return {"usage": self.usage}

    async def _VerifyAudit(self, call: Call) -> Json:
        return self.verdict

    async def _AddAgent(self, call: Call) -> Json:
        self.agents[call.parameters["name"]] = dict(RUNTIME)
        return {"configuration": {**CONFIGURATION, "name": call.parameters["name"]}, "runtime": RUNTIME}

    async def _SetAgent(self, call: Call) -> Json:
        return {"configuration": CONFIGURATION, "runtime": self.agents[call.parameters["name"]]}

    async def _ListAgents(self, call: Call) -> Json:
        replies = [
            {"name": name, "configuration": {**CONFIGURATION, "name": name}, "runtime": runtime}
            for name, runtime in self.agents.items()
        ] or [{}]
        for reply in replies[:-1]:
            await call.send(reply)
        return replies[-1]

    async def _ShowAgent(self, call: Call) -> Json:
        return {
            "configuration": CONFIGURATION,
            "runtime": self.agents[call.parameters["name"]],
            "budget": BUDGET,
            "instructions": "Be kind.\n",
            "file": "/home/ada/.config/nanoclaw/agents/berta.toml",
            "workspace": "/home/ada/.local/state/nanoclaw/agents/berta/workspace",
            "unitFile": "/home/ada/.config/containers/systemd/nanoclaw/berta/nanoclaw-berta@.container",
            "dropInDirectory": "/home/ada/.config/containers/systemd/nanoclaw-berta@.container.d",
        }

    async def _ShowPolicy(self, _call: Call) -> Json:
        return {"unknown": self.unknown, "rules": [*map(policy.to_json, self.rules)]}

    async def _AddRule(self, call: Call) -> Json:
        self.rules = policy.with_rule(self.rules, policy.from_json(call.parameters["rule"]))
        return {"rules": [*map(policy.to_json, self.rules)]}

    async def _TestPolicy(self, call: Call) -> Json:
        ask = policy.parse_url(call.parameters["method"], call.parameters["url"])
        allowed, number, _, reason, message = policy.decide(self.rules, ask, self.unknown)
        return {"allowed": allowed, "way": ask.way, "rule": number, "reason": reason, "message": message}

    async def _ListApprovals(self, call: Call) -> Json:
        wanted = call.parameters["state"]
        found = [a for a in self.approvals if wanted in (None, a["state"])]
        for approval in found[:-1]:
            await call.send({"approval": approval})
        return {"approval": found[-1] if found else None}

    def _approval(self, call: Call) -> Json:
        found = next((a for a in self.approvals if a["id"].startswith(call.parameters["id"])), None)
        if found is None:
            raise NotFound("no approval", hint="there are others")
        return found

    async def _ShowApproval(self, call: Call) -> Json:
        choices = [{"answer": "allow", "scope": "once", "what": "this request"}]
        return {"approval": self._approval(call), "why": "No rule decides.", "choices": choices}

    async def _AnswerApproval(self, call: Call) -> Json:
        approval = {**self._approval(call), "scope": call.parameters["scope"], "state": "allowed"}
        rule = "allow a.example:80" if call.parameters["scope"] == "always" else None
        return {"approval": approval, "sent": self.sent, "rule": rule}

    async def _RemoveAgent(self, call: Call) -> Json:
        del self.agents[call.parameters["name"]]
        return {"trash": self.trash}

    async def _ListSessions(self, call: Call) -> Json:
        for session in self.sessions[:-1]:
            await call.send({"session": session})
        return {"session": self.sessions[-1] if self.sessions else None}

    async def _BuildImage(self, call: Call) -> Json:
        await call.send({"line": "STEP 1/2: \x1b[31mFROM\n", "imageId": None})
        return {"line": None, "imageId": "sha256:0123"}

    async def _Reload(self, _call: Call) -> Json:
        return {"agents": len(self.agents), "problems": []}

    async def _Deliver(self, call: Call) -> Json:
        agent, event = call.parameters["agent"], call.parameters["event"]
        if agent not in self.agents:
            raise no_agent(agent, self.agents)
        # The real one commits to disk first; who attached just before is there when it goes on.
        for _ in range(10):
            await asyncio.sleep(0)
        duplicate = event in self.messages
        self.messages[event] = call.parameters
        self.received = [os.pread(fd, 100, 0) for fd in call.connection.fds]
        if not duplicate:
            self._push(self.answer(call.parameters))
        if self.hang_up_after_storing:
            self.hang_up_after_storing = False
            call.connection.sock.shutdown(socket.SHUT_RDWR)
        return {"outcome": "queued", "message": "m0123456789abcdef", "duplicate": duplicate}

    async def _Attach(self, call: Call) -> Json:
        queue: asyncio.Queue[Json] = asyncio.Queue()
        stream = (call, queue)
        for delivery in self.pending:
            queue.put_nowait({"delivery": delivery})
        self._streams.append(stream)
        with self._changed:
            self._changed.notify_all()
        try:
            while True:
                item = await queue.get()
                found = item["delivery"] if "delivery" in item else item["activity"]
                wanted = call.parameters["event"]
                if found["chat"] == call.parameters["chat"] and (
                    wanted is None or wanted in found["events"]
                ):
                    await call.send(item)
        finally:
            self._streams.remove(stream)

    async def _ReportSent(self, call: Call) -> Json:
        key = call.parameters["key"]
        self.reports.append(key)
        self.pending = [delivery for delivery in self.pending if delivery["key"] != key]
        return {}

    async def _StopTurn(self, call: Call) -> Json:
        self.stops += 1
        event = list(self.messages)[-1] if self.messages else None
        if self.stop_answered:
            self._push([reply("stopped", event=event, kind="notice"), activity("idle", event=event)])
        return {"stopped": event is not None}

    def _push(self, items: Any) -> None:
        for item in items:
            if "delivery" in item:
                self.pending.append(item["delivery"])
            for _, queue in self._streams:
                queue.put_nowait(item)


def echo(message: Json) -> list[Json]:
    """Answer as the echo provider does."""
    event, chat = message["event"], message["chat"]
    return [
        activity("thinking", event=event, chat=chat),
        reply(f"echo: {message['text']}", event=event, chat=chat),
        activity("idle", event=event, chat=chat),
    ]


def activity(kind: str, text: str = "", *, event: str | None, chat: str = "berta") -> Json:
    return {
        "activity": {
            "chat": chat,
            "thread": "",
            "agent": "berta",
            "kind": kind,
            "text": text,
            "events": [event] if event else [],
        }
    }


_keys = iter(range(1 << 30))


def reply(
    text: str, *, event: str | None, chat: str = "berta", kind: str = "reply", key: str | None = None
) -> Json:
    return {
        "delivery": {
            "key": key or f"k{next(_keys)}",
            "chat": chat,
            "thread": "",
            "agent": "berta",
            "kind": kind,
            "text": text,
            "inReplyTo": event,
            "events": [event] if event else [],
            "partsSent": 0,
        }
    }


def _listen(path: Path) -> socket.socket:
    path.parent.mkdir(parents=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    listener.bind(str(path))
    listener.listen()
    return listener
