"""Channels: a file and a listener each, and which one calls is told by the listener alone."""

from __future__ import annotations

import os
import stat
import time
from typing import Any

import pytest

from nanoclawd import limits, paths
from nanoclawd.channels import Capabilities
from nanoclawd.ids import ChannelName
from nanoclawd.wire import VarlinkError
from tests.support.product import ANNOUNCEMENT
from tests.support.router import CHANNEL, Place
from tests.support.varlink_peer import Peer, eventually

MESSAGE = {"chat": "room", "thread": "", "event": "e1", "revision": 0, "sender": "@ada", "text": "hello"}


def write(name: str, text: str = 'kind = "some"\n') -> None:
    """Write a channel's file; there is an adapter of the kind "some"."""
    paths.channels().mkdir(parents=True, exist_ok=True)
    (paths.channels() / f"{name}.toml").write_text(text)
    program = paths.data() / "channels/some/adapter"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.touch(mode=0o755)


async def announce(peer: Peer, **changes: Any) -> None:
    await peer.call(f"{CHANNEL}.Announce", {**ANNOUNCEMENT, **changes})


def test_listener_says_which_channel_calls(place: Place) -> None:
    write("here")
    write("there")

    async def run() -> None:
        async with place.router() as router:
            for name in ("here", "there", "terminal"):
                peer = await router.peer(name)
                reply = await peer.call(f"{CHANNEL}.Announce", ANNOUNCEMENT)
                assert reply == {"channel": name}
                if name != "terminal":
                    await peer.call(f"{CHANNEL}.Invite", {"chat": "room", "sender": "@ada"})
            chats = await router.db.read("list_chats", id=None)
            assert [row["channel"] for row in chats] == ["here", "there"]
            path = paths.channel_socket(ChannelName("here"))
            modes = [stat.S_IMODE(os.stat(each).st_mode) for each in (path.parent, path)]
            assert modes == [0o700, 0o600]

    place.run(run)


def test_adapter_says_first_what_it_can_do(place: Place) -> None:
    write("here")

    async def run() -> None:
        async with place.router() as router:
            peer = await router.peer("here")
            for method, parameters, flags in (
                ("Attach", {}, {"more": True}),
                ("Deliver", MESSAGE, {}),
                ("Invite", {"chat": "room", "sender": "@ada"}, {}),
            ):
                with pytest.raises(VarlinkError, match="Refused"):
                    await peer.call(f"{CHANNEL}.{method}", parameters, **flags)
            await announce(peer)
            assert (await peer.call(f"{CHANNEL}.Deliver", MESSAGE))["outcome"] == "dropped"

    place.run(run)


def test_what_an_adapter_can_do_is_known_while_it_is_away(place: Place) -> None:
    write("here")
    said = {**ANNOUNCEMENT["capabilities"], "edits": True, "textBytes": 4000, "markup": "markdown"}

    async def run() -> None:
        async with place.router() as router:
            assert router.channel_list.capabilities("here") == Capabilities()
            await announce(await router.peer("here"), capabilities=said, accounts=["@bot:example.org"])
        async with place.router() as router:
            known = router.channel_list.capabilities("here")
            assert known == Capabilities(edits=True, text_bytes=4000, markup="markdown")
            assert router.channel_list.is_own("@bot:example.org")
            assert not router.channel_list.is_own("@ada")
            await announce(await router.peer("here"))
            assert router.channel_list.capabilities("here") == Capabilities()

    place.run(run)


@pytest.mark.parametrize(
    "wrong",
    [
        {"protocol": 2},
        {"adapter": ""},
        {"adapter": "a\nb"},
        {"accounts": ["x" * 256]},
        {"accounts": ["x"] * (limits.CHANNEL_ACCOUNTS + 1)},
        {"capabilities": {**ANNOUNCEMENT["capabilities"], "textBytes": -1}},
    ],
)
def test_announcement_that_is_wrong_is_refused(place: Place, wrong: dict[str, Any]) -> None:
    write("here")

    async def run() -> None:
        async with place.router() as router:
            peer = await router.peer("here")
            with pytest.raises(VarlinkError, match="Refused"):
                await announce(peer, **wrong)
            assert router.channel_list.get("here").announced is None

    place.run(run)


