"""The Matrix channel: the installed adapter, a real homeserver, people with a client that is not ours."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.machine import ROOT, LocalMachine, NestedMachine
from tests.support.matrix import PASSWORD, URL, Homeserver, Person, prepared, transcript, wait_until
from tests.support.product import REPLY_S, SETTLE_S, Json, Product, unique_prefix

CHANNEL = "mx"
KIT_S = 280
HOSTILE_PORT = 8010
HOSTILE_KB = (
    250 << 10
)  #: of the adapter, which takes 32 MiB of an answer at most; the unit's limit is 512 MiB
UNIT = f"nanoclaw-channel@{CHANNEL}.service"
ADAPTER = ".local/share/nanoclaw/channels/matrix/adapter"
KILLED = rf"{UNIT} <[34]> .*(status=9/KILL|Failed with result 'signal'|Failed to start)"
STATE = f".local/state/nanoclaw/channels/{CHANNEL}"


class World:
    """The machine with NanoClaw and one channel of kind matrix, a homeserver, the owner and a stranger."""

    def __init__(self, machine: NestedMachine, homeserver: Homeserver) -> None:
        self.machine, self.homeserver = machine, homeserver
        self.product = Product(machine, unique_prefix())
        self.bot = homeserver.register("bot")
        self.ada = Person(homeserver, homeserver.register("ada"))
        self.eve = Person(homeserver, homeserver.register("eve"))

    def kill(self) -> None:
        self.machine.systemctl("kill", "--signal=SIGKILL", UNIT)

    def number(self, room: str) -> str:
        """Return what nanoclawctl calls a room."""
        chats = self.machine.wait_for(
            lambda: [chat for chat in self.product.ask("chat", "list")["chats"] if chat["chat"] == room],
            within_s=SETTLE_S,
            what=f"the router knows {room}",
        )
        return str(chats[0]["number"])

    def room(
        self, *agents: str, encrypted: bool = False, direct: bool = False, name: str | None = None
    ) -> str:
        """Have the owner invite the account into a new room, wire it, and wait until the account is in."""
        room: str = self.ada.do(
            "createRoom",
            invite=[self.bot],
            direct=direct,
            encrypted=encrypted,
            **({"name": name} if name else {}),
        )
        number = self.number(room)
        for agent in agents:
            self.product.ctl("chat", "wire", number, agent)
        self.wait_joined(room)
        return room

    def wait_joined(self, room: str) -> None:
        wait_until(
            lambda: [self.bot, "join"] in self.ada.do("members", room=room),
            within_s=SETTLE_S,
            what="the account joins",
        )

    def ask(self, room: str, text: str, **content: object) -> Json:
        """Say something as the owner, and return the message that says it back."""
        self.ada.say(room, text, **content)
        return self.ada.wait_text(room, self.bot, text, within_s=REPLY_S)


#: Run in an agent's container while it has a turn: makes calls of io.nanoclaw.Agent, given as JSON.
AS_AGENT = """
import json, sys
sys.path.insert(0, "/opt/nanoclaw/lib")
from runner.host import Connection
turn, calls, done = sys.argv[1], json.load(sys.stdin), []
link = Connection("/run/nanoclaw/host.sock")
for method, parameters in calls:
    if str(parameters.get("delivery")).startswith("$"):  # what call number N sent
        parameters["delivery"] = done[int(parameters["delivery"][1:])]["outcome"]["delivery"]
    link.send(method, {"turn": turn, **parameters})
    done.append(link.receive())
