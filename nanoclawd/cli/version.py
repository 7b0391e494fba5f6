"""The version command."""

from __future__ import annotations

from argparse import Namespace

from nanoclawd.cli import output
from nanoclawd.version import VERSION


def run(options: Namespace) -> None:
    if options.json:
        output.say_json({"version": VERSION})
    else:
        output.say(f"nanoclawctl {VERSION}")
