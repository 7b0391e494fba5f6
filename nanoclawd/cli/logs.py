"""The journal of the daemons, of an agent's sessions, or of what an agent's own programs wrote."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import NoReturn

from nanoclawd.cli import control, output
from nanoclawd.cli.parser import UsageError
from nanoclawd.errors import Failed
from nanoclawd.ids import parse_agent_name

#: Runs a command as a uid of the host that podman's namespace maps. Its first argument is the uid.
_AS = """
while read -r inside outside count; do
  if [ "$1" -ge "$outside" ] && [ "$1" -lt "$((outside + count))" ]; then
    uid=$(($1 - outside + inside)) && shift && exec setpriv --reuid="$uid" --clear-groups "$@"
  fi
done < /proc/self/uid_map
echo "there is no uid $1" >&2 && exit 1
"""


def logs(options: Namespace) -> NoReturn:
    """Become journalctl(1): its pager, colours and keys are what people know."""
    if options.AGENT is None:
        if options.inside:
            raise UsageError("--inside is about an agent: name it")
        units = ["nanoclaw.service", "nanoclaw-gateway.service", "nanoclaw-channel@*.service"]
    else:
        units = [f"nanoclaw-{parse_agent_name(options.AGENT)}@*.service"]
    arguments = ["journalctl", "--user", *(f"--unit={unit}" for unit in units)]
    if options.inside:
        arguments = own_journal(control.call_agent("ShowAgent", options.AGENT)["runtime"]["hostUid"])
    elif options.AGENT is not None and not options.json:
        output.talk("What its own programs wrote is apart: --inside.")
    flags = {"--follow": options.follow, "--output=json": options.json}
    become([*arguments, f"--lines={options.lines}", *(flag for flag, wanted in flags.items() if wanted)])


def own_journal(host_uid: int) -> list[str]:
    """Return the journalctl(1) that shows what processes of an agent's uid wrote.

    The person's own journal has none of it. journald keeps a file for the other uid, which that may read; so
    whoever may not read all of the journal becomes it. Where journald keeps none (it is not persistent,
    or takes the uid for a container of systemd-nspawn) this shows nothing.
    """
    command = ["journalctl", f"_UID={host_uid}"]
    for place in ("/var/log/journal", "/run/log/journal"):
        if any(os.access(file, os.R_OK) for file in Path(place).glob("*/system.journal")):
            return command
    return ["podman", "unshare", "sh", "-c", _AS, "sh", str(host_uid), *command]


def become(arguments: list[str]) -> NoReturn:
    """Replace this process by another program. Raises Failed if there is none."""
    try:
        os.execvp(arguments[0], arguments)
    except OSError as exc:
        hint = "'nanoclawctl doctor' checks what is needed"
        raise Failed(f"cannot run {arguments[0]}: {exc.strerror}", hint=hint) from exc
