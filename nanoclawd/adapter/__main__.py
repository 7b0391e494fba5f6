"""nanoclaw-adapter: begins in an adapter's unit, gives it its credential, and becomes the adapter.

Talks to:   systemd's credential service; the router, on the channel's socket, to tell what of the sandbox
            holds.
May touch:  the channel's file and credential, read-only; the directory where the adapter finds it opened.
Trusts:     the unit with what it shows: there is one channel's of each.
On trouble: says why and exits; systemd starts it again, later each time, unless somebody must edit a file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from nanoclawd import channelfile, credentials, files, journal, paths, sandbox
from nanoclawd.client import Client
from nanoclawd.errors import ConfigError, NanoclawError, NotFound, Unavailable
from nanoclawd.files import read_text
from nanoclawd.ids import ChannelName, parse_channel_name
from nanoclawd.wire import VarlinkError

EXIT_CONFIG = 78  # EX_CONFIG of sysexits.h: systemd does not restart
ROUTER_S = 60.0  #: the router may be about to start


def main() -> NoReturn:
    """Become the adapter of the channel that the only argument names."""
    try:
        credentials.never_dump_core()
        name = parse_channel_name(sys.argv[1])
        path = paths.channels() / f"{name}.toml"
        program = channelfile.find_program(channelfile.parse_channel(read_text(path), path).kind)
        _report_sandbox(name, sandbox.run_checks(sandbox.ADAPTER))
        _place_login(name)
        os.execv(program, [os.fspath(program)])
    except OSError as exc:
        _fail(f"the adapter cannot be run: {exc}", EXIT_CONFIG)
    except NanoclawError as exc:
        _fail(str(exc), EXIT_CONFIG if isinstance(exc, ConfigError) else 1)


def _fail(why: str, status: int) -> NoReturn:
    journal.error("adapter-not-started", why)
    sys.exit(status)


def _place_login(name: ChannelName) -> None:
    """Write the credential, if there is one, to where the adapter looks. Raises NanoclawError."""
    directory = Path(os.environ["RUNTIME_DIRECTORY"])
    os.environ["CREDENTIALS_DIRECTORY"] = str(directory)
    login = directory / "login"
    try:
        value = credentials.read(channelfile.credential_of(name))
    except NotFound:
        files.remove_file(login)
    else:
        files.write_bytes(login, value.reveal())


def _report_sandbox(name: ChannelName, checks: Sequence[sandbox.Check]) -> None:
    """Tell the router what holds. Raises ConfigError if it says that this is not enough."""
    shown = [{"name": check.name, "active": check.active, "detail": check.detail} for check in checks]
    try:
        with Client(paths.channel_socket(name), timeout_s=ROUTER_S) as client:
            client.call("io.nanoclaw.Channel.ReportSandbox", {"checks": shown})
    except VarlinkError as exc:
        if exc.name.endswith(".ConfigError"):
            raise ConfigError(exc.parameters["message"], hint=exc.parameters["hint"]) from exc
        raise Unavailable(f"the router answers {exc.name}") from exc


if __name__ == "__main__":
    main()
