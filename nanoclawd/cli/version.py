"""The version of this program."""

from __future__ import annotations

import re
from argparse import Namespace

from nanoclawd import paths
from nanoclawd.cli import output


def read_version() -> str:
    """Return the version of the package that runs, installed or in a checkout."""
    try:
        text = (paths.SHARE / "pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        from importlib.metadata import version  # slower than all the rest of a start

        return version("nanoclaw")
    found = re.search(r'^version = "([^"]+)"', text, re.MULTILINE)
    return found[1] if found else "unknown"


def run(options: Namespace) -> None:
    version = read_version()
    if options.json:
        output.say_json({"version": version})
    else:
        output.say(f"nanoclawctl {version}")