print(json.dumps(done))
"""


@pytest.fixture(scope="module")
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    if LocalMachine.is_possible():
        pytest.skip("the homeserver needs a nested machine")
    programs = prepared()
    machine = NestedMachine(f"matrix-{os.getpid()}")
    options = ("--project", str(ROOT), "--store", request.getfixturevalue("store"))
    machine.up(*options, "--bind-ro", f"{programs}/wheels:/srv/wheels")
    try:
        install = (
            "./install.sh",
            "--yes",
            "--no-demo",
            "--no-image",
            "--channel",
            "matrix",
            "--wheels",
            "/srv/wheels",
        )
        machine.run(*install, cwd=machine.project, timeout_s=120)
        with Homeserver(machine, programs) as homeserver:
            world = World(machine, homeserver)
            with world.ada, world.eve:
                _add_channel(world)
                yield world
                if path := os.environ.get("NANOCLAW_TRANSCRIPT"):  # for whoever wants to read what was said
                    Path(path).write_text(transcript(world.ada, homeserver))
    finally:
        machine.down()


def _add_channel(world: World) -> None:
    settings = (f"homeserver={URL}", f"user={world.bot}", f"verifiers=['{world.ada.user}']")
    world.product.ctl("channel", "add", CHANNEL, "--kind", "matrix", *settings)
    said = world.product.ctl("channel", "login", CHANNEL, input=PASSWORD, timeout_s=90).stderr
    assert said == f"Logged in as {world.bot}.\n"


@pytest.fixture
def agents(world: World) -> Iterator[tuple[str, str]]:
    """Two agents of this test."""
    world.product = Product(world.machine, unique_prefix())
    yield world.product.add("a"), world.product.add("b")
    world.product.close()
    world.machine.check_journal()


@pytest.fixture(scope="module")
def owner(world: World) -> World:
    """Ada is the owner here: she has sent a code that nanoclawctl gave her."""
    room = world.ada.do("createRoom", invite=[world.bot], direct=True)
    world.number(room)
    helper = world.product.add("owner")
    world.product.ctl("chat", "wire", world.number(room), helper)
    world.wait_joined(room)
    code = world.product.ctl("pair", CHANNEL).stdout.split()[-1]
    world.ada.say(room, code)
    world.ada.wait_text(room, world.bot, "This account is owner's from now on.")
    return world


def test_a_direct_message_is_answered_typed_for_and_shown_as_read(
    owner: World, agents: tuple[str, str]
) -> None:
    room = owner.room(agents[0], direct=True)

    event = owner.ada.say(room, "Good **morning**\n/sleep 2")
    wait_until(lambda: owner.bot in owner.ada.do("typing", room=room), within_s=REPLY_S, what="it types")
    reply = owner.ada.wait_text(room, owner.bot, "Good")

    assert reply["content"]["formatted_body"].startswith("<p>Good <strong>morning</strong>")
    assert reply["content"]["msgtype"] == "m.text" and "m.relates_to" not in reply["content"]
    assert owner.ada.do("receipt", room=room, user=owner.bot) in (event, reply["event"])
    wait_until(lambda: not owner.ada.do("typing", room=room), within_s=SETTLE_S, what="it types no more")


def test_two_agents_in_a_room_are_told_apart(owner: World, agents: tuple[str, str]) -> None:
    first, second = agents
    room = owner.room(first, second, name="Family")
    owner.ada.do("invite", room=room, user=owner.eve.user)
    owner.eve.do("join", room=room)

    owner.ada.say(room, f"@{first} are you there?")
    one = owner.ada.wait_text(room, owner.bot, "are you there?")
    owner.ada.say(room, f"@{second} and you?")
    two = owner.ada.wait_text(room, owner.bot, "and you?")
    answer = owner.ada.say(
        room,
        "once more",
        **{"m.relates_to": {"m.in_reply_to": {"event_id": one["event"]}}, "m.mentions": {}},
    )
    three = owner.ada.wait_text(room, owner.bot, "once more")

    profile = "com.beeper.per_message_profile"
    assert [m["content"][profile]["id"] for m in (one, two, three)] == [first, second, first]
    assert two["content"]["body"].startswith(f"{second}: ")
    assert f"<strong data-mx-profile-fallback>{second}: </strong>" in two["content"]["formatted_body"]
    assert three["content"]["m.relates_to"]["m.in_reply_to"]["event_id"] == answer
    owner.eve.say(room, f"@{first} do it for me")
    owner.ada.say(room, "just talking")
    assert owner.ask(room, f"@{first} a mention ends it")
    said = " ".join(m["content"]["body"] for m in owner.ada.heard(room, owner.bot))
    assert "just talking" not in said and "do it for me" not in said


def test_a_thread_is_answered_in_the_thread(owner: World, agents: tuple[str, str]) -> None:
    room = owner.room(agents[0], direct=True)
    root = owner.ada.say(room, "the root")
    owner.ada.wait_text(room, owner.bot, "the root")

    relation = {
        "rel_type": "m.thread",
        "event_id": root,
        "is_falling_back": True,
        "m.in_reply_to": {"event_id": root},
    }
    owner.ada.say(room, "in the thread", **{"m.relates_to": relation})
    reply = owner.ada.wait_text(room, owner.bot, "in the thread")

    relation = reply["content"]["m.relates_to"]
    assert (relation["rel_type"], relation["event_id"]) == ("m.thread", root)


def test_an_edit_that_comes_in_time_replaces_what_was_written(owner: World, agents: tuple[str, str]) -> None:
    room = owner.room(agents[0], direct=True)
    owner.ask(room, "warm")
    owner.ada.say(room, "/sleep 3")
    wait_until(lambda: owner.ada.do("typing", room=room), within_s=REPLY_S, what="it is at work")
    event = owner.ada.say(room, "wrong")
    owner.ada.say(
        room,
        "* right",
        **{
            "m.new_content": {"msgtype": "m.text", "body": "right"},
            "m.relates_to": {"rel_type": "m.replace", "event_id": event},
        },
    )
    gone = owner.ada.say(room, "taken back")
    owner.ada.do("redact", room=room, event=gone)
    owner.ada.say(room, "last")

    owner.ada.wait_text(room, owner.bot, "last", within_s=REPLY_S)
    said = [message["content"]["body"] for message in owner.ada.heard(room, owner.bot)]
    assert "right" in said and not {"wrong", "taken back"} & {*said}


def _as_agent(world: World, agent: str, turn: str, *calls: tuple[str, Json]) -> list[Json]:
    """Do what an agent's tools do, while it works at a message; returns what the router says."""
    (session,) = world.product.sessions(agent)
    container = f"nanoclaw-{agent}-{session['session']}"
    line = ("podman", "exec", "-i", container, "python3", "-c", AS_AGENT, turn)
    replies: list[Json] = json.loads(world.machine.run(*line, input=json.dumps(calls)).stdout)
    return replies


