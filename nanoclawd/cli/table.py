"""The table of all commands: parser, help and completion are made from it, the man page is tested by it."""

from __future__ import annotations

from dataclasses import dataclass

PROGRAM = "nanoclawctl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One option, or one positional argument if its name has no dash."""

    name: str  #: "--model", or "NAME"
    help: str
    short: str = ""  #: "-f"
    metavar: str = ""  #: what the value is called; "" is a switch without value
    kind: str = "text"  #: text, count, seconds, mount; how parser.py reads the value
    needed: bool = True  #: positional arguments only
    repeat: bool = False
    default: object = None
    choices: tuple[str, ...] = ()
    complete: str = ""  #: agents, files or directories

    @property
    def positional(self) -> bool:
        return not self.name.startswith("-")


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    words: tuple[str, ...]  #: noun and verb, or the noun alone
    help: str  #: one line
    run: str  #: "module:function" in this package, imported only when the command runs
    options: tuple[Option, ...] = ()
    more: str = ""  #: a paragraph for --help

    @property
    def name(self) -> str:
        return " ".join(self.words)


NOUNS = {
    "agent": "configure, start and stop agents",
    "session": "look at sessions: one agent in one chat",
    "image": "make the image that agents run in",
    "secret": "keep the credentials that the gateway uses",
}

JSON = Option(name="--json", help="print one JSON document; an error is one too, on stderr")
_AGENT = Option(name="AGENT", help="name of the agent", complete="agents")
_CHAT = Option(name="--chat", metavar="CHAT", help="use another conversation with the same agent")
_AGENT_LOGS = (
    Option(name="--follow", short="-f", help="go on with new lines as they come"),
    Option(name="--lines", short="-n", metavar="N", kind="count", default=100, help="show the last N lines"),
)
_AGENT_KEYS = (
    Option(name="--description", metavar="TEXT", help="one line for people"),
    Option(name="--provider", metavar="NAME", help="who runs the model: anthropic, echo or a skill's"),
    Option(name="--model", metavar="MODEL", help="model of the provider; empty for its default"),
    Option(name="--image", metavar="IMAGE", help="container image"),
    Option(
        name="--instructions",
        metavar="FILE",
        complete="files",
        help="file with instructions; - is stdin",
    ),
    Option(
        name="--idle-seconds",
        metavar="N",
        kind="seconds",
        help="seconds without work until a container stops",
    ),
    Option(name="--memory-max", metavar="SIZE", help="memory limit as in MemoryMax=, e.g. 1G"),
    Option(name="--tasks-max", metavar="N", kind="count", help="limit of processes and threads"),
    Option(name="--cpu-quota", metavar="PERCENT", help="CPU limit, e.g. 150%%; empty for none"),
    Option(
        name="--mount",
        metavar="SOURCE:TARGET[:rw]",
        kind="mount",
        repeat=True,
        complete="files",
        help="show a file or directory to the agent, read-only unless :rw; may be repeated",
    ),
)

