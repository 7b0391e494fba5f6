#!/usr/bin/python3
"""The terminal, for the kit: nanoclawctl is the adapter, and a person's terminals are the platform.

    python3 tests/channel-kit --adapter "python3 tests/channel-kit/terminal.py adapter" \
                              --driver "python3 tests/channel-kit/terminal.py driver"

A chat is a `nanoclawctl chat` in a terminal of its own, and what is said there comes by `nanoclawctl send`.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

Json = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "nanoclawd.cli"]
AGENT = "berta"
LOOK_S = 0.02  #: for terminals that are to be opened
SENT_S = 2.0  #: whoever is not heard by then gives up
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def environment(directory: Path) -> dict[str, str]:
    return {
        **os.environ,
        "XDG_RUNTIME_DIR": str(directory / "run"),
        "XDG_STATE_HOME": str(directory / "state"),
        "PYTHONPATH": str(ROOT),
        "TERM": "dumb",
    }


# --- the adapter ------------------------------------------------------------------------------------


def adapter() -> None:
    """Open a terminal for each chat that there is, and keep what it shows."""
    directory = Path(os.environ["NANOCLAW_CHANNEL_SOCKET"]).parent
    threading.Thread(target=answer_control, args=(directory,), daemon=True).start()
    terminals: dict[str, int] = {}
    while True:
        for chat in (directory / "chats").read_text().splitlines():
            if chat not in terminals:
                terminals[chat] = open_terminal(directory, chat)
        readable, _, _ = select.select([*terminals.values()], [], [], LOOK_S)
        for chat, fd in terminals.items():
            if fd in readable:
                with (directory / f"shown-{chat}").open("ab") as file:
                    file.write(os.read(fd, 65536))


def open_terminal(directory: Path, chat: str) -> int:
    pid, fd = pty.fork()
    if pid == 0:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it dies with us, in a session of its own
        os.execve(COMMAND[0], [*COMMAND, "chat", AGENT, "--chat", chat], environment(directory))
    return fd


def answer_control(directory: Path) -> None:
    """Be the other socket of the router, which says that the agent can work."""
    path = directory / "run/nanoclaw/control/io.nanoclaw.Control"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        while True:
            with listener.accept()[0] as caller:
                caller.recv(65536)
                caller.sendall(b'{"parameters": {"runtime": {"problem": ""}}}\0')


# --- the driver -------------------------------------------------------------------------------------


class Driver:
    def __init__(self) -> None:
        self._directory = Path(os.environ["KIT_DIRECTORY"])
        self._numbers = itertools.count(1)

    def start(self) -> Json:
        for name in ("channel", "control"):
            (self._directory / "run/nanoclaw" / name).mkdir(parents=True)
        (self._directory / "run/nanoclaw/channel/io.nanoclaw.Channel").symlink_to(
            self._directory / "io.nanoclaw.Channel"
        )
        (self._directory / "chats").write_text("")
        self.chat()
        return {"config": "", "login": "", "without": ["health"]}

    def chat(self, direct: bool = False) -> Json:
        if direct:  # all are; nobody needs to be told
            return {"unsupported": True}
        chat = f"c{next(self._numbers)}"
        with (self._directory / "chats").open("a") as file:
            file.write(f"{chat}\n")
        return {"chat": f"{AGENT}/{chat}"}

    def say(self, chat: str, text: str, thread: str = "", mention: bool = False) -> Json:
        if mention:
            return {"unsupported": True}
        command = [*COMMAND, "send", AGENT, "--chat", chat.partition("/")[2], "--json"]
        try:
            done = subprocess.run(
                command,
                input=text,
                text=True,
                capture_output=True,
                env=environment(self._directory),
                timeout=SENT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"unsupported": True}  # the person waits, and so cannot go on
        if done.returncode != 0:  # the person is told, and may send it again
            return {"unsupported": True} if len(text) < 1000 else {"event": "", "sender": ""}
        from getpass import getuser

        return {"event": json.loads(done.stdout)["event"], "sender": getuser()}

    def messages(self, chat: str) -> Json:
        shown = self._directory / f"shown-{chat.partition('/')[2]}"
        text = shown.read_text(errors="replace") if shown.exists() else ""
        text = re.sub(r"\x1b\[[?\d;]*[a-zA-Z]|\r", "", text)
        found = re.findall(rf"^(?:you> )*{AGENT}> (.*)$", text, re.MULTILINE)
        return {
            "messages": [{"id": None, "sender": "nanoclawctl", "text": line, "thread": ""} for line in found]
        }


def driver() -> None:
    person = Driver()
    for line in sys.stdin:
        command = json.loads(line)
        method = getattr(person, command.pop("do"), None)
        print(json.dumps({"unsupported": True} if method is None else method(**command)), flush=True)


if __name__ == "__main__":
    {"adapter": adapter, "driver": driver}[sys.argv[1]]()
