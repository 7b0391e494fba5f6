"""The door to subprocesses: what goes in, what comes back, and that nothing stays behind."""

from __future__ import annotations

import asyncio
import os
import sys

import pytest

from nanoclawd import programs
from nanoclawd.errors import Failed, Unavailable


def test_a_program_gets_its_arguments_and_only_what_we_pass_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_SOMEBODY", "x")
    code = (
        "import os, sys; print(sys.argv[1], sorted(os.environ)); print('no', file=sys.stderr); sys.exit(3)"
    )

    result = asyncio.run(programs.run([sys.executable, "-c", code, "a b; $c"], env={"MORE": "1"}))

    assert result.returncode == 3
    assert result.stdout.startswith("a b; $c [") and "'MORE'" in result.stdout
    assert "SECRET" not in result.stdout
    assert result.stderr == "no\n"
    assert programs.paste(result.args, {"MORE": "1"}).endswith("'a b; $c'")
    assert programs.paste(["true"], {"MORE": "1 2"}) == "MORE='1 2' true"


def test_a_missing_program_is_unavailable() -> None:
    with pytest.raises(Unavailable, match="/no/such/program"):
        asyncio.run(programs.run(["/no/such/program"]))


def test_a_program_that_takes_too_long_is_ended() -> None:
    with pytest.raises(Failed, match=r"longer than 0\.2 s: sleep 60"):
        asyncio.run(programs.run(["sleep", "60"], timeout_s=0.2))


@pytest.mark.parametrize("deaf", [False, True])
def test_a_cancel_ends_and_reaps_the_program(monkeypatch: pytest.MonkeyPatch, deaf: bool) -> None:
    monkeypatch.setattr(programs, "END_S", 0.2)
    disposition = "SIG_IGN" if deaf else "SIG_DFL"
    code = f"import os, signal; signal.signal(15, signal.{disposition}); print(os.getpid(), flush=True)"
    code += "; signal.pause()"

    async def cancelled() -> int:
        async with programs.start([sys.executable, "-c", code]) as process:
            assert process.stdout is not None
            return int(await process.stdout.readline())

    pid = asyncio.run(cancelled())

    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