COMMANDS: tuple[Command, ...] = (
    Command(
        words=("status",),
        help="show what runs, what waits, and whether the sandboxes are active",
        run="status:run",
        options=(JSON,),
    ),
    Command(
        words=("doctor",),
        help="check what NanoClaw needs, and say what to do about what is missing",
        run="doctor:run",
        options=(JSON, Option(name="--floor", help="only what must be there before the installation")),
        more="Works without the daemon. Fails if something that is needed is missing.",
    ),
    Command(words=("reload",), help="read all configuration again", run="status:reload", options=(JSON,)),
    Command(
        words=("logs",),
        help="show the journal of the daemons, or of one agent",
        run="programs:logs",
        options=(
            Option(name="AGENT", needed=False, complete="agents", help="only this agent"),
            *_AGENT_LOGS,
        ),
    ),
    Command(
        words=("chat",),
        help="talk to an agent in this terminal",
        run="chat:run",
        options=(_AGENT, _CHAT),
        more="Ctrl-C stops what the agent is doing; at the prompt, Ctrl-D leaves. "
        "A line that ends in a backslash goes on in the next one.",
    ),
    Command(
        words=("send",),
        help="send one message to an agent",
        run="send:run",
        options=(
            _AGENT,
            Option(name="TEXT", needed=False, help="the message; - or nothing reads it from stdin"),
            _CHAT,
            Option(name="--wait", help="wait for the reply and print it"),
            Option(
                name="--timeout",
                metavar="SECONDS",
                kind="seconds",
                default=600,
                help="with --wait: give up after so long; 0 never does (default: 600)",
            ),
            JSON,
        ),
    ),
    Command(
        words=("agent", "add"), help="add an agent", run="agents:add", options=(_AGENT, *_AGENT_KEYS, JSON)
    ),
    Command(words=("agent", "list"), help="list all agents", run="agents:list_", options=(JSON,)),
    Command(words=("agent", "show"), help="show one agent", run="agents:show", options=(_AGENT, JSON)),
    Command(
        words=("agent", "set"),
        help="change an agent; what is not named stays",
        run="agents:set_",
        options=(
            _AGENT,
            *_AGENT_KEYS,
            Option(name="--no-mounts", help="take all mounts away; --mount replaces them"),
            JSON,
        ),
    ),
    Command(
        words=("agent", "remove"),
        help="remove an agent; its workspace goes to the trash",
        run="agents:remove",
        options=(
            _AGENT,
            Option(name="--purge", help="delete the workspace too"),
            Option(name="--yes", short="-y", help="do not ask"),
            JSON,
        ),
    ),
    Command(
        words=("agent", "start"),
        help="let a stopped agent work again",
        run="agents:start",
        options=(_AGENT, JSON),
    ),
    Command(
        words=("agent", "stop"),
        help="stop an agent until it is started again; its messages wait",
        run="agents:stop",
        options=(_AGENT, JSON),
    ),
    Command(
        words=("agent", "restart"),
        help="stop an agent's containers, and start those that have work",
        run="agents:restart",
        options=(_AGENT, JSON),
    ),
    Command(
        words=("agent", "logs"),
        help="show the journal of an agent",
        run="programs:logs",
        options=(_AGENT, *_AGENT_LOGS),
    ),
    Command(
        words=("agent", "shell"),
        help="open a shell in a running container of the agent",
        run="programs:shell",
        options=(
            _AGENT,
            Option(name="--session", metavar="SESSION", help="which one, if several run"),
        ),
    ),
    Command(
        words=("session", "list"),
        help="list sessions, of one agent or of all",
        run="sessions:list_",
        options=(
            Option(name="AGENT", needed=False, complete="agents", help="only of this agent"),
            JSON,
        ),
    ),
    Command(
        words=("image", "build"),
        help="build the agent image",
        run="image:build",
        options=(
            Option(name="--base", metavar="IMAGE", help="base image, in place of the Containerfile's"),
            Option(
                name="--base-directory",
                metavar="DIRECTORY",
                complete="directories",
                help="directory made by agent-image/make-base: a base and packages without network",
            ),
            Option(name="--image", metavar="IMAGE", help="name of the result"),
            JSON,
        ),
    ),
    Command(
        words=("secret", "set"),
        help="store a secret; it is asked for, or read from stdin",
        run="secret_command:set_",
        options=(Option(name="NAME", help="e.g. anthropic"), JSON),
    ),
    Command(
        words=("secret", "list"),
        help="list secrets by name; values are never shown",
        run="secret_command:list_",
        options=(JSON,),
    ),
    Command(
        words=("secret", "remove"),
        help="remove a secret",
        run="secret_command:remove",
        options=(
            Option(name="NAME", help="as 'secret list' shows it"),
            Option(name="--yes", short="-y", help="do not ask"),
            JSON,
        ),
    ),
    Command(
        words=("completion",),
        help="print a script for the completion of a shell",
        run="completion:run",
        options=(Option(name="SHELL", choices=("bash", "zsh", "fish"), help="bash, zsh or fish"),),
    ),
    Command(words=("version",), help="print the version", run="version:run", options=(JSON,)),
)

#: For completion scripts; no promise to anybody.
INTERNAL = (Command(words=("_agents",), help="print the names of agents", run="completion:agents"),)
