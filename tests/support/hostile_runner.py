"""Runs in the runner's place, in a container or beside a router under test, and breaks every rule there is.

    hostile_runner.py KIND [SOCKET [ARGUMENT]]

Says ready where systemd asks for it, does what KIND's function here does, prints one line of JSON about what
it saw, and then stays, deaf to SIGTERM. Needs nothing but Python.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

AGENT = "io.nanoclaw.Agent"
FLOOD_S = 2.0
MIB = 1 << 20
#: Longer than the router lets anybody wait who has a right to an answer: whoever hears nothing is not heard.
DEAF_S = 3.0

Seen = dict[str, Any]
_streams: list[Line] = []


class Line:
    """One connection to the router."""

    def __init__(self, *, hello: bool = True, timeout_s: float = DEAF_S) -> None:
        self.buffer = b""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(timeout_s)
        self.sock.connect(path)
        if hello:
            self.call("Hello", protocol=1, version="x")

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def say(self, method: str, *, flags: dict[str, Any] | None = None, **parameters: Any) -> None:
        name = method if "." in method else f"{AGENT}.{method}"
        self.send(json.dumps({"method": name, "parameters": parameters, **(flags or {})}).encode() + b"\0")

    def hear(self) -> dict[str, Any] | None:
        """Return the next reply, None at the end. Raises TimeoutError."""
        while b"\0" not in self.buffer:
            try:
                data = self.sock.recv(MIB)
            except ConnectionError:
                return None
            if not data:
                return None
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        reply: dict[str, Any] = json.loads(message)
        return reply

    def call(self, method: str, **parameters: Any) -> str:
        """Return the name of the error, "ok", or "hung up"."""
        self.say(method, **parameters)
        return outcome(self.hear())

    def close(self) -> None:
        self.sock.close()


def outcome(reply: dict[str, Any] | None) -> str:
    if reply is None:
        return "hung up"
    return str(reply.get("error", "ok")).rpartition(".")[2]


def take_turn() -> dict[str, Any]:
    """Ask for work and return the turn that comes. The stream stays open."""
    stream = Line(timeout_s=30)
    stream.say("Work", flags={"more": True})
    reply = stream.hear()
    assert reply is not None, "no turn"
    turn: dict[str, Any] = reply["parameters"]["turn"]
    _streams.append(stream)
    return turn


def until_cut_off(offend: Callable[[Line], str], *, hello: bool = True) -> Seen:
    """Offend, on a new connection after each hang-up, until nobody listens any more."""
    answers: dict[str, int] = {}
    line: Line | None = None
    try:
        for _ in range(1000):
            line = line or Line(hello=hello)
            answer = offend(line)
            answers[answer] = answers.get(answer, 0) + 1
            if answer == "hung up":
                line.close()
                line = None
    except OSError as exc:  # TimeoutError is one
        answers["cut off"] = 1
        answers[type(exc).__name__] = 1
    return {"answers": answers}


def last_words(line: Line) -> str:
    """Return "hung up" after whatever is said before that."""
    while line.hear() is not None:
        pass
    return "hung up"


def for_a_while(action: Callable[[], object]) -> int:
    """Repeat for FLOOD_S; return how often it went."""
    until, count = time.monotonic() + FLOOD_S, 0
    while time.monotonic() < until:
        action()
        count += 1
    return count


# --- what breaks the contract: cut off ----------------------------------------------------------------


def forged_turns() -> Seen:
    """Turn ids that nobody gave out."""
    turn = take_turn()
    forged = [
        "",
        turn["id"][:-1],
        turn["id"] + "x",
        "%",
        "' OR 1=1 --",
        "../x",
        "t" * 100_000,
        turn["id"].upper(),
    ]
    calls: list[tuple[str, Seen]] = [
        ("RenewTurn", {}),
        ("SendMessage", {"key": "k", "text": "forged"}),
        ("FinishTurn", {"outcome": "answered", "replies": ["forged"]}),
        ("ReportActivity", {"kind": "text", "text": "forged"}),
    ]
    number = iter(range(10**6))

    def offend(line: Line) -> str:
        n = next(number)
        method, parameters = calls[n % len(calls)]
        return line.call(method, turn=forged[n % len(forged)], **parameters)

    return until_cut_off(offend)


def foreign_turn() -> Seen:
    """The turn of another session, whose id is argument."""
    take_turn()
    line = Line()
    turn = argument
    return {
        "answers": [
            line.call("RenewTurn", turn=turn),
            line.call("SendMessage", turn=turn, key="k", text="foreign"),
            line.call("ReportActivity", turn=turn, kind="text", text="foreign"),
            line.call("FinishTurn", turn=turn, outcome="answered", replies=["foreign"]),
            line.call("FinishTurn", turn=turn, outcome="stopped", replies=[]),
        ]
    }


def acknowledge_twice() -> Seen:
    """Ends its turn again and again, with another answer each time."""
    turn = take_turn()
    number = iter(range(10**6))

    def offend(line: Line) -> str:
        return line.call(
            "FinishTurn", turn=turn["id"], outcome="answered", replies=[f"answer {next(number)}"]
        )

    return until_cut_off(offend)


def wrong_types() -> Seen:
    """Unknown methods, interfaces and fields; parameters of every wrong type."""
    turn = take_turn()
    values: list[Any] = [
        None,
        True,
        1,
        1.5,
        1e300,
        -(1 << 70),
        "x",
        "\0",
        "\ud83d\ude00",
        [],
        ["x"],
        {},
        {"x": {}},
    ]
    calls: list[tuple[str, Seen]] = [
        ("Nothing", {}),
        ("io.nanoclaw.Control.RemoveAgent", {"name": "berta"}),
        ("io.nanoclaw.Channel.Deliver", {}),
        ("org.varlink.service.GetInterfaceDescription", {"interface": 5}),
        ("Work", {}),  # without "more"
        ("Hello", {"protocol": 1}),
        ("Goodbye", {"stay": True}),
        *(("RenewTurn", {"turn": value}) for value in values if not isinstance(value, str)),
        *(("FinishTurn", {"turn": turn["id"], "outcome": value, "replies": []}) for value in values),
        *(
            ("FinishTurn", {"turn": turn["id"], "outcome": "answered", "replies": value})
            for value in ["x", [1], 5]
        ),
        *(("SendMessage", {"turn": turn["id"], "key": "k", "text": "x", "x" * n: n}) for n in (1, 100_000)),
    ]
    number = iter(range(10**6))

    def offend(line: Line) -> str:
        method, parameters = calls[next(number) % len(calls)]
        return line.call(method, **parameters)

    return until_cut_off(offend)


def malformed() -> Seen:
    """What is no call at all."""
    take_turn()
    begin = b'{"method":"io.nanoclaw.Agent.RenewTurn","parameters":{"turn":'
    pieces = [
        b"\0",
        b"GET / HTTP/1.1\r\n\r\n\0",
        b"[]\0",
        b"{}\0",
        b'{"method":5}\0',
        b'{"method":"\xff\xfe"}\0',
        begin + b"[" * 1000 + b"]" * 1000 + b"}}\0",
        begin + b"[" * 500_000 + b"}}\0",
        begin + b"[" + b"[]," * 300_000 + b"[]]}}\0",
        begin + b"9" * 5000 + b"}}\0",
        begin + b"1e999,NaN}}\0",
        begin + b'"\\ud800"}}\0',
        b'{"method":"a.B","more":1}\0',
        b'{"method":"a.B","parameters":[]}\0',
        b"x" * (MIB + 1),
    ]
    number = iter(range(10**6))

    def offend(line: Line) -> str:
        with suppress(BrokenPipeError):
            line.send(pieces[next(number) % len(pieces)])
        return last_words(line)

    return until_cut_off(offend)


def endless_line() -> Seen:
    """A message of 100 MB, again and again."""
    take_turn()
    sent = 0

    def offend(line: Line) -> str:
        nonlocal sent
        with suppress(BrokenPipeError):
            line.send(b'{"method":"')
            for _ in range(100):
                line.send(b"y" * MIB)
                sent += MIB
        return last_words(line)

    return until_cut_off(offend) | {"sent": sent}


def many_items() -> Seen:
    """A long list where one is expected: most of its cost comes after the parser."""
    turn = take_turn()
    parameters = b'"turn":"%s","outcome":"answered","replies":[' % turn["id"].encode()
    call = b'{"method":"io.nanoclaw.Agent.FinishTurn","parameters":{%s' % parameters
    data = call + b'"",' * 300_000 + b'""]}}\0'

    def offend(line: Line) -> str:
        line.send(data)
        return outcome(line.hear())

    return until_cut_off(offend)


def no_hello() -> Seen:
    """Asks for work without an introduction."""
    methods = iter(["RenewTurn", "Work", "Goodbye", "FinishTurn"] * 1000)

    def offend(line: Line) -> str:
        parameters: dict[str, Seen] = {
            "RenewTurn": {"turn": "x"},
            "FinishTurn": {"turn": "x", "outcome": "answered", "replies": []},
        }
        method = next(methods)
        line.say(method, flags={"more": True}, **parameters.get(method, {}))
        return outcome(line.hear())

    return until_cut_off(offend, hello=False)


def descriptors() -> Seen:
    """Sends descriptors of everything that may hurt whoever opens, reads or closes it."""
    take_turn()
    os.mkfifo("/tmp/hostile.fifo")
    sparse = os.open("/tmp/hostile.sparse", os.O_RDWR | os.O_CREAT)
    with suppress(OSError):  # where it may not be so large
        os.truncate(sparse, 1 << 42)
    opened = [
        os.open("/tmp/hostile.fifo", os.O_RDWR),
        os.open("/dev/zero", os.O_RDWR),
        os.open("/", os.O_RDONLY),
        os.open("/proc/self/mem", os.O_RDWR),
        sparse,
        *os.pipe(),
        socket.socket(socket.AF_UNIX).detach(),
    ]
    for name in ("/tmp/hostile.fifo", "/tmp/hostile.sparse"):
        os.unlink(name)
    number = iter(range(10**6))

    def offend(line: Line) -> str:
        n = next(number)
        call = json.dumps({"method": f"{AGENT}.RenewTurn", "parameters": {"turn": "x"}}).encode() + b"\0"
        try:
            socket.send_fds(line.sock, [call], opened * 30 if n % 2 else [opened[n % len(opened)]])
        except PermissionError:  # man 7 unix does not know SO_PASSRIGHTS yet
            line.send(call)
            return f"not sent, {outcome(line.hear())}"
        except BrokenPipeError:
            return "hung up"
        return outcome(line.hear())

    return until_cut_off(offend)


def no_reading() -> Seen:
    """Asks and asks, on all its connections, and never reads an answer."""
    take_turn()
    call = {"method": "org.varlink.service.GetInterfaceDescription", "parameters": {"interface": AGENT}}
    data = (json.dumps(call) + "\0").encode() * 100
    until = time.monotonic() + 120

    def ask() -> None:
        with suppress(OSError):
            while time.monotonic() < until:
                line = Line(timeout_s=60)
                with suppress(ConnectionError):
                    while True:
                        line.send(data)
                line.close()

    together(ask, 3)
    return {}


# --- what is too much, and allowed in small doses: slowed down ------------------------------------------


def heartbeats() -> Seen:
    """Renews its lease as fast as it can, on three connections."""
    turn = take_turn()
    counts: list[int] = []

    def flood() -> None:
        line = Line(timeout_s=30)
        counts.append(for_a_while(lambda: line.call("RenewTurn", turn=turn["id"])))

    together(flood, 3)
    return {"calls": sum(counts)}


def activity() -> Seen:
    """Reports 4 KiB of activity as fast as it can, and waits for no answer."""
    turn = take_turn()
    line = Line(timeout_s=30)
    text = "x" * 4096
    flags = {"oneway": True}
    said = for_a_while(
        lambda: line.say("ReportActivity", flags=flags, turn=turn["id"], kind="text", text=text)
    )
    line.call("RenewTurn", turn=turn["id"])
    return {"calls": said}


def messages() -> Seen:
    """Sends more than it may: bad keys, the same key with another text, texts that are too long or blank."""
    turn = take_turn()
    line = Line(timeout_s=30)
    answers: dict[str, int] = {}

    def send(key: str, text: str) -> None:
        answer = line.call("SendMessage", turn=turn["id"], key=key, text=text)
        answers[answer] = answers.get(answer, 0) + 1

    for key in ("", "x" * 65, "a/b", "a b", "é", "../x", "a\n"):
        send(key, "bad key")
    for text in ("", " \n\t", "x" * (256 << 10) + "x", "é" * (128 << 10) + "x"):
        send("long", text)
    for n in range(300):
        send("same", f"text {n}")
    for n in range(300):
        send(f"k{n}", "x" * 1000)
    return {"answers": answers}


def large_calls() -> Seen:
    """Calls of 1 MiB as fast as it can; they are refused only when all of it was looked at."""
    turn = take_turn()
    line = Line(timeout_s=60)
    text = "\\" * (MIB // 2 - 200)
    calls = for_a_while(lambda: line.call("SendMessage", turn=turn["id"], key="k", text=text))
    return {"calls": calls}


def works() -> Seen:
    """Asks for work on one connection after the other, each time instead of the last one."""
    turn = take_turn()
    seen: list[str] = []

    def ask() -> None:
        line = Line(timeout_s=30)
        line.say("Work", flags={"more": True})
        reply = line.hear()
        assert reply is not None
        if "parameters" in reply and reply["parameters"].get("turn"):
            seen.append(reply["parameters"]["turn"]["id"])
        line.close()

    calls = for_a_while(ask)
    return {"calls": calls, "same": set(seen) <= {turn["id"]}}


def connections() -> Seen:
    """Connects and hangs up as fast as it can."""
    take_turn()

    def connect() -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)

    return {"calls": for_a_while(connect)}


def goodbyes() -> Seen:
    """Fails its turn, and says good-bye again and again while that waits for its next attempt."""
    turn = take_turn()
    line = Line(timeout_s=30)
    error = {"code": "internal", "message": "no", "retryable": True}
    line.call("FinishTurn", turn=turn["id"], outcome="failed", replies=[], error=error)
    stays: list[bool] = []

    def leave() -> None:
        line.say("Goodbye")
        reply = line.hear()
        assert reply is not None
        stays.append(reply["parameters"]["stay"])

    calls = for_a_while(leave)
    return {"calls": calls, "stays": sum(stays)}


# --- what holds something open: bounded, and harmless ---------------------------------------------------


def half_messages() -> Seen:
    """Begins messages on more connections than it may have, and ends none."""
    take_turn()
    held = []
    for _ in range(20):
        line = Line(hello=False, timeout_s=0.2)
        with suppress(OSError):  # what the kernel does not take
            for _ in range(10):
                line.send(b'{"method":"' + b"x" * 100_000)
        held.append(line)
    time.sleep(FLOOD_S)
    return {"held": len(held)}


def slow_writing() -> Seen:
    """One byte at a time."""
    turn = take_turn()
    line = Line(timeout_s=30)
    call = json.dumps({"method": f"{AGENT}.RenewTurn", "parameters": {"turn": turn["id"]}}).encode() + b"\0"
    for byte in call:
        line.send(bytes([byte]))
        time.sleep(FLOOD_S / len(call))
    return {"answers": [outcome(line.hear())]}


def never_works() -> Seen:
    """Says hello again and again, and asks for nothing."""
    line = Line(hello=False)

    def hello() -> None:
        line.call("Hello", protocol=1, version="x")
        time.sleep(0.01)

    return {"calls": for_a_while(hello)}


def silent() -> Seen:
    """Connects, and says nothing at all."""
    held = [Line(hello=False) for _ in range(10)]
    time.sleep(FLOOD_S)
    return {"held": len(held)}


def leaves() -> Seen:
    """Takes a turn and exits at once."""
    take_turn()
    os._exit(1)


def ugly_failure() -> Seen:
    """Fails with words that are no fit for a person."""
    turn = take_turn()
    text = "\x1b]0;owned\x07\x1b[2J" + "\u202e" + "Traceback:\n" * 5000
    error = {
        "code": "x" * 5000 + "\x1b[31m",
        "message": text,
        "retryable": False,
        "retryAfterSeconds": -1e300,
    }
    return {
        "answers": [Line().call("FinishTurn", turn=turn["id"], outcome="failed", replies=[], error=error)]
    }


def bad_files() -> Seen:
    """Fills its workspace and its session's directory with what must not be opened."""
    for place in ("/workspace", "/session"):
        if os.path.lexists(f"{place}/fifo"):  # it was here before
            continue
        os.mkfifo(f"{place}/fifo")
        os.symlink("/etc/passwd", f"{place}/link")
        os.symlink("/", f"{place}/root")
        os.symlink("loop", f"{place}/loop")
        with open(f"{place}/sparse", "wb") as file, suppress(OSError):
            file.truncate(1 << 42)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(f"{place}/socket")
        deep = place
        for _ in range(200):
            deep += "/" + "d" * 15
            os.mkdir(deep)
        os.mkdir(f"{place}/closed", 0o000)
        with suppress(PermissionError):
            os.mknod(f"{place}/device", 0o020666, os.makedev(1, 5))
    turn = take_turn()
    return {"answers": [Line().call("FinishTurn", turn=turn["id"], outcome="answered", replies=["done"])]}


def noise() -> Seen:
    """Fills the journal with errors of its own making, and then breaks the protocol."""
    take_turn()
    for _ in range(100):
        os.write(2, b"<3>noise\n" * 100)
    return until_cut_off(lambda line: line.call("Nothing"))


# --- the program ----------------------------------------------------------------------------------------


def together(action: Callable[[], None], count: int) -> None:
    threads = [threading.Thread(target=action) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def kinds() -> Iterator[str]:
    """Name the hostilities: the public functions here that tell what they saw."""
    for name, value in globals().items():
        if getattr(value, "__annotations__", {}) == {"return": "Seen"}:
            yield name


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"READY=1", address)
    try:
        seen: Seen = globals()[kind]()
    except OSError as exc:
        seen = {"ended": repr(exc)}
    print(json.dumps({"kind": kind, **seen}), flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    kind, path, argument = [*sys.argv[1:], *["", "/run/nanoclaw/host.sock", ""][len(sys.argv) - 1 :]]
    main()
