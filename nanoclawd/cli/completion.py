"""Completion scripts for shells, made from the table of commands.

Commands and options are in the script; names of agents are asked for when Tab is pressed.
"""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Iterable

from nanoclawd.cli import control
from nanoclawd.cli.table import COMMANDS, NOUNS, PROGRAM, Command, Option
from nanoclawd.errors import NanoclawError


def run(options: Namespace) -> None:
    print({"bash": render_bash, "zsh": render_zsh, "fish": render_fish}[options.SHELL]())


def agents(_options: Namespace) -> None:
    """Print the names of agents, one a line; nothing if the daemon is away: a Tab is no place for errors."""
    with contextlib.suppress(NanoclawError):
        for name in control.agent_names(timeout_s=control.COMPLETION_S):
            print(name)


def render_bash() -> str:
    """Return a script for bash(1); it needs no package of completions."""
    cases = [f"    '{noun} ') words='{' '.join(_verbs(noun))} --help' ;;" for noun in NOUNS]
    for command in COMMANDS:
        flags = " ".join([*_flags(command), "--help"])
        cases.append(f"    {_bash_key(command)}) words='{flags}'{_bash_positional(command)} ;;")
    values = [
        f"    '{command.name} {option.name}') {_bash_value(option)} ;;"
        for command in COMMANDS
        for option in command.options
        if option.metavar
    ]
    return f"""\
# bash completion for {PROGRAM}, made by '{PROGRAM} completion bash'
_{PROGRAM}() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD - 1]}} words= names= files=
  local command=${{COMP_WORDS[1]}}
  COMPREPLY=()
  if ((COMP_CWORD == 1)); then
    mapfile -t COMPREPLY < <(compgen -W '{" ".join(_nouns())} --help --version' -- "$current")
    return
  fi
  case $command in
  {"|".join(NOUNS)}) if ((COMP_CWORD > 2)); then command+=" ${{COMP_WORDS[2]}}"; else command+=' '; fi ;;
  esac
  case "$command $previous" in
{chr(10).join(values)}
  *) case $command in
{chr(10).join(cases)}
    esac ;;
  esac
  [[ $names && $current != -* ]] && words+=" $({PROGRAM} _agents 2> /dev/null)"
  if [[ $files && $current != -* ]]; then
    compopt -o filenames 2> /dev/null
    mapfile -t COMPREPLY < <(compgen "$files" -- "$current")
  else
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
  fi
}}
complete -F _{PROGRAM} {PROGRAM}"""


def render_zsh() -> str:
    """Return a script for zsh(1), to be put into a file named _nanoclawctl in $fpath, or to be sourced."""
    lines = [f"#compdef {PROGRAM}", f"# made by '{PROGRAM} completion zsh'", ""]
    lines += [f"_{PROGRAM}_agents() {{", "  local -a names"]
    lines += [f'  names=(${{(f)"$({PROGRAM} _agents 2> /dev/null)"}})', "  compadd -a names", "}", ""]
    lines += [f"_{PROGRAM}() {{", "  local -a found", "  if ((CURRENT == 2)); then", "    found=("]
    lines += [f"      {_zsh_quote(f'{noun}:{_help(noun)}')}" for noun in _nouns()]
    lines += ["    )", "    _describe command found", "    return", "  fi", '  case "$words[2]" in']
    for noun in NOUNS:
        lines += [f"  {noun})", "    if ((CURRENT == 3)); then", "      found=("]
        lines += [
            f"        {_zsh_quote(f'{verb}:{command.help}')}" for verb, command in _verbs(noun).items()
        ]
        lines += ["      )", "      _describe verb found", "      return", "    fi"]
        lines += ["    shift words; ((CURRENT--))", '    case "$words[2]" in']
        for verb, command in _verbs(noun).items():
            lines += [f"    {verb}) shift words; ((CURRENT--)); {_zsh_arguments(command)} ;;"]
        lines += ["    esac ;;"]
    for command in COMMANDS:
        if len(command.words) == 1:
            lines += [f"  {command.name}) shift words; ((CURRENT--)); {_zsh_arguments(command)} ;;"]
    lines += ["  esac", "}", ""]
    # Sourced it defines the completion; autoloaded, the file is the function.
    lines += [
        f'if [ "$funcstack[1]" = _{PROGRAM} ]; then _{PROGRAM} "$@"; else compdef _{PROGRAM} {PROGRAM}; fi'
    ]
    return "\n".join(lines)


