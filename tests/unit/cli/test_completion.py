"""Completion scripts, read and used by the real shells where they are there."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nanoclawd.cli import completion
from nanoclawd.cli.table import COMMANDS, Command
from tests.unit.cli.conftest import COMMAND, Run, fake_program
from tests.unit.cli.double import RouterDouble

Complete = Callable[[str], set[str]]
CHECKS = {"bash": ["bash", "-n"], "zsh": ["zsh", "-n"], "fish": ["fish", "--no-execute"]}


@pytest.fixture
def complete(run: Run, home: Path, programs: Path) -> Complete:
    """Return what bash offers for a line, with nanoclawctl in PATH."""
    fake_program(programs, "nanoclawctl", f'exec {" ".join(COMMAND)} "$@"')
    (home / "script").write_text(run("completion", "bash").stdout)

    def offer(line: str) -> set[str]:
        words = line.split(" ")
        quoted = " ".join(f"'{word}'" for word in words)
        code = (
            f"source ./script; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _nanoclawctl; "
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True, cwd=home)
        assert done.stderr == ""
        return set(done.stdout.split())

    return offer


@pytest.mark.parametrize("shell", CHECKS)
def test_script_is_read_by_its_shell(run: Run, home: Path, shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    script = home / "script"
    script.write_text(run("completion", shell).stdout)

    done = subprocess.run([*CHECKS[shell], str(script)], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_and_option_is_offered(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(len(command.words)):
        completion.answer([*command.words[:number], ""])
        assert command.words[number] in {
            line.split("\t")[0] for line in capsys.readouterr().out.splitlines()
        }

    completion.answer([*command.words, "-"])

    offered = {line.split("\t")[0] for line in capsys.readouterr().out.splitlines()}
    assert offered == {"--help", *(option.name for option in command.options if not option.positional)}


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["agent", "logs", "-n", ""], ""),  # a number, of which nothing is known
        (["agent", "logs", "-n", "5", "--l"], "--lines\tshow the last N lines\n"),
        (["agent", "add", "x", "--mount", "/"], ":files\n"),
        (["agent", "add", "--cpu"], "--cpu-quota\tCPU limit, e.g. 150%; empty for none\n"),
        (["completion", "bash", "b"], ""),  # there is one argument
        (["completion", "b"], "bash\n"),
        (["message", "list", "--state", "a"], "answered\n"),
        (["nonsense", ""], ""),
    ],
)
def test_what_is_offered_depends_on_the_words_before(
    words: list[str], offered: str, capsys: pytest.CaptureFixture[str]
) -> None:
    completion.answer(words)

    assert capsys.readouterr().out == offered


def test_bash_offers_nouns_verbs_options_and_choices(complete: Complete) -> None:
    assert {"agent", "status", "chat"} <= complete("nanoclawctl ")
    assert complete("nanoclawctl stat") == {"status"}
    assert complete("nanoclawctl agent re") == {"remove", "restart"}
    assert complete("nanoclawctl agent add x --me") == {"--memory-max"}
    assert complete("nanoclawctl completion ") >= {"bash", "zsh", "fish"}


def test_bash_offers_the_agents_that_there_are(complete: Complete, router: RouterDouble) -> None:
    router.agents["bruno"] = router.agents["berta"]

    assert complete("nanoclawctl chat b") == {"berta", "bruno", "block"}
    assert complete("nanoclawctl agent show be") == {"berta"}


def test_bash_offers_the_dead_letters_that_there_are(complete: Complete, router: RouterDouble) -> None:
    keys = {"m0123456789abcdef", "m0123456789abcdef.notice"}

    assert complete("nanoclawctl deadletter retry m") == keys
    assert complete("nanoclawctl deadletter drop m0123456789abcdef m") == keys


def test_bash_offers_files_where_files_are_meant(complete: Complete, home: Path) -> None:
    (home / "be-kind.md").touch()
    (home / "base").mkdir()

    assert complete("nanoclawctl agent add x --instructions be") == {"be-kind.md"}
    assert complete("nanoclawctl image build --base-directory b") == {"base", "bin"}


def test_without_the_daemon_tab_stays_silent(complete: Complete) -> None:
    assert complete("nanoclawctl chat b") == {"block"}


def test_zsh_offers_what_there_is(run: Run, home: Path, programs: Path, router: RouterDouble) -> None:
    if shutil.which("zsh") is None:
        pytest.skip("no zsh here")
    fake_program(programs, "nanoclawctl", f'exec {" ".join(COMMAND)} "$@"')
    (home / "functions").mkdir()
    (home / "functions/_nanoclawctl").write_text(run("completion", "zsh").stdout)
    code = (
        "fpath=($PWD/functions $fpath); autoload -U compinit; compinit -u -d $PWD/dump; "
        "functions _nanoclawctl > /dev/null || exit 3; print $_comps[nanoclawctl]"
    )

    done = subprocess.run(["zsh", "-fc", code], capture_output=True, text=True, check=False, cwd=home)

    assert (done.returncode, done.stdout.strip()) == (0, "_nanoclawctl"), done.stderr


def test_fish_offers_what_there_is(run: Run, home: Path, programs: Path, router: RouterDouble) -> None:
    if shutil.which("fish") is None:
        pytest.skip("no fish here")
    fake_program(programs, "nanoclawctl", f'exec {" ".join(COMMAND)} "$@"')
    (home / "script").write_text(run("completion", "fish").stdout)

    def offer(line: str) -> set[str]:
        code = f"source script; complete -C'{line}'"
        done = subprocess.run(["fish", "-c", code], capture_output=True, text=True, check=True, cwd=home)
        return {shown.split("\t")[0] for shown in done.stdout.splitlines()}

    assert {"agent", "status", "chat"} <= offer("nanoclawctl ")
    assert offer("nanoclawctl agent re") == {"remove", "restart"}
    assert offer("nanoclawctl agent add x --me") == {"--memory-max"}
    assert offer("nanoclawctl chat b") == {"berta", "block"}
