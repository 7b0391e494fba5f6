"""The offline provider: says back what it was told. For a first try without a key, and for tests.

Each line of the messages is said back, unless it is one of these commands:

    /sleep N        work for N seconds, reporting "thinking" ten times a second
    /send TEXT      send TEXT to the chat at once
    /fail CODE [N]  fail with that code of the contract; with N, retryable after N seconds
    /sent           say which texts an earlier attempt already sent, and which attempt this is
"""

from __future__ import annotations

from ..provider import Paths, Settings, Stopped, Turn, TurnFailed
from ..turn import Chat

_TICK_S = 0.1


class Echo:
    def __init__(self, settings: Settings, paths: Paths) -> None:
        pass

    def stop(self) -> None:
        pass  # it waits on chat.stopping

    def run(self, turn: Turn, chat: Chat) -> list[str]:
        said: list[str] = []
        sends = 0
        for line in "\n".join(message["text"] for message in turn["messages"]).split("\n"):
            command, _, rest = line.partition(" ")
            if command == "/sleep":
                _work(float(rest or 1), chat)
            elif command == "/send":
                sends += 1
                chat.tool(f"send: {rest}")
                chat.send(f"echo-{sends}", rest)
            elif command == "/fail":
                code, _, after = rest.partition(" ")
                message = "The echo provider was told to fail."
                retry_after_s = float(after) if after else None
                raise TurnFailed(
                    code or "internal", message, retryable=bool(after), retry_after_s=retry_after_s
                )
            elif command == "/sent":
                texts = ", ".join(repr(sent["text"]) for sent in turn["alreadySent"]) or "nothing"
                said.append(f"attempt {turn['attempt']}, already sent: {texts}")
            else:
                said.append(line)
            if chat.stopping.is_set():
                raise Stopped
        text = "\n".join(said)
        text = text if text.strip() else "done"
        chat.text(text)
        return [text]


def _work(seconds: float, chat: Chat) -> None:
    for _ in range(max(1, round(seconds / _TICK_S))):
        chat.thinking()
        if chat.stopping.wait(min(_TICK_S, seconds)):
            raise Stopped


make = Echo