def _wait_leased(world: World, agent: str, event: str) -> Json:
    """Wait until an agent works at an event, and return its message."""

    def message() -> Json | None:
        rows = world.product.ask("message", "list", agent)["messages"]
        return next((row for row in rows if row["event"] == event and row["state"] == "leased"), None)

    return world.machine.wait_for(message, within_s=REPLY_S, what="the message is leased")


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_an_agent_edits_takes_back_reacts_and_sends_a_file(
    owner: World, agents: tuple[str, str], encrypted: bool
) -> None:
    room = owner.room(agents[0], direct=True, encrypted=encrypted)
    event = owner.ada.say(room, "/sleep 6")
    leased = _wait_leased(owner, agents[0], event)
    data = os.urandom(100_000)

    _as_agent(
        owner,
        agents[0],
        leased["turn"],
        ("SendMessage", {"key": "1", "text": "first **try**"}),
        ("SendMessage", {"key": "2", "text": "a slip"}),
        ("EditMessage", {"key": "3", "delivery": "$0", "text": "second *try*"}),
        ("EditMessage", {"key": "4", "delivery": "$1", "text": None}),
        ("React", {"key": "5", "message": leased["id"], "reaction": "👀"}),
        ("PutFile", {"key": "6", "offset": 0, "data": base64.b64encode(data).decode()}),
        (
            "SendFile",
            {"key": "6", "name": "notes.bin", "mediaType": "", "bytes": len(data), "caption": "here"},
        ),
    )

    file = owner.ada.wait_text(room, owner.bot, "notes.bin")
    (edited,) = [m for m in owner.ada.heard(room, owner.bot) if "try" in m["content"]["body"]]
    assert (edited["content"]["body"], edited["content"]["formatted_body"]) == (
        "second *try*",
        "<p>second <em>try</em></p>",
    )
    assert "first" in edited["original"]["body"]
    assert not [m for m in owner.ada.heard(room, owner.bot) if "a slip" in m["content"].get("body", "")]
    (reaction,) = owner.ada.do("reactions", room=room)
    relation = reaction["content"]["m.relates_to"]
    assert (reaction["sender"], relation["event_id"], relation["key"]) == (owner.bot, event, "👀")
    with tempfile.NamedTemporaryFile() as saved:
        what = owner.ada.do("saveFile", room=room, event=file["event"], path=saved.name)
        assert Path(saved.name).read_bytes() == data
    assert (what["name"], what["size"]) == ("notes.bin", len(data))
    assert ("file" in file["content"]) is encrypted and ("url" in file["content"]) is not encrypted
    assert [m for m in owner.ada.heard(room, owner.bot) if m["content"]["body"] == "here"]


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_a_file_of_a_person_comes_to_the_agent(
    owner: World, agents: tuple[str, str], encrypted: bool
) -> None:
    room = owner.room(agents[0], direct=True, encrypted=encrypted)
    owner.ask(room, "warm")
    data = os.urandom(3_000_000)

    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(data)
        more = {"path": file.name, "name": "../photo.png", "mimetype": "image/png", "msgtype": "m.image"}
        event = owner.ada.do("sendFile", room=room, caption="look\n/sleep 3", **more)

    leased = _wait_leased(owner, agents[0], event)
    shown = owner.product.ask("message", "show", leased["id"])["message"]
    assert shown["text"].startswith("look")
    stored = owner.machine.sh(
        "find ~/.local/state/nanoclaw -type f -size 3000000c -exec sha256sum {} +", check=False
    ).split()
    assert hashlib.sha256(data).hexdigest() in stored


