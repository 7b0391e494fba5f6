"""The person's side of a verification on this machine: shows the emoji and takes the answer.

    adapter verify STATE_DIRECTORY

Talks to the running adapter by files in its state, which only its person can write: what comes from the
homeserver must not be able to say yes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from nanoclaw_matrix.verification import ANSWER, QUESTION


def confirm(arguments: list[str]) -> int:
    """Ask about the verification that waits, if there is one; returns the exit status."""
    if len(arguments) != 2 or arguments[0] != "verify":
        print("usage: adapter verify STATE_DIRECTORY", file=sys.stderr)
        return 2
    directory = Path(arguments[1])
    try:
        question = json.loads((directory / QUESTION).read_text())[0]
    except FileNotFoundError:
        print("No verification waits for you. Begin it in your client.", file=sys.stderr)
        return 1
    print(
        f"{question['account']}, device {question['device']}, must see the same:\n\n  {question['emoji']}\n"
    )
    answer = input("Does your client show these, in this order? [y/N] ").strip().lower()
    new = directory / f"{ANSWER}.new"
    new.write_text(json.dumps({"id": question["id"], "same": answer in ("y", "yes")}))
    os.replace(new, directory / ANSWER)
    print("Confirm in your client, too." if answer in ("y", "yes") else "Refused.")
    return 0
