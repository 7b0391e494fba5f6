"""The approval commands: what an agent may do only if a person says so."""

from __future__ import annotations

import base64
import time
from argparse import Namespace

from nanoclawd import limits
from nanoclawd.cli import control, output
from nanoclawd.cli.parser import UsageError
from nanoclawd.cli.text import cut, one_line, visible
from nanoclawd.wire import Json

URL_CELLS = 60  #: of a URL in a list
DENIAL_S = int(limits.DENIAL_S)


def _what(approval: Json) -> str:
    request, question = approval["request"], approval["question"]
    if (action := approval["action"]) is not None:
        return cut(f"{action['action']} {one_line(action['payload'])}", URL_CELLS)
    if question is not None:
        return cut(f"{question['user']} in {question['number']}: {one_line(question['text'])}", URL_CELLS)
    if request is None:
        return "(changed by somebody)"
    return cut(f"{request['method']} {one_line(request['url'])}", URL_CELLS)


def _time_left(approval: Json) -> str:
    if approval["state"] not in ("pending", "allowed", "denied") or approval["scope"] == "always":
        return ""
    left = approval["expiresAt"] - time.time()
    return output.duration(left) if left > 0 else "over"


_COLUMNS: output.Fields = {
    "APPROVAL": "id",
    "STATE": "state",
    "FOR": "scope",
    "ASKED": "askedAt",
    "LEFT": _time_left,
    "AGENT": "agent",
    "CHAT": "chat",
    "WHAT": _what,
    "BY": "decidedBy",
}


def approval_list(options: Namespace) -> None:
    """By default those that wait."""
    found = control.approvals(options.AGENT, None if options.all else "pending")
    empty = "There are no approvals." if options.all else "Nothing waits for your answer."
    output.say_list(options, "approvals", found, _COLUMNS, empty)


def approval_show(options: Namespace) -> None:
    reply = control.call("ShowApproval", {"id": options.APPROVAL})
    if options.json:
        return output.say_json(reply)
    approval, request = reply["approval"], reply["approval"].pop("request")
    question, action = approval.pop("question"), approval.pop("action")
    time_left = _time_left(approval)
    output.say_document(approval)
    if time_left:
        output.say_field("Time left", time_left)
    if question is not None:
        output.say("")
        output.say_field("Chat", f"{question['number']}, called {one_line(question['title']) or 'nothing'}")
        output.say_field("Account", question["user"])
        output.say_field("Calls itself", one_line(question["name"]) or "nothing")
        output.say_field("Wrote", _marked(question["text"]))
        _say_choices(reply)
        return None
    if action is not None:
        output.say("")
        output.say_field("Would", action["what"])
        output.say_field("Action", f"{action['action']}{_marked(action['payload'])}")
        output.say_field("Allowed by", f"{len(action['allowedBy'])} of {action['needed']} who are needed")
        if action["outcome"]:
            output.say_field("Outcome", one_line(action["outcome"]))
        _say_choices(reply)
        return None
    if request is None:
        output.say("\nSomebody has changed what was asked for: its hash is not the one above.")
        return None
    output.say("")
    output.say_field("Method", request["method"])
    output.say_field("Host", f"{request['host']} port {request['port']}")
    if request["way"] == "tunnel":
        output.say_field(
            "URL", f"{request['url']}, of which nothing else can be seen: it is a tunnel (https)"
        )
    else:
        output.say_field("URL", one_line(request["url"]))
        for header in request["headers"]:
            output.say_field("Header", one_line(f"{header['name']}: {header['value']}"))
        output.say_field("Body", _body(request))
    _say_choices(reply)
    return None


def _say_choices(reply: Json) -> None:
    if reply["approval"]["state"] == "pending":
        output.say_field("Why", reply["why"])
        output.say("\nWhat an answer does:")
        for choice in reply["choices"]:
            output.say_field(f"{choice['answer']} --{choice['scope']}", choice["what"])


def _body(request: Json) -> str:
    body = base64.b64decode(request["body"])
    if not body:
        return "none"
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return f"{len(body)} bytes, no text: 'nanoclawctl approval show --json' has them in base64"
    return f"{len(body)} bytes{_marked(text)}"


def _marked(text: str) -> str:
    """Return a text of somebody's with a mark before each line, since these could look like ours."""
    return "\n  | ".join(["", *visible(text).split("\n")])


def approval_allow(options: Namespace) -> None:
    _answer(options, "allow", "once")


def approval_deny(options: Namespace) -> None:
    _answer(options, "deny", "for")


def _answer(options: Namespace, answer: str, default: str) -> None:
    """Answer what is there under that id now: the router compares the hash."""
    seconds = getattr(options, "for")
    given = {"once": options.once, "always": options.always, "for": seconds is not None}
    named = [scope for scope, is_given in given.items() if is_given] or [default]
    if len(named) > 1:
        raise UsageError("--once, --always and --for exclude each other")
    (scope,) = named
    shown = control.call("ShowApproval", {"id": options.APPROVAL})["approval"]
    if shown["question"] is not None and not any(given.values()):
        scope = "always"
    if shown["action"] is not None and not any(given.values()):
        scope = "once"
    if scope == "for" and seconds is None:
        seconds = DENIAL_S
    reply = control.call(
        "AnswerApproval",
        {
            "id": shown["id"],
            "sha256": shown["sha256"],
            "answer": answer,
            "scope": scope,
            "seconds": seconds,
        },
    )
    output.done(options, reply, _told(reply, answer, scope))


def _told(reply: Json, answer: str, scope: str) -> str:
    approval = reply["approval"]
    until = f"until {output.when(approval['expiresAt'])}"
    words = {"once": "this once", "for": until, "always": f"by the rule '{reply['rule']}'"}[scope]
    is_what = "allowed" if answer == "allow" else "denied"
    if approval["question"] is not None:
        return f"{approval['id']} is {is_what}."
    if (action := approval["action"]) is not None:
        if approval["state"] == "pending":
            return (
                f"{approval['id']} is allowed by {len(action['allowedBy'])} of {action['needed']}: it waits."
            )
        outcome = f": {one_line(action['outcome'])}" if action["outcome"] else ""
        return f"{approval['id']} of '{approval['agent']}' is {is_what}{outcome}."
    done = f"{approval['id']} of '{approval['agent']}' is {is_what} {words}"
    if answer == "deny":
        return f"{done}."
    if reply["sent"]:
        return f"{done}: it waited, and goes on."
    again = "" if scope != "once" else f" {until}"
    return f"{done}. It does not wait any more: the agent has to ask for it again{again}."