def test_an_encrypted_chat_goes_on_after_adapter_and_homeserver_were_restarted(
    owner: World, agents: tuple[str, str]
) -> None:
    room = owner.room(agents[0], direct=True, encrypted=True)

    first = owner.ask(room, "before")
    owner.machine.systemctl("restart", UNIT)
    second = owner.ask(room, "after the adapter")
    owner.homeserver.stop()
    owner.homeserver.start()
    third = owner.ask(room, "after the homeserver")
    owner.kill()
    fourth = owner.ask(room, "after a kill")

    owner.machine.expect_journal(KILLED)
    for message in (first, second, third, fourth):
        assert message["wire"] == "m.room.encrypted" and not message["failed"]
    (contents,) = owner.homeserver.ask(
        "SELECT group_concat(json) FROM event_json WHERE room_id = ? AND json LIKE '%m.room.encrypted%'",
        room,
    )
    assert "before" not in contents[0] and "after" not in contents[0]


def test_a_person_verifies_the_account_by_emoji(owner: World, agents: tuple[str, str]) -> None:
    room = owner.room(agents[0], direct=True, encrypted=True)
    owner.ask(room, "hello")
    owner.ada.do("crossSign", password=PASSWORD)
    (device,) = (name for name, _ in owner.ada.do("devices", user=owner.bot))

    seen = owner.ada.do("verify", user=owner.bot, room=room)
    shown = owner.machine.run(
        f"{owner.machine.home}/{ADAPTER}", "verify", f"{owner.machine.home}/{STATE}", input="y\n"
    )
    assert owner.ada.do("confirm") == "done"

    assert all(name in shown.stdout for name in seen)
    wait_until(
        lambda: owner.ada.do("trust", user=owner.bot, device=device)["user"],
        within_s=SETTLE_S,
        what="it is verified",
    )
    assert owner.ada.do("trust", user=owner.bot, device=device)["device"]
    owner.machine.wait_for(
        lambda: [e for e in owner.machine.journal(UNIT) if "is verified" in str(e.get("MESSAGE"))],
        within_s=SETTLE_S,
    )


def test_emoji_that_differ_verify_nothing(owner: World, agents: tuple[str, str]) -> None:
    room = owner.room(agents[0], direct=True, encrypted=True)
    owner.ask(room, "hello")
    (device,) = (name for name, _ in owner.ada.do("devices", user=owner.bot))

    owner.ada.do("verify", user=owner.bot, device=device)
    owner.machine.run(
        f"{owner.machine.home}/{ADAPTER}", "verify", f"{owner.machine.home}/{STATE}", input="n\n"
    )

    owner.machine.wait_for(
        lambda: [e for e in owner.machine.journal(UNIT) if "not the same" in str(e.get("MESSAGE"))],
        within_s=SETTLE_S,
    )
    assert "failed" in owner.ada.do("confirm")


