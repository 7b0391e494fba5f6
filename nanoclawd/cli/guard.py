"""The guard commands: what an agent may have the router do."""

from __future__ import annotations

from argparse import ArgumentTypeError, Namespace

from nanoclawd.cli import control, output
from nanoclawd.cli.parser import UsageError
from nanoclawd.cli.table import count
from nanoclawd.privileges import Say

_COLUMNS: output.Fields = {
    "ACTION": "action",
    "": "counts",
    "SAID BY": lambda row: (
        "the agent's file" if row["agent"] else "nanoclaw.toml" if row["installation"] else ""
    ),
    "WHAT": "what",
}


def guard_show(options: Namespace) -> None:
    shown = control.call_agent("ShowGuard", options.AGENT)
    if options.json:
        return output.say_json(shown)
    output.say_table(shown["rows"], _COLUMNS)
    people = "one person" if shown["approvals"] == 1 else f"{shown['approvals']} people"
    output.talk(f"What is held waits until it is allowed by {people} ('nanoclawctl approval list').")


def guard_set(options: Namespace) -> None:
    parameters = {"name": options.AGENT}
    answer = None if options.ANSWER == "default" else options.ANSWER
    if options.ACTION == "approvals":
        try:
            parameters["approvals"] = answer and count(answer)
        except ArgumentTypeError as exc:
            raise UsageError(str(exc)) from None
        control.call("SetGuardApprovals", parameters)
    elif answer is None or answer in set(Say):
        control.call("SetGuard", {**parameters, "action": options.ACTION, "answer": answer})
    else:
        raise UsageError(f"'{answer[:32]}' is none of {', '.join(Say)}, default")
    shown = control.call_agent("ShowGuard", options.AGENT)
    output.done(options, shown, f"{options.ACTION} of '{options.AGENT}': {options.ANSWER}.")
