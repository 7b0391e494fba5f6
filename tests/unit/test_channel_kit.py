"""The kit for adapters: its example passes all of it, and is what the documentation shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.machine import ROOT

KIT = ROOT / "tests/channel-kit"
ADAPTER, DRIVER = KIT / "example_adapter.py", KIT / "example_driver.py"


def kit(
    adapter: str, *options: str, driver: str = str(DRIVER), within_s: float = 20
) -> subprocess.CompletedProcess[str]:
    commands = ("--adapter", f"{sys.executable} {adapter}", "--driver", f"{sys.executable} {driver}")
    return subprocess.run(
        [sys.executable, KIT, *commands, *options],
        env={**os.environ, "KIT_WITHIN_S": str(within_s)},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def test_example_is_what_the_documentation_shows() -> None:
    (shown,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/channels.md").read_text(), re.DOTALL)

    assert shown == ADAPTER.read_text()


def test_example_passes_all_of_the_kit() -> None:
    done = kit(str(ADAPTER))

    assert done.returncode == 0, done.stdout + done.stderr
    assert "not applicable" not in done.stdout
    assert re.search(r"^(\d+) of \1 passed, \1 checks in all\.$", done.stdout, re.MULTILINE), done.stdout


def test_terminal_passes_what_applies_to_it() -> None:
    """Those that take a few seconds; by hand it passes all that apply, see terminal.py."""
    some = ("announces", "with its chat, event", "sends", "kill -9 between", "does not know", "breaks")
    only = [word for words in some for word in ("--only", words)]

    done = kit(f"{KIT}/terminal.py adapter", *only, driver=f"{KIT}/terminal.py driver")

    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^passed", done.stdout, re.MULTILINE)) == 8, done.stdout


#: What is broken in the example, by what, and the check that has to see it.
BROKEN = [
    ('health.say("connected")', 'health.say("splendid")', "breaks the contract"),
    ("position = int(POSITION.read_text()) if", "position = 10**6 if True or", "was not answered"),
    ('if event["sender"] == SETTINGS["user"]', "if False", "its own accounts"),
    ('revision=event["revision"]', "revision=0", "hands over an edit"),
    ('error.name == "Unavailable"', "False", "refused as Unavailable"),
    ('if state in ("open", "blocked")', "if True", "before it joins"),
    ('f"{key}.{number}"', "os.urandom(8).hex()", "comes twice"),
    ('number <= delivery["partsSent"]', "False", "parts that were reported"),
    ('retryable = answer["retry"]', "retryable = True", "failure for good"),
    ('"textBytes": PART_BYTES', '"textBytes": 1000', "splits what is longer"),
]


@pytest.mark.parametrize(("line", "instead", "check"), BROKEN, ids=[check for _, _, check in BROKEN])
def test_kit_sees_what_is_broken(tmp_path: Path, line: str, instead: str, check: str) -> None:
    broken = tmp_path / "adapter.py"
    assert ADAPTER.read_text().count(line) == 1
    broken.write_text(ADAPTER.read_text().replace(line, instead))

    done = kit(str(broken), "--only", check, within_s=2)

    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(rf"^FAILED .*{check}", done.stdout, re.MULTILINE), done.stdout
