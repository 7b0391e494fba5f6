"""Format, lint and types of everything in the tree: 'may I push?' is one command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TYPED = [
    path
    for path in (
        "nanoclawd",
        "agent-image/runner",
        "skills/matrix/nanoclaw_matrix",
        "tests/support",
        "tests/conftest.py",
    )
    if (ROOT / path).exists()
]


def check(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def shell_scripts() -> list[str]:
    """Return the shell scripts of the tree, from git or, in an unpacked tarball, from the directory."""
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False)
    names = listed.stdout.splitlines() or [str(path.relative_to(ROOT)) for path in ROOT.rglob("*")]
    scripts = []
    for name in sorted(names):
        path = ROOT / name
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                first = file.readline(80)
            if first.startswith(b"#!") and first.rstrip().endswith((b"bash", b"/sh", b" sh")):
                scripts.append(name)
    return scripts


def test_format() -> None:
    check(sys.executable, "-m", "ruff", "format", "--check", "--diff", "--quiet", ".")


def test_lint() -> None:
    check(sys.executable, "-m", "ruff", "check", ".")


def test_types() -> None:
    check(sys.executable, "-m", "mypy", "--strict", *TYPED)


@pytest.mark.parametrize("script", shell_scripts())
def test_shell_script(script: str) -> None:
    check("shellcheck", "--severity=warning", script)
