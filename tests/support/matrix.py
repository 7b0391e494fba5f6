"""A Matrix homeserver on a machine's loopback, and people with a client of their own there.

Both run out here, in the machine's network: a machine needs neither of their packages, and the homeserver's
database can be asked what is really in a room.
"""

from __future__ import annotations

import itertools
import json
import os
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from tests.support.machine import ROOT, NestedMachine

PREPARE = ROOT / "tests/matrix/prepare"
PREPARE_S = 900
PORT = 8008
URL = f"http://127.0.0.1:{PORT}"
SERVER = "test.local"
PASSWORD = "correct horse"
START_S = 60
CALL_S = 60.0

Json = dict[str, Any]
T = TypeVar("T")

CONFIG = """\
server_name: {server}
listeners:
  - {{port: {port}, type: http, tls: false, bind_addresses: ['127.0.0.1'],
     resources: [{{names: [client], compress: false}}]}}
database: {{name: sqlite3, args: {{database: {directory}/homeserver.db}}}}
media_store_path: {directory}/media
signing_key_path: {directory}/signing.key
report_stats: false
trusted_key_servers: []
enable_registration: true
enable_registration_without_verification: true
macaroon_secret_key: test
form_secret: test
rc_message: &free {{per_second: 1000, burst_count: 1000}}
rc_registration: *free
rc_room_creation: *free
rc_login: {{address: *free, account: *free, failed_attempts: *free}}
rc_joins: {{local: *free}}
rc_invites: {{per_room: *free, per_user: *free, per_issuer: *free}}
presence: {{enabled: false}}
federation_domain_whitelist: []
log_config: {directory}/log.yaml
{more}"""
LOG = """\
version: 1
handlers: {c: {class: logging.StreamHandler}}
root: {level: WARNING, handlers: [c]}
disable_existing_loggers: false
"""


def prepared() -> Path:
    """Return where homeserver, client and wheels are; fetched if need be."""
    made = subprocess.run([PREPARE], stdout=subprocess.PIPE, text=True, check=True, timeout=PREPARE_S)
    return Path(made.stdout.strip())


