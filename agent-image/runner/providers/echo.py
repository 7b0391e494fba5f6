"""The offline provider: says back what it was told. For a first try without a key, and for tests.

Each message is answered by a reply of its own, in which each line is said back, unless it is one of these
commands:

    /sleep N        work for N seconds, reporting "thinking" ten times a second
    /send TEXT      send TEXT to the chat at once
    /fail CODE [N]  fail with that code of the contract; with N, retryable after N seconds
    /sent           say which texts an earlier attempt already sent, and which attempt this is
    /deliveries     say what became of what was said before
"""

from __future__ import annotations

from ..provider import Message, Paths, Reply, Settings, Stopped, Turn, TurnFailed
from ..turn import Chat

_TICK_S = 0.1


class Echo:
    def __init__(self, settings: Settings, paths: Paths) -> None:
        pass

    def stop(self) -> None:
        pass  # it waits on chat.stopping

    def run(self, turn: Turn, chat: Chat) -> list[Reply]:
        replies = []
        messages = list(turn["messages"])
        while messages:
            if messages[0].get("command"):
                return [Reply("An echo has nothing to sum up.")]
            replies += [Reply(_answer(message, turn, chat), message["id"]) for message in messages]
            messages = chat.take_messages()
        return replies


def _answer(message: Message, turn: Turn, chat: Chat) -> str:
    said: list[str] = []
    sends = 0
    for line in message["text"].split("\n"):
        command, _, rest = line.partition(" ")
        if command == "/sleep":
            _work(float(rest or 1), chat)
        elif command == "/send":
            sends += 1
            chat.tool(f"send: {rest}")
            chat.send(f"{message['id']}.{sends}", rest)
        elif command == "/fail":
            code, _, after = rest.partition(" ")
            text = "The echo provider was told to fail."
            retry_after_s = float(after) if after else None
            raise TurnFailed(code or "internal", text, retryable=bool(after), retry_after_s=retry_after_s)
        elif command == "/sent":
            texts = ", ".join(repr(sent["text"]) for sent in turn["alreadySent"]) or "nothing"
            said.append(f"attempt {turn['attempt']}, already sent: {texts}")
        elif command == "/deliveries":
            said += [f"{delivery['state']}: {delivery['text']}" for delivery in chat.list_deliveries()]
        else:
            said.append(line)
        if chat.stopping.is_set():
            raise Stopped
    text = "\n".join(said)
    text = text if text.strip() else "done"
    chat.text(text)
    return text


def _work(seconds: float, chat: Chat) -> None:
    for _ in range(max(1, round(seconds / _TICK_S))):
        chat.thinking()
        if chat.stopping.wait(min(_TICK_S, seconds)):
            raise Stopped


make = Echo