def test_health_is_one_line(place: Place) -> None:
    write("here")

    async def run() -> None:
        async with place.router() as router:
            peer = await router.peer("here")
            said = {"state": "login", "text": "the token\x1b[2J\nis " + "x" * 1000}
            assert await peer.call(f"{CHANNEL}.ReportHealth", said) == {}
            health = router.channel_list.get("here").health
            assert health.state == "login"
            assert health.text.startswith("the token [2J is xxx")
            assert len(health.text) == limits.HEALTH_CHARACTERS

    place.run(run)


def test_listener_outlives_the_router(place: Place) -> None:
    write("here")

    async def run() -> None:
        async with place.router() as router:
            assert [*place.fd_store] == ["channel.here"]
        # Nobody accepts at this moment, and nobody is refused.
        async with await Peer.connect(paths.channel_socket(ChannelName("here"))) as peer:
            await peer.send(f"{CHANNEL}.Announce", ANNOUNCEMENT)
            async with place.router() as router:
                assert await peer.result() == {"channel": "here"}
                assert router.channel_list.get("here").announced is not None

    place.run(run)


def test_broken_file_harms_only_its_own_channel(place: Place) -> None:
    for name in ("good", "changed"):
        write(name)
    write("broken", 'kind = "Bad Kind"\n')
    write("Not-A-Name")

    async def run() -> None:
        async with place.router() as router:
            channels = router.channel_list
            assert channels.names() == ["broken", "changed", "good"]
            assert sorted(place.fd_store) == ["channel.changed", "channel.good"]
            write("changed", "kind = ")
            problems = await channels.load({})
            assert [p.partition("channels/")[2].partition(": ")[0] for p in problems] == [
                "broken.toml:1",
                "changed.toml:1",
                "Not-A-Name.toml",
            ]
            assert channels.get("good").problem is None
            for name in ("good", "changed"):  # who was there stays
                await announce(await router.peer(name))

    place.run(run)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "here.toml: kind is missing"),
        ("kind = 3\n", "here.toml:1: kind must be a string"),
        ('kind = "none"\n', "here.toml: there is no adapter of the kind 'none'"),
        ('kind = "matrix"\n\n[other]\n', "here.toml:3: there is no key 'other'"),
        ('kind = "matrix"\nmatrix = 3\n', "here.toml:2: matrix must be a table"),
        ('kind = "kind"\n', "here.toml:1: kind is not a kind of channel"),
    ],
)
def test_error_names_file_and_line(place: Place, text: str, problem: str) -> None:
    write("here", text)

    async def run() -> None:
        async with place.router() as router:
            (said,) = await router.channel_list.load({})
            assert problem in said

    place.run(run)


def test_listener_goes_with_the_file(place: Place) -> None:
    write("here")

    async def run() -> None:
        async with place.router() as router:
            peer = await router.peer("here")
            await announce(peer)
            (paths.channels() / "here.toml").unlink()
            assert await router.channel_list.load({}) == []
            assert await peer.receive() is None
            assert (place.fd_store, router.channel_list.names()) == ({}, [])
            assert not paths.channel_socket(ChannelName("here")).parent.exists()
        write("gone")
        async with place.router():
            pass
        (paths.channels() / "gone.toml").unlink()
        async with place.router():
            assert place.fd_store == {}

    place.run(run)


def test_channel_whose_file_is_a_symlink_to_nowhere_stays(place: Place) -> None:
    write("here")

    async def run() -> None:
        async with place.router() as router:
            path = paths.channels() / "here.toml"
            path.unlink()
            path.symlink_to(path.with_name("nowhere"))
            (problem,) = await router.channel_list.load({})
            assert "is a symlink to nowhere" in problem
            await announce(await router.peer("here"))

    place.run(run)


