"""Attempts at the router, over the socket of our session."""

from __future__ import annotations

import json
import socket
from functools import partial

from .gateway import present
from .probe import ANSWER_S, Held, Json, Probe, Untried, listed

HOST = "/run/nanoclaw/host.sock"


def call(method: str, parameters: Json) -> str:
    """Introduce ourselves as a runner and make a call; return what came, if it is no error."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(ANSWER_S * 5)
        present(sock, HOST)
        if b"error" in _exchange(sock, "io.nanoclaw.Agent.Hello", {"protocol": 1, "version": "x"}):
            raise Untried("the router does not know us")
        answer = _exchange(sock, method, parameters)
    if error := json.loads(answer or b"{}").get("error"):
        raise Held(error.removeprefix("io.nanoclaw.").removeprefix("org.varlink."))
    return listed([f"answered {answer[:80]!r}"] * bool(answer), "it hung up")


def _exchange(sock: socket.socket, method: str, parameters: Json) -> bytes:
    """Return the answer to a call, b"" if there is none but a hang-up."""
    sock.sendall(json.dumps({"method": method, "parameters": parameters}).encode() + b"\0")
    answer = b""
    while not answer.endswith(b"\0") and (data := sock.recv(1 << 16)):
        answer += data
    return answer.removesuffix(b"\0")


def order(method: str, values: Json, parameters: Json) -> str:
    """Call what only the person may."""
    return call(f"io.nanoclaw.{method}", {key: parameters.get(str(v), v) for key, v in values.items()})


def use_turn(method: str, more: Json, parameters: Json) -> str:
    """The turn of another agent's session, which runs at this moment."""
    return call(f"io.nanoclaw.Agent.{method}", {"turn": parameters["turn"], **more})


def send_large(_: Json) -> str:
    return call("io.nanoclaw.Agent.RenewTurn", {"turn": "x" * (2 << 20)})


_FINISH, _SEND = {"outcome": "answered", "replies": ["owned"]}, {"key": "k", "text": "owned"}
_ORDER = {"name": "agent", "instructions": "owned"}
_FORGED = {"channel": "terminal", "chat": "agent", "text": "owned"}
# fmt: off
PROBES = (
    Probe("rt-control", "give the person's orders", "router", partial(order, "Control.StopAll", {})),
    Probe("rt-instructions", "get new instructions", "router", partial(order, "Control.SetAgent", _ORDER)),
    Probe("rt-deliver", "forge a person's message", "router", partial(order, "Channel.Deliver", _FORGED)),
    Probe("rt-finish", "end another agent's turn", "router", partial(use_turn, "FinishTurn", _FINISH)),
    Probe("rt-send", "speak in another agent's chat", "router", partial(use_turn, "SendMessage", _SEND)),
    Probe("rt-large", "a call of 2 MiB", "router", send_large),
)
# fmt: on
