"""The chat, person, member and pair commands: who may talk to which agent where."""

from __future__ import annotations

from argparse import Namespace
from functools import partial

from nanoclawd.cli import control, output
from nanoclawd.cli.parser import UsageError
from nanoclawd.cli.text import cut, one_line
from nanoclawd.ids import PERSON_NAME
from nanoclawd.wire import Json

TEXT_CELLS = 60  #: of a text in a list


def _standing(standing: Json) -> str:
    if standing["agent"] is not None:
        return f"{standing['role']} of {standing['agent']}"
    return standing["role"] if standing["chat"] is None else f"{standing['role']} in {standing['chat']}"


_CHATS: output.Fields = {
    "CHAT": "number",
    "STATE": "state",
    "CHANNEL": "channel",
    "ID": "chat",
    "KIND": "kind",
    "AGENTS": lambda chat: ", ".join(wiring["agent"] for wiring in chat["wirings"]),
    "HELD": "held",
    "DROPPED": "dropped",
    "TITLE": lambda chat: cut(one_line(chat["title"]), TEXT_CELLS),
}
_WIRINGS: output.Fields = {
    "AGENT": "agent",
    "TAKES": lambda wiring: wiring["engagement"],
    "PATTERN": "pattern",
    "STICKY": lambda wiring: f"{wiring['stickySeconds']} s" if wiring["engagement"] == "sticky" else "",
    "PRIORITY": "priority",
    "EXCLUSIVE": lambda wiring: "yes" if wiring["exclusive"] else "",
    "SESSIONS": "sessionMode",
    "ACCESS": "access",
    "CONTEXT": "keepContext",
}
_PEOPLE: output.Fields = {
    "PERSON": "name",
    "ROLES": lambda person: ", ".join(map(_standing, person["standings"])),
    "ACCOUNTS": lambda person: ", ".join(
        f"{each['user']} ({each['channel']}, {each['how']})" for each in person["identities"]
    ),
}
_HELD: output.Fields = {
    "WAITS SINCE": lambda message: output.when(message["receivedAt"]),
    "ACCOUNT": "sender",
    "CALLS ITSELF": lambda message: cut(one_line(message["senderName"]), TEXT_CELLS),
    "TEXT": lambda message: cut(one_line(message["text"]), TEXT_CELLS),
}


def chat_list(options: Namespace) -> None:
    chats = [reply["chat"] for reply in control.list_all("ListChats")]
    output.say_list(options, "chats", chats, _CHATS, "There are no chats of platforms.")


def chat_show(options: Namespace) -> None:
    found = control.call("ShowChat", {"number": options.NUMBER})
    if options.json:
        return output.say_json(found)
    chat = found["chat"]
    wirings = chat.pop("wirings")
    output.say_document(chat)
    for documents, columns in ((wirings, _WIRINGS), (found["people"], _PEOPLE), (found["held"], _HELD)):
        if documents:
            output.say("")
            output.say_table(documents, columns)
    if found["held"]:
        number = chat["number"]
        output.talk(
            f"\nLet somebody in: 'nanoclawctl member add ACCOUNT {number}'; "
            f"or not: 'nanoclawctl member deny ACCOUNT {number}'."
            if wirings
            else f"\nNo agent listens there: 'nanoclawctl chat wire {number} AGENT', "
            f"or 'nanoclawctl chat block {number}'."
        )


def chat_wire(options: Namespace) -> None:
    reply = control.call(
        "WireChat",
        {
            "number": options.NUMBER,
            "agent": options.AGENT,
            "engagement": options.engage or ("pattern" if options.pattern else None),
            "pattern": options.pattern,
            "stickySeconds": options.sticky,
            "priority": options.priority,
            "exclusive": options.exclusive,
            "sessionMode": options.sessions,
            "access": options.access,
            "keepContext": options.context,
        },
    )
    output.done(options, reply, f"'{options.AGENT}' listens in chat {options.NUMBER}.")


def chat_unwire(options: Namespace) -> None:
    reply = control.call("UnwireChat", {"number": options.NUMBER, "agent": options.AGENT})
    left = ", ".join(wiring["agent"] for wiring in reply["chat"]["wirings"])
    output.done(options, reply, f"In chat {options.NUMBER} listens: {left or 'nobody'}.")


def chat_block(options: Namespace) -> None:
    reply = control.call("BlockChat", {"number": options.NUMBER})
    output.done(options, reply, f"Nothing more is taken from chat {options.NUMBER}.")


def person_list(options: Namespace) -> None:
    people = [reply["person"] for reply in control.list_all("ListPeople")]
    output.say_list(options, "people", people, _PEOPLE, "There are no people.")


def person_link(options: Namespace) -> None:
    account = {"channel": options.CHANNEL, "user": options.USER}
    reply = control.call("LinkPerson", {"person": options.PERSON, **account, "unlink": options.unlink})
    words = f"is not {options.PERSON}'s any more" if options.unlink else f"is {options.PERSON}'s"
    output.done(options, reply, f"'{options.USER}' {words}.")


def person_role(options: Namespace) -> None:
    role = None if options.ROLE == "none" else options.ROLE
    _say(options, control.call("SetRole", {"person": options.PERSON, "role": role, "agent": options.agent}))


def _member(role: str | None, options: Namespace) -> None:
    """Set what somebody is in a chat or to an agent; an account that is nobody's becomes a person by it."""
    agent = getattr(options, "agent", None)
    if (options.NUMBER is None) == (agent is None):
        raise UsageError("say where: the number of a chat, or --agent", hint="one of the two")
    where = {"agent": agent, "chat": options.NUMBER}
    who = options.WHO
    if options.account or not PERSON_NAME.fullmatch(who):
        if options.NUMBER is None:
            hint = f"'nanoclawctl person link NAME CHANNEL {who}' says whose it is"
            raise UsageError(f"'{who}' is an account: an agent's members are named", hint=hint)
        channel = control.call("ShowChat", {"number": options.NUMBER})["chat"]["channel"]
        account = {"channel": channel, "user": who}
        if role is not None:
            return _say(options, control.call("SetRoleOf", {**account, "role": role, **where}))
        who = _person_of(account)
    _say(options, control.call("SetRole", {"person": who, "role": role, **where}))


def _person_of(account: Json) -> str:
    for reply in control.list_all("ListPeople"):
        accounts = ({key: each[key] for key in account} for each in reply["person"]["identities"])
        if account in accounts:
            return str(reply["person"]["name"])
    return str(account["user"])  # the router says that there is nobody


member_add = partial(_member, "member")
member_deny = partial(_member, "denied")
member_remove = partial(_member, None)


def _say(options: Namespace, reply: Json) -> None:
    person = reply["person"]
    roles = ", ".join(map(_standing, person["standings"]))
    output.done(options, reply, f"{person['name']}: {roles or 'nothing'}.")


def pair(options: Namespace) -> None:
    person = options.PERSON or "owner"
    reply = control.call("Pair", {"channel": options.CHANNEL, "person": person})
    if options.json:
        return output.say_json(reply)
    output.say(reply["code"])
    output.talk(
        f"Send this as a message by the account that is {person}'s, in any chat that the adapter of "
        f"'{options.CHANNEL}' sees, within {output.duration(reply['seconds'])}."
    )
