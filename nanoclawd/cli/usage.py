"""The usage command: what agents have used of models, and what that cost."""

from __future__ import annotations

import re
from argparse import Namespace

from nanoclawd import prices
from nanoclawd.cli import control, output
from nanoclawd.cli.parser import UsageError
from nanoclawd.wire import Json


def usage(options: Namespace) -> None:
    parameters = {"by": options.by, "agent": options.agent, "since": options.since}
    if options.agent is not None:
        control.call_agent(
            "ShowAgent", options.agent
        )  # an agent that there is not is no agent without usage
    rows = [reply["usage"] for reply in control.list_all("ListUsage", parameters)]
    output.say_list(options, "usage", rows, _columns(options.by), "No model was asked.")


def budget_set(options: Namespace) -> None:
    names = ("tokensPerDay", "tokensPerSession", "moneyPerDay", "moneyPerSession", "requestsPerMinute")
    given = {name: getattr(options, re.sub("([A-Z])", r"_\1", name).lower()) for name in names}
    if all(value is None for value in given.values()):
        raise UsageError("nothing to change", hint="'nanoclawctl budget set --help' lists what there is")
    reply = control.call_agent("SetBudget", options.AGENT, {"budget": given})
    if options.json:
        return output.say_json(reply)
    output.say_document(shown(reply["budget"]))


def shown(budget: Json) -> Json:
    """Return a budget with its amounts as people write them."""
    return {
        name: prices.show(value) if name.startswith("money") and value is not None else value
        for name, value in budget.items()
    }


def _columns(by: str) -> output.Fields:
    names: output.Fields = {"AGENT": "agent", "SESSION": "session"} if by == "session" else {by.upper(): by}
    if by == "day":
        names = {"DAY": lambda row: row["day"] or "before"}
    left: output.Fields = {} if by == "day" else {"LEFT TODAY" if by == "agent" else "LEFT": _left}
    return {
        **names,
        "CALLS": "calls",
        "INPUT": "input",
        "OUTPUT": "output",
        "CACHE WRITE": "cacheWrite",
        "CACHE READ": "cacheRead",
        "MONEY": lambda row: prices.show(row["microdollars"]),
        **left,
        "NOTE": _note,
    }


def _left(row: Json) -> str:
    tokens, money = row["tokensLeft"], row["microdollarsLeft"]
    words = [prices.show(money)] if money is not None else []
    return ", ".join([*words, *([f"{tokens} tokens"] if tokens is not None else [])])


def _note(row: Json) -> str:
    notes = {"estimated": row["estimated"], "without a price, counted as the dearest": row["unpriced"]}
    return "; ".join(f"{count} {what}" for what, count in notes.items() if count)
