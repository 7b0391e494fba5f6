"""Replies of the router, as its runner takes them from the socket: the same, however they were cut."""

from __future__ import annotations

import json
import socket
import threading
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from nanoclawd import paths
from nanoclawd.idl import Type, read_interface
from runner.host import Connection, HostAway, HostError
from tests.support.fuzz import allowed, fuzzed

AGENT = read_interface(paths.INTERFACES / "io.nanoclaw.Agent.varlink")
HELLO = AGENT.methods["Hello"].reply


def replies(reply: Type, error: str = "") -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy of replies, or of errors of that name."""
    name = {"error": f"io.nanoclaw.Agent.{error}"} if error else {}
    return allowed(AGENT, reply).map(lambda parameters: {**name, "parameters": parameters})


REPLIES = st.one_of(
    *(replies(method.reply) for method in AGENT.methods.values()),
    *(replies(error, name) for name, error in AGENT.errors.items()),
    st.just({}),
)


def heard(connection: Connection) -> Any:
    """Return what the next reply means."""
    try:
        return connection.receive()
    except (HostError, HostAway) as exc:
        return type(exc), str(exc)


@fuzzed(60)
@given(
    st.lists(REPLIES, max_size=5),
    st.lists(st.integers(0, 400), max_size=8),
    st.booleans(),
    st.data(),
)
def test_replies_mean_the_same_however_they_are_cut(
    replies: list[dict[str, Any]], cuts: list[int], ascii: bool, data: st.DataObject
) -> None:
    hello = {"parameters": data.draw(allowed(AGENT, HELLO))}
    sent = b"".join(json.dumps(r, ensure_ascii=ascii).encode() + b"\0" for r in [hello, *replies])
    edges = [0, *sorted(cut for cut in cuts if cut < len(sent)), len(sent)]
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("")  # man 7 unix: an abstract name of the kernel's choice
    listener.listen()

    def answer() -> None:
        sock, _ = listener.accept()
        with sock:
            for begin, end in pairwise(edges):
                sock.sendall(sent[begin:end])
            while sock.recv(65536):
                pass

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        connection = Connection(listener.getsockname())
        meant = [heard(connection) for _ in replies]
        connection.close()
    finally:
        thread.join()
        listener.close()

    assert connection.greeting == hello["parameters"]
    for reply, value in zip(replies, meant, strict=True):
        if "error" not in reply:
            assert value == reply.get("parameters", {})
        else:
            assert value[0] is (HostAway if reply["error"].endswith(".Unavailable") else HostError)
            assert reply["error"] in value[1]