class Homeserver:
    """Synapse with SQLite. Use as a context manager."""

    def __init__(self, machine: NestedMachine, programs: Path) -> None:
        self.machine, self.programs = machine, programs
        self.network = ("nsenter", "--target", str(machine.pid()), "--net", "--")
        self._place = tempfile.TemporaryDirectory(prefix="nc-matrix-")
        self.directory = Path(self._place.name)
        self._process: subprocess.Popen[bytes] | None = None
        self._names = itertools.count(1)

    def __enter__(self) -> Homeserver:
        self.configure()
        (self.directory / "log.yaml").write_text(LOG)
        subprocess.run(
            [self.programs / "homeserver/bin/generate_signing_key", "-o", self.directory / "signing.key"],
            check=True,
        )
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._place.cleanup()

    def configure(self, more: str = "") -> None:
        """Write its configuration, with `more` at its end; it takes effect at the next start."""
        text = CONFIG.format(server=SERVER, port=PORT, directory=self.directory, more=more)
        (self.directory / "homeserver.yaml").write_text(text)

    def start(self) -> None:
        python = self.programs / "homeserver/bin/python"
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *self.network,
                    python,
                    "-m",
                    "synapse.app.homeserver",
                    "-c",
                    self.directory / "homeserver.yaml",
                ],
                cwd=self.directory,
                stdout=log,
                stderr=log,
            )
        wait_until(self._answers, within_s=START_S, what="the homeserver answers")

    def stop(self) -> None:
        """End it; what it was told is kept for the next start."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError((self.directory / "log").read_text()[-3000:])
        asked = subprocess.run(
            [
                *self.network,
                "python3",
                "-c",
                f"import urllib.request as u; u.urlopen('{URL}/_matrix/client/versions')",
            ],
            check=False,
            stderr=subprocess.DEVNULL,
        )
        return asked.returncode == 0

    def register(self, name: str) -> str:
        """Make an account and return its id; the number behind its name is new."""
        user = f"{name}{next(self._names)}"
        body = json.dumps({"username": user, "password": PASSWORD, "auth": {"type": "m.login.dummy"}})
        script = (
            "import sys, urllib.request as u; u.urlopen(u.Request(sys.argv[1], sys.argv[2].encode(), "
            "{'Content-Type': 'application/json'}))"
        )
        url = f"{URL}/_matrix/client/v3/register?inhibit_login=true"
        line = [*self.network, "python3", "-c", script, url, body]
        subprocess.run(line, check=True, env={**os.environ, "PYTHONWARNINGS": ""})
        return f"@{user}:{SERVER}"

    def ask(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """Return rows of its database."""
        database = sqlite3.connect(f"file:{self.directory}/homeserver.db?mode=ro", uri=True)
        try:
            return database.execute(sql, values).fetchall()
        finally:
            database.close()

    def sent(self, room: str, sender: str, kind: str | None = None) -> list[str]:
        """Return the ids of all events that an account has sent into a room, from the database."""
        rows = self.ask(
            "SELECT event_id FROM events WHERE room_id = ? AND sender = ? AND type = coalesce(?, type)"
            " AND state_key IS NULL ORDER BY stream_ordering",
            room,
            sender,
            kind,
        )
        return [event for (event,) in rows]

    def transactions(self) -> tuple[int, int]:
        """Return how many events all adapters have sent, and how many different transactions these are."""
        ((sent, once),) = self.ask(
            "SELECT count(*), count(DISTINCT room_id || json_extract(internal_metadata, '$.txn_id'))"
            " FROM event_json WHERE json_extract(internal_metadata, '$.txn_id') LIKE 'nc-%'"
        )
        return sent, once


class Person:
    """Somebody with a client: matrix-js-sdk in a process of its own. Use as a context manager."""

    def __init__(self, homeserver: Homeserver, user: str) -> None:
        self.user = user
        self.device = ""
        self._homeserver = homeserver
        self._numbers = itertools.count(1)
        self._answers: dict[int, SimpleQueue[Json]] = {}
        client = homeserver.programs / "client/client.mjs"
        client.write_bytes((ROOT / "tests/matrix/client.mjs").read_bytes())
        self._process = subprocess.Popen(
            [*homeserver.network, homeserver.programs / "node", client],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Person:
        self.device = self.do("login", url=URL, user=self.user, password=PASSWORD)["device"]
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            self._answers[answer["id"]].put(answer)

    def do(self, command: str, /, **parameters: Any) -> Any:
        """Have the client do something of client.mjs, and return what it says."""
        number = next(self._numbers)
        self._answers[number] = SimpleQueue()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"id": number, "do": command, **parameters}) + "\n")
        try:
            answer = self._answers[number].get(timeout=CALL_S)
        except Empty:
            raise AssertionError(f"{self.user}: no end of {command} in {CALL_S} s") from None
        finally:
            del self._answers[number]
        if "error" in answer:
            raise AssertionError(f"{self.user}: {command}: {answer['error']}")
        return answer["result"]

    def say(self, room: str, text: str, **content: Any) -> str:
        """Send a text and return its event."""
        event: str = self.do("send", room=room, content={"msgtype": "m.text", "body": text, **content})
        return event

    def timeline(self, room: str) -> list[Json]:
        events: list[Json] = self.do("timeline", room=room)
        return events

    def heard(self, room: str, sender: str) -> list[Json]:
        """Return the messages of an account, as this client shows them."""
        return [
            event
            for event in self.timeline(room)
            if event["sender"] == sender
            and event["type"] == "m.room.message"
            and not event["redacted"]
            and event["content"].get("m.relates_to", {}).get("rel_type") != "m.replace"
        ]

    def wait_heard(self, room: str, sender: str, count: int = 1, *, within_s: float = 60) -> list[Json]:
        """Wait until that many messages of an account are there, and return them."""
        return wait_until(
            lambda: messages if len(messages := self.heard(room, sender)) >= count else None,
            within_s=within_s,
            what=f"{count} messages of {sender}",
        )

    def wait_text(self, room: str, sender: str, text: str, *, within_s: float = 60) -> Json:
        """Wait for a message of an account that holds `text`, and return it."""
        return wait_until(
            lambda: next(
                (e for e in self.heard(room, sender) if text in e["content"].get("body", "")), None
            ),
            within_s=within_s,
            what=f"'{text}' of {sender}",
        )


def transcript(person: Person, homeserver: Homeserver) -> str:
    """Return what was said in all rooms of somebody, as their client shows it, and what was sent twice."""
    lines = []
    for number, room in enumerate(person.do("rooms"), 1):
        events = [event for event in person.timeline(room) if _line(event)]
        sealed = any(event["wire"] == "m.room.encrypted" for event in events)
        lines.append(f"--- room {number}{', encrypted' if sealed else ''}")
        for event in events:
            clock = time.strftime("%H:%M:%S", time.gmtime(event["at"] / 1000))
            lines.append(f"{clock} {event['sender'].split(':')[0]:>8}  {_line(event)}")
    sent, once = homeserver.transactions()
    lines.append(f"--- in the homeserver's database: {sent} events of adapters, of {once} transactions")
    return "\n".join(lines)


def _line(event: Json) -> str:
    content = event["content"]
    relation = content.get("m.relates_to", {})
    if event["type"] == "m.room.member":
        return f"({content.get('membership')})"
    if event["type"] == "m.reaction":
        return f"reacts with {relation.get('key', '(taken back)')}"
    if event["type"] == "m.room.redaction":
        return "(takes something back)"
    if event["type"] != "m.room.message" or relation.get("rel_type") == "m.replace":
        return ""
    if event["redacted"]:
        return "(taken back)"
    body = " / ".join(content.get("body", "").split("\n"))
    shown = body if len(body) <= 100 else f"{body[:99]}…"
    edited = " (edited)" if event["original"].get("body") != content.get("body") else ""
    thread = "[thread] " if relation.get("rel_type") == "m.thread" else ""
    file = f"[{content['msgtype'][2:]}] " if content.get("msgtype") in ("m.file", "m.image") else ""
    return f"{thread}{file}{shown}{edited}"


def wait_until(predicate: Callable[[], T | None], *, within_s: float, what: str) -> T:
    """Ask `predicate` until it returns something true, and return that. Raises AssertionError."""
    deadline = time.monotonic() + within_s
    while not (answer := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not in {within_s} s: {what}")
        time.sleep(0.05)
    return answer