def test_all_stays_while_the_directory_cannot_be_read(place: Place) -> None:
    write("here")

    async def run() -> None:
        async with place.router() as router:
            await announce(await router.peer("here"))
        (paths.channels() / "here.toml").unlink()
        paths.channels().rmdir()
        paths.channels().write_text("not a directory")
        async with place.router() as router:
            assert "channels" in str(router.channel_list.get("here").problem)
            await announce(await router.peer("here"))
            assert len(await router.channel_list.load({})) == 1
            assert router.channel_list.names() == ["here"]

    place.run(run)


def test_no_more_channels_than_there_is_room_for(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CHANNELS", 2)
    for name in ("a", "b", "c"):
        write(name)

    async def run() -> None:
        async with place.router() as router:
            assert sorted(place.fd_store) == ["channel.a", "channel.b"]
            assert "there are 2 channels already" in str(router.channel_list.get("c").problem)

    place.run(run)


def test_what_an_account_of_ours_says_is_a_programs(place: Place) -> None:
    """Of two adapters in a room one hears what the other sends: agents must not go on for ever."""
    write("here")

    async def run() -> None:
        async with place.router() as router:
            peer = await router.peer("here")
            await announce(peer, accounts=["@bot:example.org"])
            await router.wire("room", "berta", "@bot:example.org", channel="here", engagement="every")
            said = {**MESSAGE, "sender": "@bot:example.org", "writer": "person"}
            assert (await peer.call(f"{CHANNEL}.Deliver", said))["outcome"] == "dropped"
            await router.wire("room", "berta", "@ada", channel="here", engagement="every")
            assert (await peer.call(f"{CHANNEL}.Deliver", MESSAGE))["outcome"] == "queued"
            await router.settled()

    place.run(run)


def test_systemd_keeps_an_adapter_up_that_is_as_its_file_says(place: Place) -> None:
    for name in ("here", "same"):
        write(name)
    write("none", 'kind = "none"\n')
    unit = "nanoclaw-channel@here.service"

    async def run() -> None:
        async with place.router() as router:
            systemd, channels = place.systemd, router.channel_list
            await eventually(lambda: len(systemd.starts) == 2)
            assert systemd.adapters == {unit, "nanoclaw-channel@same.service"}
            write("here", 'kind = "some"\n[some]\nuser = "ada"\n')
            await channels.load({})
            await eventually(lambda: (systemd.starts[2:], systemd.stops) == ([unit], [unit]))
            await channels.load({})
            write("here", "kind = ")
            await channels.load({})
            assert unit in systemd.adapters, "what runs goes on"
            (paths.channels() / "here.toml").unlink()
            await channels.load({})
            await eventually(lambda: unit not in systemd.adapters)
            assert len(systemd.starts) == 3

    place.run(run)


def test_adapter_that_calls_without_a_pause_waits(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CHANNEL_CALLS_PER_S", 20.0)
    monkeypatch.setattr(limits, "CALLS_BURST", 3)
    write("here")

    async def run() -> None:
        async with place.router() as router:
            peer = await router.peer("here")
            began = time.monotonic()
            for _ in range(9):
                await announce(peer)
            assert time.monotonic() - began > 0.2

    place.run(run)


def test_adapter_that_was_missing_is_started_when_it_is_there(place: Place) -> None:
    write("here", 'kind = "later"\n')
    program = paths.data() / "channels/later/adapter"

    async def run() -> None:
        async with place.router() as router:
            assert (await router.channel_list.load({}), place.systemd.starts) != ([], [])
            program.parent.mkdir()
            program.touch(mode=0o755)
            assert await router.channel_list.load({}) == []
            await eventually(lambda: place.systemd.starts == ["nanoclaw-channel@here.service"])

    place.run(run)
