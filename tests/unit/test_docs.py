"""The documents say what the program does: each command, option and setting, and no other."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

from nanoclawd import agents, budget, policy, privileges
from nanoclawd.cli.__main__ import EXIT_CODES
from nanoclawd.cli.parser import Help, parse, render_help
from nanoclawd.cli.table import COMMANDS, NOUNS, Command
from nanoclawd.ids import AgentName
from nanoclawd.settings import SETTINGS

ROOT = Path(__file__).resolve().parents[2]
MAN = ROOT / "packaging/man"
PAGES = sorted(MAN.glob("*.[1-8]"))
NAMES = [page.name for page in PAGES]


def entry(command: Command) -> str:
    """Return what nanoclawctl.1 says of one command, its head and the text behind."""
    page = (MAN / "nanoclawctl.1").read_text()
    found = re.search(
        rf"^\.It Ic {command.name}(?= |$).*?(?=^\.It Ic |^\.S[hs] )", page, re.MULTILINE | re.DOTALL
    )
    assert found, f"nanoclawctl.1 has no entry for '{command.name}'"
    return found[0]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_has_help_and_a_man_page_entry(command: Command) -> None:
    words = entry(command)
    with pytest.raises(Help) as wanted:
        parse([*command.words, "--help"])

    assert command.help in render_help()
    assert command.help[1:] in " ".join(wanted.value.text.split())
    if command.name == "agent set":  # it refers to the keys of add
        words += entry(next(c for c in COMMANDS if c.name == "agent add"))
    for option in command.options:
        assert option.help
        assert option.name in wanted.value.text
        if option.positional:
            assert f"Ar {option.name.lower()}" in words
        else:
            assert re.search(rf"(Fl|\|) -{option.name[2:]}\b", words), (
                f"{option.name} is not in the man page"
            )
            assert not option.short or f"Fl {option.short[1:]} |" in words.splitlines()[0]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_has_a_function(command: Command) -> None:
    assert callable(getattr(import_module(f"nanoclawd.cli.{command.module}"), "_".join(command.words)))


def test_man_page_has_no_command_and_no_option_that_is_not_there() -> None:
    page = (MAN / "nanoclawctl.1").read_text()
    names = {command.name for command in COMMANDS}
    flags = {o.name[2:] for c in COMMANDS for o in c.options if not o.positional} | {"help", "version"}

    for found in re.findall(r"^\.It Ic ((?:[a-z]+ ?)+)", page, re.MULTILINE):
        assert found.strip() in names
    assert set(re.findall(r"(?:Fl|\|) -([a-z-]+)", page)) == flags


def test_help_lists_every_noun() -> None:
    for noun in NOUNS:
        assert all(command.name in render_help(noun) for command in COMMANDS if command.words[0] == noun)


def test_exit_codes_are_in_the_man_page() -> None:
    page = (MAN / "nanoclawctl.1").read_text().partition(".Sh EXIT STATUS")[2]

    for name, code in EXIT_CODES.items():
        assert re.search(rf"^\.It {code}$", page, re.MULTILINE)
        assert f"Cm {name}" in page


def test_every_setting_is_in_the_man_page_and_no_other() -> None:
    settings, _, rest = (MAN / "nanoclaw.toml.5").read_text().partition(".Sh AGENTS")
    of_agents, _, of_policies = rest.partition(".Sh POLICY")

    assert re.findall(r"^\.It Va (\S+)", settings, re.MULTILINE) == [*SETTINGS]
    documented = re.findall(r"^\.It Va (\S+)", of_agents, re.MULTILINE)
    tables = {*(field.name for field in fields(agents.Mount)), *budget.KEYS, *privileges.KEYS}
    assert set(documented) == {*agents.KEYS, *tables}
    assert re.findall(r"^\.It Va (\S+)", of_policies, re.MULTILINE) == [*policy.KEYS]


def test_defaults_of_agents_are_in_the_man_page() -> None:
    page = (MAN / "nanoclaw.toml.5").read_text()
    default = agents.AgentConfig(name=AgentName("x"))

    for key in ("provider", "image", "idle_seconds", "memory_max", "tasks_max"):
        words = page.partition(f".It Va {key}\n")[2].partition(".It Va")[0]
        assert str(getattr(default, key)) in words


@pytest.mark.parametrize("name", NAMES)
def test_man_page_is_well_formed(name: str) -> None:
    checks = {
        "mandoc": ["mandoc", "-T", "lint", "-W", "warning", str(MAN / name)],
        "man": ["man", "--warnings", "-l", str(MAN / name)],
    }
    there = [command for program, command in checks.items() if shutil.which(program)]
    if not there:
        pytest.skip("neither mandoc nor man is here")

    for command in there:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"}
        )
        complaints = done.stderr + (done.stdout if command[0] == "mandoc" else "")
        assert not [line for line in complaints.splitlines() if "mandoc.db" not in line], complaints


@pytest.mark.parametrize("name", NAMES)
def test_man_page_refers_to_pages_of_ours_that_are_there(name: str) -> None:
    text = (MAN / name).read_text()

    for page, section in re.findall(r"^\.Xr (nanoclaw\S*) (\d)", text, re.MULTILINE):
        assert (MAN / f"{page}.{section}").exists()


def commands_in(text: str) -> Iterator[str]:
    """Yield what stands behind "nanoclawctl" where a document or a message shows a command to type."""
    # In quotes, in backquotes, or at the beginning of a line of an example.
    for found in re.findall(r"(?:['`]|^\s*(?:\$ )?|\| )nanoclawctl ([a-z][^'`\n|#>&]*)", text, re.MULTILINE):
        yield found.strip()


DOCUMENTS = [
    path
    for pattern in (
        "*.md",
        "install.sh",
        "nanoclawd/**/*.py",
        "units/**/*",
        "packaging/man/*",
        "skills/**/*.md",
    )
    for path in sorted(ROOT.glob(pattern))
    if path.is_file()
]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_that_are_shown_exist(path: Path) -> None:
    for shown in commands_in(path.read_text(encoding="utf-8")):
        words = shown.split()
        command = next((c for c in COMMANDS if list(c.words) == words[: len(c.words)]), None)
        assert command is not None or (words[0] in NOUNS and len(words) == 1), f"'nanoclawctl {shown}'"
        if command is not None:
            known = {"--help", "--", *(flag for o in command.options for flag in (o.name, o.short))}
            flags = {
                word.partition("=")[0] for word in words if re.fullmatch(r"-[a-z]|--[a-z-]+(=.*)?", word)
            }
            assert flags <= known, f"'nanoclawctl {shown}'"
