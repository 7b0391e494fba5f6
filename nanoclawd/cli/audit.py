"""The audit commands: what was asked for, decided and changed, and whether the record of it is whole."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

from nanoclawd.cli import control, output
from nanoclawd.wire import Json


def _what(row: Json) -> str:
    """Say in a line what a row is about."""
    detail = row["detail"]
    place = f"/r/{detail['route']}" if "route" in detail else detail.get("host", "")
    if row["kind"] != "request":
        return ", ".join(f"{key} {_words(value)}" for key, value in detail.items())
    return f"{detail.get('method', '')} {place}{detail.get('path', '')}".strip() or "(many)"


def _words(value: Any) -> str:
    """Return what was given of a value, without braces and what was left out."""
    if isinstance(value, dict):
        return " ".join(f"{key}={_words(each)}" for key, each in value.items() if each)
    return ",".join(map(_words, value)) if isinstance(value, list) else str(value)


def _number(key: str) -> output.Field:
    return lambda row: row["detail"].get(key, "")


def _bytes(key: str) -> output.Field:
    return lambda row: output.size(row["detail"][key]) if key in row["detail"] else ""


_COLUMNS: output.Fields = {
    "ROW": "seq",
    "TIME": lambda row: output.when(row["at"]),
    "EVENT": "event",
    "AGENT": "agent",
    "TIMES": _number("count"),
    "WHAT": _what,
    "RULE": _number("rule"),
    "STATUS": _number("status"),
    "REASON": _number("reason"),
    "CREDENTIAL": lambda row: row["detail"].get("credential", "") if row["kind"] == "request" else "",
    "UP": _bytes("upBytes"),
    "DOWN": _bytes("downBytes"),
}


def audit_list(options: Namespace) -> None:
    rows = [reply["row"] for reply in control.list_all("ListAudit", _wanted(options, options.limit))]
    for row in rows:
        row["detail"] = _parsed(row["detail"])
    output.say_list(options, "rows", rows, _COLUMNS, "There are no such rows.")


def audit_export(options: Namespace) -> None:
    """Print what is hashed as it is: times in milliseconds, details as text."""
    for reply in control.stream("ListAudit", _wanted(options, None)):
        if row := reply["row"]:
            print(json.dumps({**row, "at": round(row["at"] * 1000)}))


def audit_verify(options: Namespace) -> int:
    found = control.call("VerifyAudit")
    output.done(options, found, "")
    if not options.json:
        if found["broken"] is None:
            output.say(f"{found['rows']} rows, all in order. The newest has the hash {found['head']}.")
        else:
            output.say(
                f"{found['rows']} rows are in order. Row {found['broken']} is not: {found['problem']}."
            )
    return 0 if found["broken"] is None else 1


def _wanted(options: Namespace, limit: int | None) -> Json:
    return {"agent": options.AGENT, "kind": options.kind, "since": options.since, "limit": limit}


def _parsed(detail: str) -> Any:
    """Return what a row tells; one that somebody wrote anew need not be JSON."""
    try:
        found = json.loads(detail)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"unreadable": detail}
