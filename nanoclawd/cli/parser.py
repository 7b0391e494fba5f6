"""The command line, read by the table of commands."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from nanoclawd.cli.table import COMMANDS, NOUNS, PROGRAM, Command, Option
from nanoclawd.errors import NanoclawError


class UsageError(NanoclawError):
    """The command line cannot be understood."""

    code = "usage"


class Help(Exception):
    """The person asked for help: `text` is the answer."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


def parse(arguments: Sequence[str]) -> tuple[Command, Namespace]:
    """Return the command and its arguments. Raises UsageError, Help."""
    command = _find(arguments)
    rest = list(arguments[len(command.words) :])
    end = rest.index("--") if "--" in rest else len(rest)
    if {"--help", "-h"} & {*rest[:end]}:
        raise Help(_make_parser(command, command.options).format_help().rstrip())
    # argparse reads the options alone: it cannot take 'send berta --wait hello', where TEXT is optional.
    flags = [option for option in command.options if not option.positional]
    namespace, values = _make_parser(command, flags).parse_known_args(rest[:end])
    more = f"'{PROGRAM} {command.name} --help' says more"
    for value in values:
        if value.startswith("-") and value != "-":
            name = value.partition("=")[0]
            hint = did_you_mean(name, [option.name for option in flags], more)
            raise UsageError(f"unknown option '{name}'", hint=hint)
    values += rest[end + 1 :]
    for option in command.options:
        if option.positional:
            taken, values = (values, []) if option.repeat else (values[:1], values[1:])
            if option.needed and not taken:
                raise UsageError(f"{option.name} is missing", hint=more)
            try:
                found = [option.parse(value) for value in taken]
            except argparse.ArgumentTypeError as exc:
                raise UsageError(f"{option.name}: {exc}", hint=more) from None
            setattr(namespace, option.name, found if option.repeat else found[0] if found else None)
    if values:
        # Not shown if it may be a value: output is kept in more places than the person thinks of.
        shown = "" if command.words[0] == "secret" else f" '{values[0]}'"
        raise UsageError(f"unknown argument{shown}", hint=more)
    return command, namespace


def did_you_mean(wrong: str, names: Iterable[str], otherwise: str) -> str:
    """Return a hint that ends in the name that is closest to `wrong`, if one is close."""
    from difflib import get_close_matches

    close = get_close_matches(wrong, list(names), n=1)
    return f"{otherwise}; did you mean '{close[0]}'?" if close else otherwise


def _find(arguments: Sequence[str]) -> Command:
    if not arguments:
        raise UsageError("a command is missing", hint=f"'{PROGRAM} --help' lists all")
    if arguments[0] in ("-h", "--help", "help"):
        raise Help(render_help())
    if arguments[0] == "--version":
        arguments = ["version"]
    for command in COMMANDS:
        if command.words == tuple(arguments[: len(command.words)]):
            return command
    noun, verb = arguments[0], arguments[1] if len(arguments) > 1 else None
    if noun not in NOUNS:
        known = dict.fromkeys(command.words[0] for command in COMMANDS)
        kind = "option" if noun.startswith("-") else "command"
        hint = did_you_mean(noun, known, f"'{PROGRAM} --help' lists all")
        raise UsageError(f"unknown {kind} '{noun}'", hint=hint)
    if verb in ("-h", "--help"):
        raise Help(render_help(noun))
    verbs = [command.words[1] for command in COMMANDS if command.words[0] == noun]
    if verb is None:
        hint = f"'{PROGRAM} {noun} --help' says more"
        raise UsageError(f"'{noun}' needs a verb: {', '.join(verbs)}", hint=hint)
    hint = did_you_mean(verb, verbs, f"it has {', '.join(verbs)}")
    raise UsageError(f"'{noun}' has no verb '{verb}'", hint=hint)


def render_help(noun: str = "") -> str:
    """Return the overview of all commands, or of those of one noun."""
    shown = [command for command in COMMANDS if not noun or command.words[0] == noun]
    lines = [f"usage: {PROGRAM} {noun or 'COMMAND'} {'VERB ' if noun else ''}[OPTIONS]", ""]
    lines += [NOUNS[noun][:1].upper() + NOUNS[noun][1:] + ".", ""] if noun else []
    lines += [f"  {command.name:<15} {command.help}" for command in shown]
    lines += ["", f"'{PROGRAM} COMMAND --help' says more about one of them; see nanoclawctl(1)."]
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse says "argument --lines/-n: …": the option is enough.
        raise UsageError(message.removeprefix("argument "), hint=f"'{self.prog} --help' says more")


def _make_parser(command: Command, options: Iterable[Option]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"{PROGRAM} {command.name}",
        description=f"{command.help[:1].upper()}{command.help[1:]}. {command.more}".rstrip(),
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--help", "-h", action="store_true", help="show this text")
    for option in options:
        more = " (default: %(default)s)" if option.default is not None else ""
        settings: dict[str, Any] = {"help": option.help.replace("%", "%%") + more}
        if option.positional:
            settings["nargs"] = "*" if option.repeat else None if option.needed else "?"
        elif option.metavar:
            action = "append" if option.repeat else "store"
            settings |= {"metavar": option.metavar, "type": option.parse, "action": action}
            settings["default"] = option.default
        else:
            settings["action"] = "store_true"
        parser.add_argument(*filter(None, (option.name, option.short)), **settings)
    return parser