def test_a_strangers_invitation_waits_for_the_owner(owner: World, agents: tuple[str, str]) -> None:
    room = owner.eve.do("createRoom", invite=[owner.bot], name="Not for you")
    number = owner.number(room)

    owner.eve.say(room, "let me in")
    (chat,) = [chat for chat in owner.product.ask("chat", "list")["chats"] if chat["chat"] == room]
    assert (chat["state"], chat["title"]) == ("new", "Not for you")
    assert [owner.bot, "invite"] in owner.eve.do("members", room=room)
    owner.product.ctl("chat", "block", number)

    wait_until(
        lambda: [owner.bot, "invite"] not in owner.eve.do("members", room=room),
        within_s=SETTLE_S,
        what="it declines",
    )
    assert owner.homeserver.sent(room, owner.bot) == []


def test_a_hundred_messages_while_the_adapter_is_down(owner: World, agents: tuple[str, str]) -> None:
    room = owner.room(agents[0], direct=True)
    owner.ask(room, "warm")
    owner.machine.systemctl("stop", UNIT)

    for number in range(100):
        owner.ada.say(room, f"message {number:03}")
    owner.machine.systemctl("start", UNIT)

    def bodies() -> list[str]:
        return [m["content"]["body"] for m in owner.ada.heard(room, owner.bot)]

    wait_until(
        lambda: any("message 099" in body for body in bodies()), within_s=REPLY_S, what="the last one"
    )
    said = [line for body in bodies() for line in body.split("\n") if line.startswith("message")]
    assert said == [f"message {number:03}" for number in range(100)]


def test_killed_in_mid_delivery_it_sends_nothing_twice(owner: World, agents: tuple[str, str]) -> None:
    rooms = [owner.room(agents[0], direct=True, encrypted=encrypted) for encrypted in (False, True)]
    for room in rooms:
        owner.ask(room, "warm")

    def count() -> int:
        return sum(len(owner.homeserver.sent(room, owner.bot)) for room in rooms)

    sent = count()
    for number in range(12):
        for room in rooms:
            owner.ada.say(room, f"number {number:02}")
        if number % 3 == 2:
            # Wherever it is: before the request, between answer and report, or idle.
            wait_until(lambda least=sent: count() > least, within_s=REPLY_S, what="something is sent")
            sent = count()
            owner.kill()
            owner.machine.systemctl("start", UNIT)  # not after a pause, which grows

    owner.machine.expect_journal(KILLED)
    for room in rooms:
        owner.ada.wait_text(room, owner.bot, "number 11", within_s=REPLY_S)
        lines = Counter(
            line
            for message in owner.ada.heard(room, owner.bot)
            for line in message["content"]["body"].split("\n")
            if line.startswith("number")
        )
        assert lines == {f"number {number:02}": 1 for number in range(12)}
        assert len(owner.homeserver.sent(room, owner.bot)) == len(owner.ada.heard(room, owner.bot))
    sent, once = owner.homeserver.transactions()
    assert sent == once > 24


def test_a_reaction_to_a_card_allows_what_an_agent_has_asked_for(
    owner: World, agents: tuple[str, str]
) -> None:
    room = owner.room(agents[0], direct=True)
    leased = _wait_leased(owner, agents[0], owner.ada.say(room, "/sleep 3"))

    call = ("MessageAgent", {"key": "1", "agent": agents[1], "text": "are you awake?"})
    (reply,) = _as_agent(owner, agents[0], leased["turn"], call)
    card = owner.ada.wait_text(room, owner.bot, "Allow: ✅")
    wait_until(
        lambda: (
            {r["content"]["m.relates_to"]["key"] for r in owner.ada.do("reactions", room=room)}
            == {"✅", "❌"}
        ),
        within_s=SETTLE_S,
        what="there is something to click",
    )
    assert reply["outcome"]["state"] == "held" and "are you awake?" in card["content"]["body"]
    assert not owner.product.ask("message", "list", agents[1])["messages"]
    relation = {"rel_type": "m.annotation", "event_id": card["event"], "key": "✅"}
    owner.ada.do("send", room=room, type="m.reaction", content={"m.relates_to": relation})

    owner.machine.wait_for(
        lambda: owner.product.ask("message", "list", agents[1])["messages"],
        within_s=SETTLE_S,
        what="the other agent has the message",
    )


