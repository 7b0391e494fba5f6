"""The provider of `nanoclawctl selftest`: in the model's place, a program that tries to get out.

It can do no more than any agent can that runs programs, and the host believes it nothing that helps it.
"""

from __future__ import annotations

import json
import subprocess
import sys

from .. import containment
from ..provider import Paths, Reply, Settings, Stopped, Turn, TurnFailed
from ..turn import Chat


class Selftest:
    def __init__(self, settings: Settings, paths: Paths) -> None:
        self._child: subprocess.Popen[str] | None = None

    def stop(self) -> None:
        if self._child is not None:
            self._child.kill()

    def run(self, turn: Turn, chat: Chat) -> list[Reply]:
        """Run the program with the ARGUMENTs of a message {"do": [ARGUMENT, …], …}; reply its output."""
        text = turn["messages"][0]["text"]
        try:
            arguments = [str(argument) for argument in json.loads(text)["do"]]
        except (ValueError, TypeError, KeyError) as exc:
            message = "The provider 'selftest' is for 'nanoclawctl selftest' alone."
            raise TurnFailed("invalid_request", message) from exc
        if turn["attempt"] > 1:  # whoever ended the first one was right to do so
            return [Reply("ended")]
        command = [sys.executable, "-I", *containment.__path__, *arguments]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            self._child = child
            assert child.stdin is not None and child.stdout is not None
            with child.stdin:
                child.stdin.write(text)
            said = []
            for line in child.stdout:
                said.append(line)
                if arguments == ["stay"]:
                    chat.send("stay", line)
        if chat.stopping.is_set():
            raise Stopped
        return [Reply("".join(said) or f"ended with {child.returncode}")]


make = Selftest
