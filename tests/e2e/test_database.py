"""The database of the installed product: damage, upgrades and the way back, clocks that are set."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.machine import ROOT, NestedMachine
from tests.support.product import Product, unique_prefix, wait_reply

STATE = ".local/state/nanoclaw"
DATABASE = f"{STATE}/nanoclaw.db"
NEWER = "newer"  #: a checkout in the home directory with a further migration
PAUSE_S = 6.0  #: between attempts, as the echo provider asks for it

#: Zeroes the root page of a table, and what follows it for some pages if more is wanted.
ZERO = """
import sqlite3, sys
path, table, pages = sys.argv[1], sys.argv[2], int(sys.argv[3])
connection = sqlite3.connect(path)
(page,) = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,)).fetchone()
connection.close()
with open(path, "r+b") as file:
    file.seek((page - 1) * 4096)
    file.write(bytes(4096 * pages))
"""
#: Fills the inbox with much that is answered: more than SQLite keeps in memory.
FILL = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1])
now = time.time_ns() // 1_000_000
connection.executemany(
    "INSERT INTO inbox (id, session, channel, chat, thread, event, revision, sender, body, received_at,"
    " state, ended_at) SELECT ?, id, channel, chat, thread, ?, 0, 'me', ?, ?, 'answered', ?"
    " FROM session LIMIT 1",
    ((f"filled{n}", f"filled{n}", "x" * 3000, now, now) for n in range(4000)),
)
connection.commit()
"""
#: Makes the database of version 1, with an agent's session and messages that wait in it, one of them leased.
MAKE_OLD = """
import sqlite3, sys
path, schema, agent = sys.argv[1:4]
connection = sqlite3.connect(path)
connection.execute("PRAGMA journal_mode = WAL")
connection.executescript(open(schema).read())
connection.execute("INSERT INTO agent VALUES (?, 0, 0, 1)", (agent,))
connection.execute("INSERT INTO session VALUES (1, ?, 'terminal_1', 'terminal', ?, '', 1)", (agent, agent))
for n in range(3):
    connection.execute(
        "INSERT INTO inbox (id, session, channel, chat, thread, event, revision, sender, body, received_at)"
        " VALUES (?, 1, 'terminal', ?, '', ?, 0, 'me', ?, 1)", (f"old{n}", agent, f"old{n}", f"text {n}"))
connection.execute(
    "UPDATE inbox SET state = 'leased', turn = 'told', attempts = 1, lease_expires_at = 1 WHERE id = 'old0'")
connection.execute("PRAGMA application_id = 0x4E434C57")
connection.execute("PRAGMA user_version = 1")
connection.commit()
"""
#: The wall clock, ahead by as many seconds as a file says.
CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
int clock_gettime(clockid_t clock, struct timespec *time) {
  int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
  int failed = real(clock, time);
  FILE *file = clock == CLOCK_REALTIME ? fopen(getenv("CLOCK_FILE"), "re") : NULL;
  if (file) {
    long ahead = 0;
    if (fscanf(file, "%ld", &ahead) == 1) time->tv_sec += ahead;
    fclose(file);
  }
  return failed;
}
"""


@pytest.fixture(scope="module")
def installed(store: str) -> Iterator[NestedMachine]:
    """A machine for these tests alone: what they do to it, no other test should meet."""
    machine = NestedMachine(f"db-{os.getpid()}")
    machine.up("--project", str(ROOT), "--store", store)
    try:
        install(machine, machine.project)
        machine.check_journal()
        yield machine
    finally:
        machine.down()


@pytest.fixture
def host(installed: NestedMachine) -> Iterator[NestedMachine]:
    yield installed
    installed.check_journal()


@pytest.fixture
def product(host: NestedMachine) -> Iterator[Product]:
    product = Product(host, unique_prefix())
    yield product
    product.close()


def install(host: NestedMachine, checkout: str, *, check: bool = True) -> str:
    """Install from a checkout; returns what it says on stderr."""
    done = host.run(
        "./install.sh", "--yes", "--no-demo", "--no-image", cwd=checkout, check=check, timeout_s=120
    )
    return done.stderr


def nanoclawd(host: NestedMachine, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return host.run(f"{host.home}/.local/bin/nanoclawd", *options, check=check)


def answered(product: Product, agent: str) -> list[str]:
    return [str(entry["NANOCLAWD_MESSAGE"]) for entry in product.events("message-answered", agent=agent)]


def send_while_held(product: Product, agent: str, *texts: str) -> list[str]:
    """Send messages that wait until the agent is started; returns their ids."""
    product.ctl("agent", "stop", agent)
    for text in texts:
        product.ctl("send", agent, text)
    return [str(entry["NANOCLAWD_MESSAGE"]) for entry in product.events("message-queued", agent=agent)][
        -len(texts) :
    ]


def assert_given_up(host: NestedMachine) -> None:
    """The router has told who called, and ended; systemd does not start it again by itself."""
    wanted = {"ActiveState": "failed", "ExecMainStatus": "78", "NRestarts": "0"}
    host.wait_for(lambda: host.unit("nanoclaw.service", *wanted) == wanted, what="the router has given up")


# --- damage -----------------------------------------------------------------------------------------


def test_a_damaged_database_is_told_and_salvaged_by_what_the_hint_says(
    product: Product, host: NestedMachine
) -> None:
    agent = product.add()
    product.send(agent, "hello")
    waiting = send_while_held(product, agent, "first", "second")
    other = product.add("other")
    (whose,) = send_while_held(product, other, "to whom?")  # the session says, which is lost
    host.systemctl("stop", "nanoclaw.service")
    host.run("python3", "-c", ZERO, DATABASE, "session", "1")
    host.expect_journal("nanoclaw.service <[34]> ")

    told = product.ctl("status", check=False)
    assert_given_up(host)
    assert "malformed" in told.stderr
    command = re.findall("'nanoclawd (--salvage-database)'", told.stderr)
    salvaged = nanoclawd(host, *command)

    assert re.match(r"saved: \d+ agents, \d+ sessions, \d+ messages \(3 open\), ", salvaged.stdout)
    assert salvaged.stdout.endswith(f"is kept as '{host.home}/{DATABASE}.damaged-1'\n")
    host.systemctl("start", "nanoclaw.service")
    product.ctl("agent", "start", agent)
    product.ctl("agent", "start", other)
    host.wait_for(lambda: set(waiting) <= set(answered(product, agent)), within_s=60)
    assert product.send(agent, "as before") == "as before"
    assert product.send(other, "as before") == "as before"
    (dead,) = product.events("message-dead", message=whose)
    assert "there is no agent '?' any more" in dead["MESSAGE"]


def test_damage_that_nobody_meets_is_found_after_the_start(product: Product, host: NestedMachine) -> None:
    agent = product.add()
    product.send(agent, "hello")
    host.systemctl("stop", "nanoclaw.service")
    host.run("python3", "-c", ZERO, DATABASE, "inbox_first_turn", "1")
    host.expect_journal("nanoclaw.service <[34]> ")

    host.systemctl("start", "nanoclaw.service", check=False)

    assert_given_up(host)
    told = product.ctl("status", check=False)
    assert "is damaged: " in told.stderr and "--salvage-database" in told.stderr
    assert_given_up(host)
    nanoclawd(host, "--salvage-database")
    host.systemctl("start", "nanoclaw.service")
    assert product.send(agent, "as before") == "as before"


def test_damage_that_shows_while_running_stops_the_router_for_good(
    product: Product, host: NestedMachine
) -> None:
    agent = product.add()
    product.send(agent, "hello")
    host.systemctl("stop", "nanoclaw.service")
    host.run("python3", "-c", FILL, DATABASE)
    host.systemctl("start", "nanoclaw.service")
    (last,) = send_while_held(product, agent, "to be answered")
    host.expect_journal("nanoclaw.service <[34]> ")
    host.run("python3", "-c", ZERO.replace("seek((page - 1)", "seek((page + 200)"), DATABASE, "inbox", "300")

    told = product.ctl("backup", f"{host.home}/backup", check=False)

    assert told.returncode != 0 and "malformed" in told.stderr
    assert_given_up(host)
    told = product.ctl("status", check=False)
    assert told.returncode == 3 and "--salvage-database" in told.stderr
    assert_given_up(host)
    assert not host.exists(f"{host.home}/backup")
    nanoclawd(host, "--salvage-database")
    host.systemctl("start", "nanoclaw.service")
    product.ctl("agent", "start", agent)
    host.wait_for(lambda: last in answered(product, agent), within_s=60)


# --- upgrades ---------------------------------------------------------------------------------------


def newer_checkout(host: NestedMachine) -> str:
    """Make a checkout whose database has one more migration; returns its path."""
    migrations = f"{NEWER}/nanoclawd/sql/migrations"
    host.sh(f"rm -rf {NEWER}; mkdir {NEWER}")
    host.sh(
        f"cd {host.project} && cp -r install.sh nanoclawd quadlets agent-image units packaging ~/{NEWER}/"
    )
    host.sh(f"echo 'CREATE TABLE more (x INTEGER) STRICT;' > {migrations}/9999_more.sql")
    return f"{host.home}/{NEWER}"


def test_a_database_of_the_first_version_is_migrated_with_its_open_messages(
    product: Product, host: NestedMachine
) -> None:
    agent = product.add()
    product.send(agent, "hello")
    host.systemctl("stop", "nanoclaw.service", "nanoclaw-agents.slice")
    schema = f"{host.project}/nanoclawd/sql/migrations/0001_initial.sql"
    host.sh(f"rm -f {DATABASE} {DATABASE}.backup-1")
    host.run("python3", "-c", MAKE_OLD, DATABASE, schema, agent)

    host.systemctl("start", "nanoclaw-agents.slice", "nanoclaw.service")

    host.wait_for(lambda: {"old0", "old1", "old2"} <= set(answered(product, agent)), within_s=60)
    assert product.send(agent, "and new") == "and new"
    assert host.sh(f"stat -c %a {DATABASE}.backup-1") == "600"
    host.expect_journal("message-failed: the router and the agent's container ended together")


def test_an_upgrade_goes_unnoticed_by_a_turn_and_can_be_taken_back(
    product: Product, host: NestedMachine
) -> None:
    agent, held = product.add(), product.add("held")
    product.send(agent, "hello")
    runner = product.runner_pid(agent)
    (waiting,) = send_while_held(product, held, "for later")
    sending = product.send_later(agent, "/sleep 8\nslept\n/sent")
    product.wait_state(agent, "working")
    host.expect_journal("nanoclaw.service <[34]> ")

    install(host, newer_checkout(host))

    assert wait_reply(sending) == "slept\nattempt 1, already sent: nothing"
    assert product.runner_pid(agent) == runner
    (upgraded,) = product.events("database-migrated")
    version = int(upgraded["NANOCLAWD_VERSION"])

    failed = install(host, host.project, check=False)
    told = product.ctl("status", check=False)

    assert "nanoclaw.service does not start" in failed
    assert f"has version {version}, and this nanoclawd knows {version - 1}" in told.stderr
    (backup,) = re.findall("--restore-database ([^']+)'", told.stderr)
    refused = nanoclawd(host, "--restore-database", backup, check=False)
    (moves,) = re.findall("hint: first: (.*)", refused.stderr)
    host.sh(moves)
    restored = nanoclawd(host, "--restore-database", backup)
    assert restored.stdout.startswith("restored: ")
    host.systemctl("start", "nanoclaw.service")
    product.ctl("agent", "start", held)
    host.wait_for(lambda: waiting in answered(product, held), within_s=60)
    assert product.send(agent, "as before") == "as before"


# --- clocks -----------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_a_clock_that_is_set_neither_stalls_nor_rushes_an_attempt(
    product: Product, host: NestedMachine, tmp_path: Path
) -> None:
    agent = product.add()
    library = tmp_path / "clock.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", library, "-x", "c", "-"], input=CLOCK, text=True, check=True
    )
    host.sh(f"base64 -d > {host.home}/clock.so", input=b64encode(library.read_bytes()).decode())
    host.write(f"{host.home}/clock", "0")
    drop_in = f"{host.home}/.config/systemd/user/nanoclaw.service.d/50-clock.conf"
    product.write(
        drop_in,
        f"[Service]\nEnvironment=LD_PRELOAD={host.home}/clock.so CLOCK_FILE={host.home}/clock\n",
    )
    host.systemctl("daemon-reload")
    host.systemctl("restart", "nanoclaw.service")
    host.expect_journal("message-failed: ")

    def attempts_at_s(count: int) -> list[float]:
        events = host.wait_for(
            lambda: found if len(found := product.events("message-leased", agent=agent)) >= count else None,
            within_s=60,
        )
        return [int(entry["__MONOTONIC_TIMESTAMP"]) / 1e6 for entry in events]

    product.ctl("send", agent, f"/fail rate_limit {PAUSE_S}")
    for attempt, ahead_s in enumerate((-86_400, 86_400), start=1):
        host.wait_for(lambda: len(product.events("message-failed", agent=agent)) >= attempt)  # noqa: B023
        host.write(f"{host.home}/clock", str(ahead_s))
        at_s = attempts_at_s(attempt + 1)
        assert PAUSE_S * 0.9 <= at_s[attempt] - at_s[attempt - 1] <= PAUSE_S * 1.1 + 5

    assert [entry["MESSAGE"] for entry in product.events("clock-set")] == [
        "clock-set: by -86400 s, moving what waits along with it",
        "clock-set: by +172800 s, moving what waits along with it",
    ]