@contextmanager
def _settings(world: World, more: str) -> Iterator[None]:
    """Have the adapter run with more settings for a while."""
    path = f"{world.machine.home}/.config/nanoclaw/channels/{CHANNEL}.toml"
    before = world.machine.read(path)
    for text in (before + more, before):
        pid = world.machine.unit(UNIT)["MainPID"]
        world.machine.write(path, text)
        world.machine.systemctl("reload", "nanoclaw.service")
        world.machine.wait_for(lambda old=pid: world.machine.unit(UNIT)["MainPID"] not in (old, "0"))
        world.machine.wait_for(
            lambda: world.product.ask("channel", "status", CHANNEL)["channel"]["health"] == "connected",
            within_s=SETTLE_S,
        )
        if text != before:
            yield


def test_with_verified_devices_only_these_are_heard_and_get_keys(
    owner: World, agents: tuple[str, str]
) -> None:
    with Person(owner.homeserver, owner.ada.user) as tablet:
        room = owner.room(agents[0], direct=True, encrypted=True)
        wait_until(lambda: tablet.timeline(room), within_s=SETTLE_S, what="the tablet knows the room")
        (fingerprint,) = (
            key for name, key in owner.ada.do("devices", user=owner.ada.user) if name == owner.ada.device
        )

        with _settings(owner, f'devices = "verified"\ntrusted = ["{fingerprint}"]\n'):
            tablet.say(room, "who am I?")
            owner.ask(room, "it is me")

        assert not [
            m for m in owner.ada.heard(room, owner.bot) if "who am I" in m["content"].get("body", "")
        ]
        heard = [m for m in tablet.heard(room, owner.bot) if "it is me" in m["content"].get("body", "")]
        assert heard == []


def test_accounts_side_by_side_and_a_hostile_homeserver_harms_its_own_adapter(
    owner: World, agents: tuple[str, str]
) -> None:
    machine, product = owner.machine, owner.product
    second = owner.homeserver.register("second")
    hostile = subprocess.Popen(
        [*owner.homeserver.network, sys.executable, ROOT / "tests/matrix/hostile.py", str(HOSTILE_PORT)]
    )
    try:
        for name, url in (("two", URL), ("bad", f"http://127.0.0.1:{HOSTILE_PORT}")):
            product.ctl("channel", "add", name, "--kind", "matrix", f"homeserver={url}", f"user={second}")
        product.ctl("channel", "login", "two", input=PASSWORD)
        # It waits for a good end, which never comes.
        line = ("timeout", "5", f"{machine.home}/.local/bin/nanoclawctl", "channel", "login", "bad")
        machine.run(*line, input=PASSWORD, check=False)
        room = owner.ada.do("createRoom", invite=[second], direct=True)
        product.ctl("chat", "wire", owner.number(room), agents[1], "--access", "public")

        wait_until(
            lambda: [second, "join"] in owner.ada.do("members", room=room),
            within_s=SETTLE_S,
            what="it joins",
        )
        owner.ada.say(room, "to the second account")
        owner.ada.wait_text(room, second, "to the second account")
        machine.wait_for(
            lambda: "longer than" in product.ask("channel", "status", "bad")["channel"]["healthText"],
            within_s=REPLY_S,
        )
        assert owner.ask(owner.room(agents[0], direct=True), "the first goes on")
        status = machine.read(f"/proc/{machine.unit('nanoclaw-channel@bad.service')['MainPID']}/status")
        assert int(status.split("VmHWM:")[1].split()[0]) < HOSTILE_KB
    finally:
        hostile.terminate()
        hostile.wait()
        for name in ("two", "bad"):
            product.ctl("channel", "remove", name, "--yes", "--purge", check=False)
        machine.expect_journal(r"nanoclaw-channel@bad|channel-|channel bad")


def test_the_adapter_passes_the_conformance_kit(world: World) -> None:
    # Out here, in the machine's network: it needs nothing of the machine but the homeserver.
    adapter = f"{sys.executable} -m nanoclaw_matrix"
    line = (sys.executable, ROOT / "tests/channel-kit", "--adapter", adapter)
    driver = f"{sys.executable} {ROOT}/tests/matrix/kit_driver.py {URL}"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "skills/matrix")}

    done = subprocess.run(
        [*world.homeserver.network, *line, "--driver", driver],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=KIT_S,
    )

    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
