"""Tries to get out of the container that it runs in, in the model's place: `nanoclawctl selftest`.

    containment probe < PARAMETERS    prints a JSON list of what became of each row of PROBES
    containment flood BYTES           takes so much memory, and prints "survived" if it may
    containment shout LINES           writes so many to the journal
    containment stay                  starts processes that are deaf to signals, prints "deaf", and stays
    containment control < PARAMETERS  on the host, unconfined: which rows can tell nothing here, and why

PARAMETERS are what the host has put up to be found: listeners, sockets, files, processes. Run as a
directory; needs nothing but Python.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

if not __package__:  # run as a directory, which is then in the path: the package's own parent must be
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from runner.containment import suite


def flood(size: int) -> None:
    piece = array.array("B", bytes(1 << 20))
    taken = [array.array("B", piece) for _ in range(size >> 20)]
    print("survived", len(taken))


def shout(lines: int) -> None:
    for number in range(lines):
        print(f"flood {number}", file=sys.stderr)
    print("shouted")


def stay() -> None:
    for _ in range(3):
        if os.fork() == 0:
            os.setsid()
            break
    for number in range(1, signal.NSIG):
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_IGN)
    print("deaf", flush=True)
    while True:
        time.sleep(1)


def main(arguments: list[str]) -> None:
    match arguments:
        case ["probe"]:
            parameters = json.load(sys.stdin)
            print(f"<0>{parameters['token']}", file=sys.stderr)  # an emergency, if it is believed
            print(json.dumps([suite.run(probe, parameters) for probe in suite.PROBES]))
        case ["control"]:
            print(json.dumps(suite.absent_here(json.load(sys.stdin))))
        case ["flood", size]:
            flood(int(size))
        case ["shout", lines]:
            shout(int(lines))
        case ["stay"]:
            stay()
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