def render_fish() -> str:
    """Return a script for fish(1)."""
    lines = [f"# made by '{PROGRAM} completion fish'", f"complete -c {PROGRAM} -f"]
    top = f"not __fish_seen_subcommand_from {' '.join(_nouns())}"
    for noun in _nouns():
        lines.append(f"complete -c {PROGRAM} -n {_quote(top)} -a {noun} -d {_quote(_help(noun))}")
    for noun in NOUNS:
        verbs = _verbs(noun)
        here = f"__fish_seen_subcommand_from {noun}; and not __fish_seen_subcommand_from {' '.join(verbs)}"
        for verb, command in verbs.items():
            lines.append(f"complete -c {PROGRAM} -n {_quote(here)} -a {verb} -d {_quote(command.help)}")
    for command in COMMANDS:
        here = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in command.words)
        for option in command.options:
            lines += _fish_option(option, here)
    return "\n".join(lines)


def _nouns() -> list[str]:
    return list(dict.fromkeys(command.words[0] for command in COMMANDS))


def _verbs(noun: str) -> dict[str, Command]:
    return {
        command.words[1]: command
        for command in COMMANDS
        if command.words[0] == noun and len(command.words) > 1
    }


def _help(noun: str) -> str:
    return NOUNS.get(noun) or next(command.help for command in COMMANDS if command.words == (noun,))


def _flags(command: Command) -> Iterable[str]:
    return (option.name for option in command.options if not option.positional)


def _bash_key(command: Command) -> str:
    return f"'{command.name}'"


def _bash_positional(command: Command) -> str:
    positional = [option for option in command.options if option.positional]
    names = " names=1" if any(option.complete == "agents" for option in positional) else ""
    choices = " ".join(choice for option in positional for choice in option.choices)
    return names + (f"; words+=' {choices}'" if choices else "")


def _bash_value(option: Option) -> str:
    return {"files": "files=-f", "directories": "files=-d", "agents": "names=1"}.get(option.complete, ":")


def _zsh_arguments(command: Command) -> str:
    specs = ["'(- *)--help[show help]'"]
    for option in command.options:
        action = {
            "agents": f"_{PROGRAM}_agents",
            "files": "_files",
            "directories": "_files -/",
        }.get(option.complete, f"({' '.join(option.choices)})" if option.choices else " ")
        help_ = option.help.replace("%%", "%").replace("[", "(").replace("]", ")").replace(":", "\\:")
        if option.positional:
            specs.append(_zsh_quote(f"{':' if option.needed else '::'}{option.name}:{action}"))
            continue
        value = f":{option.metavar.replace(':', ' ').replace('[', '').replace(']', '')}:{action}"
        for flag in filter(None, (option.name, option.short)):
            repeat = "*" if option.repeat else ""
            specs.append(_zsh_quote(f"{repeat}{flag}[{help_}]{value if option.metavar else ''}"))
    return f"_arguments {' '.join(specs)}"


def _zsh_quote(words: str) -> str:
    return "'" + words.replace("'", "'\\''") + "'"


def _fish_option(option: Option, here: str) -> list[str]:
    start = f"complete -c {PROGRAM} -n {_quote(here)}"
    values = {
        "agents": f" -a '({PROGRAM} _agents 2> /dev/null)'",
        "files": " -F",
        "directories": " -a '(__fish_complete_directories)'",
    }
    what = values.get(option.complete, f" -a '{' '.join(option.choices)}'" if option.choices else "")
    if option.positional:
        return [start + what] if what else []
    short = f" -s {option.short[1:]}" if option.short else ""
    value = (
        f" -x{what}"
        if option.metavar and option.complete != "files"
        else f" -r{what}"
        if option.metavar
        else ""
    )
    return [f"{start} -l {option.name[2:]}{short}{value} -d {_quote(option.help.replace('%%', '%'))}"]


def _quote(words: str) -> str:
    """Quote for fish, where a backslash quotes inside of single quotes too."""
    return "'" + words.replace("\\", "\\\\").replace("'", "\\'") + "'"
