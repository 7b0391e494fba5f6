"""The table of all commands: parser, help and completion are made from it, the man page is tested by it."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass, replace

PROGRAM = "nanoclawctl"


def text(value: str) -> str:
    """What is typed ends up in JSON, which is UTF-8 without NUL."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ArgumentTypeError("is not UTF-8") from None
    return value


def count(value: str) -> int:
    if not value.isascii() or not value.isdigit() or not 0 < int(value[:12]) < 1 << 31:
        raise ArgumentTypeError(f"'{value[:32]}' is not a number from 1 on")
    return int(value)


def limit(value: str) -> int:
    return -1 if value == "none" else 0 if value == "0" else count(value)


def dollars(value: str) -> int:
    """An amount like 2.50, or none; returns millionths of a dollar, or -1."""
    from nanoclawd import prices  # slow to import
    from nanoclawd.tomltable import BadValue

    if value == "none":
        return -1
    try:
        return prices.dollars(float(value))
    except (ValueError, BadValue):
        raise ArgumentTypeError(f"'{value[:32]}' is no amount of dollars like 2.50, and not none") from None


def seconds(value: str) -> int:
    return 0 if value == "0" else count(value)


def mount(value: str) -> dict[str, object]:
    """SOURCE:TARGET[:rw]; the source is made absolute here, since the router runs elsewhere."""
    from os.path import abspath, expanduser

    source, _, rest = text(value).partition(":")
    target, _, mode = rest.partition(":")
    if not source or not target.startswith("/") or mode not in ("", "ro", "rw"):
        raise ArgumentTypeError(f"'{value[:128]}' is not SOURCE:/TARGET, SOURCE:/TARGET:ro or …:rw")
    return {"source": abspath(expanduser(source)), "target": target, "readOnly": mode != "rw"}


