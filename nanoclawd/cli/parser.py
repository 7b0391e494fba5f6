"""The command line, read by the table of commands."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from nanoclawd.cli.table import COMMANDS, INTERNAL, NOUNS, PROGRAM, Command, Option
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
    command, rest = _find(arguments)
    end = rest.index("--") if "--" in rest else len(rest)
    # argparse reads the options alone: it cannot take 'send berta --wait hello', where TEXT is optional.
    try:
        namespace, others = make_parser(command, positional=False).parse_known_args(list(rest[:end]))
    except Help:
        raise Help(make_parser(command).format_help().rstrip()) from None
    more = f"'{PROGRAM} {command.name} --help' says more"
    for other in others:
        if other.startswith("-") and other != "-":
            names = [
                flag for option in command.options for flag in (option.name, option.short) if flag[:1] == "-"
            ]
            raise UsageError(
                f"unknown option '{other}'", hint=did_you_mean(other.partition("=")[0], names, more)
            )
    values = [*others, *rest[end + 1 :]]
    for option in command.options:
        if option.positional:
            if option.needed and not values:
                raise UsageError(f"{option.name} is missing", hint=more)
            setattr(namespace, option.name, _read(option, values.pop(0), more) if values else None)
    if values:
        raise UsageError(f"unknown argument '{values[0]}'", hint=more)
    return command, namespace


def _read(option: Option, value: str, more: str) -> object:
    try:
        read = _KINDS[option.kind](value)
    except argparse.ArgumentTypeError as exc:
        raise UsageError(f"{option.name}: {exc}", hint=more) from None
    if option.choices and read not in option.choices:
        hint = did_you_mean(value, option.choices, f"it can be {', '.join(option.choices)}")
        raise UsageError(f"{option.name}: '{value}' is not known", hint=hint)
    return read


def did_you_mean(wrong: str, names: Iterable[str], otherwise: str) -> str:
    """Return a hint that ends in the name that is closest to `wrong`, if one is close."""
    from difflib import get_close_matches

    close = get_close_matches(wrong, list(names), n=1)
    return f"{otherwise}; did you mean '{close[0]}'?" if close else otherwise


def _find(arguments: Sequence[str]) -> tuple[Command, Sequence[str]]:
    """Take noun and verb off `arguments`: only that command's parser is then made."""
    if not arguments:
        raise UsageError("a command is missing", hint=f"'{PROGRAM} --help' lists all")
    noun, rest = arguments[0], arguments[1:]
    if noun in ("-h", "--help", "help"):
        raise Help(render_help())
    if noun == "--version":
        noun = "version"
    for command in (*COMMANDS, *INTERNAL):
        if command.words == (noun,):
            return command, rest
    if noun not in NOUNS:
        known = dict.fromkeys(command.words[0] for command in COMMANDS)
        kind = "option" if noun.startswith("-") else "command"
        raise UsageError(
            f"unknown {kind} '{noun}'", hint=did_you_mean(noun, known, f"'{PROGRAM} --help' lists all")
        )
    verbs = {command.words[1]: command for command in COMMANDS if command.words[0] == noun}
    if not rest:
        raise UsageError(
            f"'{noun}' needs a verb: {', '.join(verbs)}", hint=f"'{PROGRAM} {noun} --help' says more"
        )
    if rest[0] in ("-h", "--help"):
        raise Help(render_help(noun))
    if rest[0] not in verbs:
        raise UsageError(
            f"'{noun}' has no verb '{rest[0]}'",
            hint=did_you_mean(rest[0], verbs, f"it has {', '.join(verbs)}"),
        )
    return verbs[rest[0]], rest[1:]


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


class _Help(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        raise Help(parser.format_help().rstrip())


def make_parser(command: Command, *, positional: bool = True) -> argparse.ArgumentParser:
    """Return the parser of one command's arguments, or of its options alone."""
    parser = _Parser(
        prog=f"{PROGRAM} {command.name}",
        description=f"{command.help[:1].upper()}{command.help[1:]}. {command.more}".rstrip(),
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--help", "-h", action=_Help, nargs=0, help="show this text")
    for option in command.options:
        if option.positional and not positional:
            continue
        flags = (option.name,) if option.positional else tuple(filter(None, (option.name, option.short)))
        parser.add_argument(*flags, **_settings(option))
    return parser


def _settings(option: Option) -> dict[str, Any]:
    if not option.positional and not option.metavar:
        return {"action": "store_true", "help": option.help}
    settings: dict[str, Any] = {"help": option.help, "default": option.default, "type": _KINDS[option.kind]}
    settings["metavar"] = option.metavar or option.name
    if option.positional and not option.needed:
        settings["nargs"] = "?"
    if option.repeat:
        settings["action"] = "append"
    return settings


def _text(value: str) -> str:
    """What is typed ends up in JSON, which is UTF-8 without NUL."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("is not UTF-8") from None
    return value


def _count(value: str) -> int:
    if not value.isascii() or not value.isdigit() or not 0 < int(value[:12]) < 1 << 31:
        raise argparse.ArgumentTypeError(f"'{value[:32]}' is not a number from 1 on")
    return int(value)


def _seconds(value: str) -> int:
    return 0 if value == "0" else _count(value)


def _mount(value: str) -> dict[str, object]:
    """SOURCE:TARGET[:rw]; the source is made absolute here, since the router runs elsewhere."""
    import os

    source, _, rest = _text(value).partition(":")
    target, _, mode = rest.partition(":")
    if not source or not target.startswith("/") or mode not in ("", "ro", "rw"):
        raise argparse.ArgumentTypeError(f"'{value[:128]}' is not SOURCE:/TARGET, SOURCE:/TARGET:ro or …:rw")
    return {
        "source": os.path.abspath(os.path.expanduser(source)),
        "target": target,
        "readOnly": mode != "rw",
    }


_KINDS: dict[str, Callable[[str], object]] = {
    "text": _text,
    "count": _count,
    "seconds": _seconds,
    "mount": _mount,
}
