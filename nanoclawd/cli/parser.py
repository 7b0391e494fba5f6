"""The command line, read by the table of commands."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from nanoclawd.cli.table import COMMANDS, NOUNS, PROGRAM, Command
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
        raise Help(make_parser(command, positional=True).format_help().rstrip())
    # argparse reads the options alone: it cannot take 'send berta --wait hello', where TEXT is optional.
    namespace, values = make_parser(command, positional=False).parse_known_args(rest[:end])
    more = f"'{PROGRAM} {command.name} --help' says more"
    for value in values:
        if value.startswith("-") and value != "-":
            flags = [option.name for option in command.options if not option.positional]
            raise UsageError(
                f"unknown option '{value}'", hint=did_you_mean(value.partition("=")[0], flags, more)
            )
    values += rest[end + 1 :]
    for option in command.options:
        if option.positional:
            if option.needed and not values:
                raise UsageError(f"{option.name} is missing", hint=more)
            found = values.pop(0) if values else None
            try:
                setattr(namespace, option.name, None if found is None else option.read(found))
            except argparse.ArgumentTypeError as exc:
                raise UsageError(f"{option.name}: {exc}", hint=more) from None
            if found is not None and option.choices and found not in option.choices:
                hint = did_you_mean(found, option.choices, f"it can be {', '.join(option.choices)}")
                raise UsageError(f"{option.name}: '{found}' is not known", hint=hint)
    if values:
        raise UsageError(f"unknown argument '{values[0]}'", hint=more)
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


def make_parser(command: Command, *, positional: bool) -> argparse.ArgumentParser:
    """Return the parser of one command's options, for its help also of its positional arguments."""
    parser = _Parser(
        prog=f"{PROGRAM} {command.name}",
        description=f"{command.help[:1].upper()}{command.help[1:]}. {command.more}".rstrip(),
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--help", "-h", action="store_true", help="show this text")
    for option in command.options:
        names = [name for name in (option.name, option.short) if name]
        help_ = option.help.replace("%", "%%")
        if not option.positional and not option.metavar:
            parser.add_argument(*names, action="store_true", help=help_)
        elif not option.positional:
            if option.default is not None:
                help_ += " (default: %(default)s)"
            action = "append" if option.repeat else "store"
            settings: dict[str, Any] = {
                "metavar": option.metavar,
                "default": option.default,
                "type": option.read,
            }
            parser.add_argument(*names, action=action, help=help_, **settings)
        elif positional:
            parser.add_argument(*names, nargs=None if option.needed else "?", help=help_)
    return parser