def setting(value: str) -> tuple[str, object]:
    """KEY=VALUE; a value that is none of TOML, such as a number or true, is a text."""
    import tomllib

    key, equals, rest = text(value).partition("=")
    if not equals or not key.replace("-", "").replace("_", "").isalnum() or not key.isascii():
        raise ArgumentTypeError(f"'{key[:64]}' is not KEY=VALUE")
    try:
        return key, tomllib.loads(f"value = {rest}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return key, rest


def size(value: str) -> int:
    number, unit = (value[:-1], value[-1:]) if value[-1:] in "KMGT" else (value, "")
    return count(number) << 10 * " KMGT".index(unit or " ")


def span(value: str) -> int:
    """90s, 30m, 1h or 7d; returns seconds."""
    unit = {"s": 1, "m": 60, "h": 3600, "d": 86_400}.get(value[-1:])
    if unit is None:
        raise ArgumentTypeError(f"'{value[:32]}' is not a time like 30m, 1h or 7d")
    return count(value[:-1]) * unit


def moment(value: str) -> float:
    """SPAN ago as in 30m, 12h or 7d, or a time of the person's clock; returns seconds since 1970."""
    from datetime import datetime
    from time import time

    unit = {"m": 60, "h": 3600, "d": 86_400}.get(value[-1:])
    if unit:
        return time() - count(value[:-1]) * unit
    try:
        return datetime.fromisoformat(value).timestamp()
    except (ValueError, OverflowError):
        message = f"'{value[:32]}' is neither 30m, 12h, 7d nor a time like 2026-11-22T08:00"
        raise ArgumentTypeError(message) from None


@dataclass(frozen=True, slots=True)
class Option:
    """One option, or one positional argument if its name has no dash."""

    name: str  #: "--model", or "NAME"
    help: str
    metavar: str = ""  #: what the value is called; "" is a switch without value
    read: Callable[[str], object] = text
    short: str = ""  #: "-f"
    needed: bool = True  #: positional arguments only
    repeat: bool = False
    default: object = None
    choices: tuple[str, ...] = ()
    complete: str = ""  #: agents, letters, files or directories
    key: str = ""  #: in OPTIONS, where commands have different options of one name

    @property
    def positional(self) -> bool:
        return not self.name.startswith("-")

    def parse(self, value: str) -> object:
        """Return what is meant by `value`. Raises ArgumentTypeError."""
        if self.choices and value not in self.choices:
            raise ArgumentTypeError(f"'{value[:32]}' is none of {', '.join(self.choices)}")
        return self.read(value)


@dataclass(frozen=True, slots=True)
class Command:
    """A command; "agent list" is done by agent_list() in the module that MODULES names, or else agent.py."""

    name: str  #: noun and verb, or the noun alone
    takes: str  #: names of OPTIONS; a positional argument in brackets may be left out
    help: str  #: one line
    more: str = ""  #: a paragraph for --help

    @property
    def module(self) -> str:
        return MODULES.get(self.name) or MODULES.get(self.words[0], self.words[0])

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(self.name.split())

    @property
    def options(self) -> tuple[Option, ...]:
        return tuple(
            replace(OPTIONS[name.strip("[]")], needed=name[0] != "[") for name in self.takes.split()
        )


def number(value: str) -> int:
    return -count(value[1:]) if value.startswith("-") else seconds(value)


def yes_or_no(value: str) -> bool:
    return value == "yes"


METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
MESSAGE_STATES = ("queued", "leased", "answered", "stopped", "dead")
ENGAGEMENTS = ("every", "mention", "pattern", "sticky")
AUDIT_KINDS = ("request", "control", "trail")
USAGE_BY = ("agent", "session", "day")

#: By the name of a command, or its first word; imported only when it runs.
MODULES = {
    **dict.fromkeys(("chat list", "chat show", "chat wire", "chat unwire", "chat block"), "people"),
    **dict.fromkeys(("person", "member", "pair"), "people"),
    "deadletter": "message",
    "budget": "usage",
    **dict.fromkeys(("backup", "restore"), "database"),
    **dict.fromkeys(("reload", "session", "start", "stop", "version"), "status"),
}

_OPTIONS = (
    Option("AGENT", "name of the agent", complete="agents"),
    Option("TEXT", "the message; - or nothing reads it from stdin"),
    Option("NAME", "name of the secret, e.g. anthropic"),
    Option("ID", "id of a message or key of a delivery, or its beginning", complete="letters"),
    Option("APPROVAL", "id of an approval, or its beginning", complete="approvals"),
    Option("LETTER", "the same; may be repeated", repeat=True, complete="letters"),
    Option("FILE", "the backup", complete="files"),
    Option("SHELL", "bash, zsh or fish", choices=("bash", "zsh", "fish")),
    Option("--json", "print one JSON document; an error is one too, on stderr"),
    Option("--all", "each that there is"),
    Option("--state", "only those in one state", "STATE", choices=MESSAGE_STATES),
    Option("--once", "this request only"),
    Option("--always", "by a rule in the agent's file"),
    Option("--for", "for a while: 30m, 1h or 7d", "SPAN", span),
    Option(
        "--unknown", "what becomes of what no rule decides: deny or ask", "WHAT", choices=("deny", "ask")
    ),
    Option("--limit", "at most N of them, the newest", "N", count, default=50),
    Option(
        "--since", "only from then on: 30m, 12h or 7d ago, or a time like 2026-11-22T08:00", "TIME", moment
    ),
    Option("--by", "one line for each of these", "WHAT", choices=USAGE_BY, default="agent"),
    Option("--agent", "only of this agent", "AGENT", complete="agents"),
    Option("--kind", "the adapter's program", "KIND", complete="adapters", key="--kind_of_adapter"),
    Option("--kind", "only rows of one kind", "KIND", choices=AUDIT_KINDS),
    Option("--yes", "do not ask", short="-y"),
    Option("--floor", "only what must be there before the installation"),
    Option("--inside", "what the agent's own programs wrote, which the journal keeps apart"),
    Option("--follow", "go on with new lines as they come", short="-f"),
    Option("--lines", "show the last N lines", "N", count, short="-n", default=100),
    Option("--chat", "use another conversation with the same agent", "CHAT"),
    Option("--file", "send a file too; may be repeated", "FILE", repeat=True, complete="files"),
    Option("--wait", "wait for the reply and print it"),
    Option("--timeout", "with --wait: give up after so long; 0 never does", "SECONDS", seconds, default=600),
    Option("--description", "one line for people", "TEXT"),
    Option("--provider", "who runs the model: anthropic, echo or a skill's", "NAME"),
    Option("--model", "model of the provider; empty for its default", "MODEL"),
    Option("--image", "name of the container image", "IMAGE"),
    Option("--instructions", "file with instructions; - is stdin", "FILE", complete="files"),
    Option("--idle-seconds", "seconds without work until a container stops", "N", seconds),
    Option("--memory-max", "memory limit as in MemoryMax=, e.g. 1G", "SIZE"),
    Option("--tasks-max", "limit of processes and threads", "N", count),
    Option("--cpu-quota", "CPU limit, e.g. 150%; empty for none", "PERCENT"),
    Option("--runtime", "runtime of its containers: krun or runsc; empty for Podman's own", "NAME"),
    Option(
        "--mount",
        "show a file or directory to the agent, read-only unless :rw; may be repeated",
        metavar="SOURCE:TARGET[:rw]",
        read=mount,
        repeat=True,
        complete="files",
    ),
    Option("--no-mounts", "take all mounts away; --mount replaces them"),
    Option("TARGET", "HOST, HOST:PORT, *.HOST, http://HOST:PORT/PATH or /r/ROUTE/PATH"),
    Option("URL", "what would be asked for: https://…, http://… or /r/ROUTE/…"),
    Option("--method", "method of HTTP; may be repeated", "METHOD", repeat=True, choices=METHODS),
    Option("--address", "also if it leads to this network; may be repeated", "NETWORK", repeat=True),
    Option("--max-up", "bytes that one request or tunnel may send, e.g. 10M", "SIZE", size),
    Option("--max-down", "bytes that one may get", "SIZE", size),
    Option("--per-minute", "how many there may be in a minute", "N", count),
    Option("--time-limit", "how long one may take", "SECONDS", count),
    Option("NUMBER", "number of a chat, as 'chat list' shows it", read=count, complete="chats"),
    Option("DESTINATION", "name of a chat, as the agent knows it"),
    Option("PERSON", "name of somebody, as you call them", complete="people"),
    Option("WHO", "name of a person, or an account of the chat's channel", complete="people"),
    Option("CHANNEL", "name of a channel, e.g. matrix", complete="channels"),
    Option("SETTING", "KEY=VALUE, for the adapter; may be repeated", read=setting, repeat=True),
    Option("USER", "the platform's id of an account, e.g. @ada:example.org"),
    Option("ROLE", "owner, admin, or none", choices=("owner", "admin", "none")),
    Option("CONVERSATION", "name of a session, as 'session list' shows it"),
    Option(
        "--engage", "which messages the agent takes, beside what mentions it", "WHEN", choices=ENGAGEMENTS
    ),
    Option("--pattern", "with --engage pattern: what fits this; see PATTERNS in nanoclawctl(1)", "PATTERN"),
    Option("--sticky", "with --engage sticky: so long after a mention", "SECONDS", count),
    Option("--priority", "who of several agents comes first; the highest does", "N", number),
    Option("--exclusive", "what it takes is for no other agent", "YES", yes_or_no, choices=("yes", "no")),
    Option(
        "--sessions", "what of the chat is one conversation", "MODE", choices=("chat", "thread", "agent")
    ),
    Option(
        "--access", "who may talk to it beside its members", "ACCESS", choices=("strict", "ask", "public")
    ),
    Option("--context", "how many messages that are not for it are told with the next", "N", seconds),
    Option("--agent", "the agent that it is about", "AGENT", complete="agents"),
    Option("--account", "it is an account, though it looks like a name"),
    Option("--unlink", "the account is nobody's any more"),
    Option("--purge", "delete what goes to the trash"),
    Option("--tokens-per-day", "tokens of all sessions in a day, or none for no limit", "N", limit),
    Option("--tokens-per-session", "tokens of each session, or none", "N", limit),
    Option("--money-per-day", "dollars of all sessions in a day, as in 2.50, or none", "DOLLARS", dollars),
    Option("--money-per-session", "dollars of each session, or none", "DOLLARS", dollars),
    Option("--requests-per-minute", "calls of models by all sessions, or none", "N", limit),
    Option("ACTION", "an action of the guard's table, or approvals"),
    Option("ANSWER", "allow, hold or deny, a number of approvals, or default"),
    Option("--session", "which one, if several run", "SESSION"),
    Option("--base", "base image, in place of the Containerfile's", "IMAGE"),
    Option(
        "--base-directory",
        "directory made by agent-image/make-base: a base and packages without network",
        "DIRECTORY",
        complete="directories",
    ),
)
OPTIONS = {option.key or option.name: option for option in _OPTIONS}

NOUNS = {
    "agent": "configure, start and stop agents",
    "session": "see to sessions: one agent in one chat",
    "chat": "say which agents listen in which chats of platforms; or talk to an agent here",
    "person": "say who is who, and who may all",
    "destination": "name chats that agents may write to besides their own",
    "member": "say who may talk to agents",
    "channel": "connect platforms on which people talk to agents",
    "message": "look at messages: what became of each",
    "deadletter": "see to messages and deliveries that were given up",
    "policy": "say what an agent may reach through the gateway",
    "approval": "answer what agents may do only if you say so",
    "budget": "say what an agent may spend at its models",
    "guard": "say what an agent may have the router do, and what waits for people",
    "audit": "see what agents asked for at the gateway, and what was changed here",
    "image": "make the image that agents run in",
    "secret": "keep the credentials that the gateway uses",
}

_KEYS = (
    "--description --provider --model --image --instructions --idle-seconds --memory-max --tasks-max "
    "--cpu-quota --runtime --unknown --mount"
)
_BUDGET = "--tokens-per-day --tokens-per-session --money-per-day --money-per-session --requests-per-minute"
COMMANDS = (
    Command("status", "--json", "show what runs, what waits, and whether the sandboxes are active"),
    Command(
        "doctor",
        "--floor --json",
        "check what NanoClaw needs, and say what to do about what is missing",
        more="Works without the daemon. Fails if something that is needed is missing.",
    ),
    Command(
        "selftest",
        "[AGENT] --json",
        "try to get out of an agent's container, and say what held each attempt",
        more="A temporary agent does it; with AGENT it is like that one. Fails if something got through.",
    ),
    Command("stop", "--all --json", "stop all agents at once, until they are started; their messages wait"),
    Command("start", "--all --json", "let all agents work again after 'stop --all'"),
    Command(
        "usage",
        "--by --since --agent --json",
        "show what agents have used of models, what that cost, and what is left of their budgets",
        more="--since counts whole days.",
    ),
    Command("reload", "--json", "read all configuration again"),
    Command(
        "logs", "[AGENT] --inside --follow --lines --json", "show the journal of the daemons, or of an agent"
    ),
    Command("chat list", "--json", "list the chats of platforms"),
    Command("chat show", "NUMBER --json", "show a chat: who is what there, which agents listen, what waits"),
    Command(
        "chat wire",
        "NUMBER AGENT --engage --pattern --sticky --priority --exclusive --sessions --access --context"
        " --json",
        "have an agent listen in a chat, or change how it does",
        more="What is not named stays. At first: mentions, strict, each thread a conversation.",
    ),
    Command("chat unwire", "NUMBER [AGENT] --json", "have an agent, or all, listen no more in a chat"),
    Command("chat block", "NUMBER --json", "take nothing more from a chat; what waits there is dropped"),
    Command("destination list", "[AGENT] --json", "list where agents may send something besides their chat"),
    Command(
        "destination add",
        "AGENT DESTINATION [NUMBER] --json",
        "name a chat that an agent may send something to; without a number, its chat in the terminal",
        more="What it sends there is held for your approval, unless [guard] in its file says otherwise.",
    ),
    Command("destination remove", "AGENT DESTINATION --json", "take such a name away"),
    Command("person list", "--json", "list people, their accounts and roles"),
    Command("person link", "PERSON CHANNEL USER --unlink --json", "say whose an account is"),
    Command("person role", "PERSON ROLE --agent --json", "make somebody an owner, or an admin of agents"),
    Command("member add", "WHO [NUMBER] --agent --account --json", "let somebody talk to agents"),
    Command("member deny", "WHO NUMBER --account --json", "let somebody talk to no agent of a chat"),
    Command("member remove", "WHO [NUMBER] --agent --account --json", "take either back"),
    Command(
        "pair",
        "CHANNEL [PERSON] --json",
        "make a code by which somebody, by default you, proves that an account is theirs",
        more="It is sent as a message by that account, once, within 10 minutes.",
    ),
    Command(
        "channel add",
        "CHANNEL --kind_of_adapter [SETTING] --json",
        "connect a platform: write a channel's file, and start its adapter",
        more="What settings there are, the adapter's documentation says.",
    ),
    Command("channel list", "--json", "list channels, and how each is"),
    Command(
        "channel login",
        "CHANNEL --json",
        "give an adapter its password or token; it is asked for, or read from stdin",
        more="It is stored like a secret, the adapter starts anew, and what it says is printed.",
    ),
    Command("channel status", "CHANNEL --json", "show all that is known of a channel"),
    Command(
        "channel remove",
        "CHANNEL --purge --yes --json",
        "remove a channel with its login; what its adapter had to remember goes to the trash",
        more="Its chats are blocked, and whose its accounts are is forgotten.",
    ),
    Command(
        "chat",
        "AGENT --chat",
        "talk to an agent in this terminal",
        more="Ctrl-C stops what the agent is doing; at the prompt, Ctrl-D leaves. "
        "A line that ends in a backslash goes on in the next one. "
        "Chats of platforms are 'chat list' and others; an agent of such a name is 'chat -- NAME'.",
    ),
    Command("send", "AGENT [TEXT] --chat --file --wait --timeout --json", "send one message to an agent"),
    Command("agent add", f"AGENT {_KEYS} --json", "add an agent"),
    Command("agent list", "--json", "list all agents"),
    Command("agent show", "AGENT --json", "show one agent"),
    Command("agent set", f"AGENT {_KEYS} --no-mounts --json", "change an agent; what is not named stays"),
    Command(
        "agent remove", "AGENT --purge --yes --json", "remove an agent; its workspace goes to the trash"
    ),
    Command("agent start", "AGENT --json", "let a stopped agent work again"),
    Command("agent stop", "AGENT --json", "stop an agent until it is started again; its messages wait"),
    Command("agent restart", "AGENT --json", "stop an agent's containers, and start those that have work"),
    Command("agent logs", "AGENT --inside --follow --lines --json", "show the journal of an agent"),
    Command("agent shell", "AGENT --session", "open a shell in a running container of the agent"),
    Command("session list", "[AGENT] --json", "list sessions, of one agent or of all"),
    Command(
        "session reset",
        "AGENT CONVERSATION --purge --json",
        "have a conversation begin anew; what the agent kept of it goes to the trash",
    ),
    Command(
        "session close",
        "AGENT CONVERSATION --purge --json",
        "the same, and stop what waits for it; it is listed again with its next message",
    ),
    Command("message list", "[AGENT] --state --limit --json", "list the newest messages"),
    Command("message show", "ID --json", "show all that is known of a message, and its deliveries"),
    Command("deadletter list", "--json", "list messages and deliveries that were given up"),
    Command("deadletter show", "ID --json", "show all that is known of a dead letter"),
    Command("deadletter retry", "[LETTER] --all --json", "try dead letters again"),
    Command("deadletter drop", "[LETTER] --all --json", "have done with dead letters: list them no more"),
    Command("policy show", "AGENT --json", "list the rules of an agent; the first that matches decides"),
    Command(
        "policy allow",
        "AGENT TARGET --method --address --max-up --max-down --per-minute --time-limit --json",
        "let an agent reach something, after all rules that it has",
        more="A rule about the same is replaced.",
    ),
    Command(
        "policy deny", "AGENT TARGET --method --json", "deny something to an agent, before all other rules"
    ),
    Command(
        "policy test",
        "AGENT URL --method --json",
        "say whether an agent may ask for something, and which rule decides",
        more="Fails with code 5 if it may not.",
    ),
    Command("approval list", "[AGENT] --all --json", "list what waits for your answer"),
    Command(
        "approval show", "APPROVAL --json", "show all of a request that waits, and what each answer does"
    ),
    Command(
        "approval allow",
        "APPROVAL --once --for --always --json",
        "allow a request, by default once",
        more="--for and --always allow more than this one: 'approval show' says what.",
    ),
    Command(
        "approval deny",
        "APPROVAL --once --for --always --json",
        "deny a request, and for an hour all to its host that no rule decides",
        more="--once denies this one only.",
    ),
    Command(
        "budget set",
        f"AGENT {_BUDGET} --json",
        "change what an agent may spend, from now on; what is not named stays",
        more="Other limits may stand in nanoclaw.toml for all agents; 'usage' shows what is left.",
    ),
    Command(
        "guard show", "[AGENT] --json", "show what an agent may have the router do: the table of actions"
    ),
    Command(
        "guard set",
        "AGENT ACTION ANSWER --json",
        "change a row of that table for an agent, or how many people have to allow what is held",
        more="As in 'guard set demo edit deny', 'guard set demo approvals 2'; default takes it back.",
    ),
    Command(
        "audit list",
        "[AGENT] --since --kind --limit --json",
        "list the newest rows of the audit trail",
        more="Requests of agents at the gateway, changes that a person made, and what befell the trail.",
    ),
    Command(
        "audit verify",
        "--json",
        "check that nobody changed or took out a row of the audit trail",
        more="Fails with code 1 if somebody has, and names the first such row.",
    ),
    Command("audit export", "[AGENT] --since --kind", "print the audit trail, one JSON document a line"),
    Command("backup", "FILE --json", "write a copy of the database to a new file, while everything runs"),
    Command("restore", "FILE --json", "put a backup in the place of a database that was lost"),
    Command("image build", "--base --base-directory --image --json", "build the agent image"),
    Command("secret set", "NAME --json", "store a secret; it is asked for, or read from stdin"),
    Command("secret list", "--json", "list secrets by name; values are never shown"),
    Command("secret remove", "NAME --yes --json", "remove a secret"),
    Command("completion", "SHELL", "print a script for the completion of a shell"),
    Command("version", "--json", "print the version"),
)
