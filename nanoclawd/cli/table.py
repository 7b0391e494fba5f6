"""The table of all commands: parser, help and completion are made from it, the man page is tested by it."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass

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
    complete: str = ""  #: agents, files or directories

    @property
    def positional(self) -> bool:
        return not self.name.startswith("-")


@dataclass(frozen=True, slots=True)
class Command:
    name: str  #: noun and verb, or the noun alone
    help: str  #: one line
    run: str  #: "module:function" in this package, imported only when the command runs
    options: tuple[Option, ...] = ()
    more: str = ""  #: a paragraph for --help

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(self.name.split())


NOUNS = {
    "agent": "configure, start and stop agents",
    "session": "look at sessions: one agent in one chat",
    "image": "make the image that agents run in",
    "secret": "keep the credentials that the gateway uses",
}

JSON = Option("--json", "print one JSON document; an error is one too, on stderr")
YES = Option("--yes", "do not ask", short="-y")
AGENT = Option("AGENT", "name of the agent", complete="agents")
CHAT = Option("--chat", "use another conversation with the same agent", "CHAT")
LOGS = (
    Option("--follow", "go on with new lines as they come", short="-f"),
    Option("--lines", "show the last N lines", "N", count, short="-n", default=100),
)
KEYS = (
    Option("--description", "one line for people", "TEXT"),
    Option("--provider", "who runs the model: anthropic, echo or a skill's", "NAME"),
    Option("--model", "model of the provider; empty for its default", "MODEL"),
    Option("--image", "container image", "IMAGE"),
    Option("--instructions", "file with instructions; - is stdin", "FILE", complete="files"),
    Option("--idle-seconds", "seconds without work until a container stops", "N", seconds),
    Option("--memory-max", "memory limit as in MemoryMax=, e.g. 1G", "SIZE"),
    Option("--tasks-max", "limit of processes and threads", "N", count),
    Option("--cpu-quota", "CPU limit, e.g. 150%%; empty for none", "PERCENT"),
    Option(
        "--mount",
        "show a file or directory to the agent, read-only unless :rw; may be repeated",
        *("SOURCE:TARGET[:rw]", mount),
        repeat=True,
        complete="files",
    ),
)

COMMANDS: tuple[Command, ...] = (
    Command(
        "status", "show what runs, what waits, and whether the sandboxes are active", "status:run", (JSON,)
    ),
    Command(
        "doctor",
        "check what NanoClaw needs, and say what to do about what is missing",
        "doctor:run",
        (JSON, Option("--floor", "only what must be there before the installation")),
        more="Works without the daemon. Fails if something that is needed is missing.",
    ),
    Command("reload", "read all configuration again", "status:reload", (JSON,)),
    Command(
        "logs",
        "show the journal of the daemons, or of one agent",
        "programs:logs",
        (Option("AGENT", "only this agent", needed=False, complete="agents"), *LOGS),
    ),
    Command(
        "chat",
        "talk to an agent in this terminal",
        "chat:run",
        (AGENT, CHAT),
        more="Ctrl-C stops what the agent is doing; at the prompt, Ctrl-D leaves. "
        "A line that ends in a backslash goes on in the next one.",
    ),
    Command(
        "send",
        "send one message to an agent",
        "send:run",
        (
            AGENT,
            Option("TEXT", "the message; - or nothing reads it from stdin", needed=False),
            CHAT,
            Option("--wait", "wait for the reply and print it"),
            Option(
                "--timeout",
                "with --wait: give up after so long; 0 never does (default: 600)",
                *("SECONDS", seconds),
                default=600,
            ),
            JSON,
        ),
    ),
    Command("agent add", "add an agent", "agents:add", (AGENT, *KEYS, JSON)),
    Command("agent list", "list all agents", "agents:list_", (JSON,)),
    Command("agent show", "show one agent", "agents:show", (AGENT, JSON)),
    Command(
        "agent set",
        "change an agent; what is not named stays",
        "agents:set_",
        (AGENT, *KEYS, Option("--no-mounts", "take all mounts away; --mount replaces them"), JSON),
    ),
    Command(
        "agent remove",
        "remove an agent; its workspace goes to the trash",
        "agents:remove",
        (AGENT, Option("--purge", "delete the workspace too"), YES, JSON),
    ),
    Command("agent start", "let a stopped agent work again", "agents:start", (AGENT, JSON)),
    Command(
        "agent stop",
        "stop an agent until it is started again; its messages wait",
        "agents:stop",
        (AGENT, JSON),
    ),
    Command(
        "agent restart",
        "stop an agent's containers, and start those that have work",
        "agents:restart",
        (AGENT, JSON),
    ),
    Command("agent logs", "show the journal of an agent", "programs:logs", (AGENT, *LOGS)),
    Command(
        "agent shell",
        "open a shell in a running container of the agent",
        "programs:shell",
        (AGENT, Option("--session", "which one, if several run", "SESSION")),
    ),
    Command(
        "session list",
        "list sessions, of one agent or of all",
        "status:sessions",
        (Option("AGENT", "only of this agent", needed=False, complete="agents"), JSON),
    ),
    Command(
        "image build",
        "build the agent image",
        "image:build",
        (
            Option("--base", "base image, in place of the Containerfile's", "IMAGE"),
            Option(
                "--base-directory",
                "directory made by agent-image/make-base: a base and packages without network",
                "DIRECTORY",
                complete="directories",
            ),
            Option("--image", "name of the result", "IMAGE"),
            JSON,
        ),
    ),
    Command(
        "secret set",
        "store a secret; it is asked for, or read from stdin",
        "secret:set_",
        (Option("NAME", "e.g. anthropic"), JSON),
    ),
    Command("secret list", "list secrets by name; values are never shown", "secret:list_", (JSON,)),
    Command(
        "secret remove",
        "remove a secret",
        "secret:remove",
        (Option("NAME", "as 'secret list' shows it"), YES, JSON),
    ),
    Command(
        "completion",
        "print a script for the completion of a shell",
        "completion:run",
        (Option("SHELL", "bash, zsh or fish", choices=("bash", "zsh", "fish")),),
    ),
    Command("version", "print the version", "status:version", (JSON,)),
)
