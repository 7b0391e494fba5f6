"""The channels that there are: a person's file and a listener each, and what their adapters say."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from nanoclawd import channelfile, journal, limits, paths
from nanoclawd.apart import Apart
from nanoclawd.channelfile import ChannelConfig, find_program
from nanoclawd.db import Database, now_ms
from nanoclawd.errors import ConfigError, NanoclawError, NotFound, Refused, Unavailable
from nanoclawd.files import remove_file
from nanoclawd.ids import TERMINAL, ChannelName
from nanoclawd.rates import Rate
from nanoclawd.sandbox import Check
from nanoclawd.server import Server, Service
from nanoclawd.sockets import bind_listener, forget_listener, store_listener
from nanoclawd.systemd import Systemd
from nanoclawd.trash import move_to_trash
from nanoclawd.wire import Json

PROTOCOL = 1
PREFIX = "channel."  #: of our listeners in systemd's fd store


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """What an adapter and its platform can do; of one that has never said so, nothing."""

    threads: bool = False
    edits: bool = False
    reactions: bool = False
    redactions: bool = False
    files: bool = False
    typing: bool = False
    text_bytes: int = 0  #: longest text of one part; 0: no limit
    file_bytes: int = 0  #: largest file; 0: no limit
    markup: str = "plain"  #: or markdown

    @classmethod
    def parse(cls, shown: Mapping[str, object]) -> Capabilities:
        """Return them from the type Capabilities of io.nanoclaw.Channel."""
        return cls(**{f.name: shown[_camel(f.name)] for f in fields(cls)})  # type: ignore[arg-type]  # checked

    @property
    def shown(self) -> Json:
        return {_camel(f.name): getattr(self, f.name) for f in fields(self)}


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(map(str.capitalize, rest))


@dataclass(frozen=True, kw_only=True, slots=True)
class Announcement:
    """What an adapter has said of itself."""

    adapter: str = ""
    capabilities: Capabilities = Capabilities()
    accounts: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """What an adapter has said last of its platform."""

    state: str = ""  #: as in ReportHealth(); "": nothing since the router's start
    text: str = ""
    at: float = 0.0  #: time.monotonic()


@dataclass(eq=False, kw_only=True, slots=True)
class Channel:
    """One channel as it is at this moment; all connections to its listener stand for it."""

    name: ChannelName
    config: ChannelConfig | None = None  #: None: of the terminal, and if its file is broken
    problem: NanoclawError | None = None
    announced: Announcement | None = None
    health: Health = Health()
    last_error: str = ""  #: why a delivery failed
    sandbox: Sequence[Check] = ()  #: of the adapter's unit
    listener: socket.socket | None = None
    serving: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def unit(self) -> str:
        """The adapter's unit."""
        return f"nanoclaw-channel@{self.name}.service"

    @property
    def file(self) -> Path:
        return paths.channels() / f"{self.name}.toml"


class Channels:
    """All channels by name."""

    def __init__(self, db: Database, systemd: Systemd, tasks: asyncio.TaskGroup) -> None:
        self._db = db
        self._systemd = systemd
        self._tasks = tasks
        self._channels: dict[ChannelName, Channel] = {}
        self._changing = asyncio.Lock()
        self._earlier: dict[str, Announcement] = {}  #: what adapters said in earlier lives, by channel
        self.terminal = Channel(name=TERMINAL)
        self.service: Service | None = None  #: what adapters are served; set once before load()
        self.on_close: Callable[[], None] = lambda: None  #: told when a connection has ended

    # --- looking -----------------------------------------------------------------------------------

    def names(self) -> list[ChannelName]:
        """All but the terminal."""
        return sorted(self._channels)

    def get(self, name: str) -> Channel:
        """Return a channel, which is not the terminal. Raises NotFound."""
        channel = self._channels.get(ChannelName(name))
        if channel is None:
            hint = "'nanoclawctl channel list' shows all"
            raise NotFound(f"no channel named '{name[:64]}'", hint=hint)
        return channel

    def capabilities(self, name: str) -> Capabilities:
        """Return what can be sent to a channel, whether its adapter is there or not."""
        channel = self.terminal if name == TERMINAL else self._channels.get(ChannelName(name))
        return channel.announced.capabilities if channel and channel.announced else Capabilities()

    def is_own(self, user: str) -> bool:
        """Say whether an account of a platform is that of an adapter, of whatever channel."""
        return any(
            channel.announced is not None and user in channel.announced.accounts
            for channel in self._channels.values()
        )

    def are_any(self) -> bool:
        """Say whether an adapter may call: nobody but us listens for it, see idle.py."""
        return any(channel.serving is not None for channel in self._channels.values())

    # --- following the files -----------------------------------------------------------------------

    async def load(self, listeners: Mapping[str, socket.socket]) -> list[str]:
        """Read all files again and listen for each channel; returns what is wrong, a line a problem.

        `listeners` are those that systemd has kept, by the names that they have there.
        """
        async with self._changing:
            await self._remember()
            try:
                found, misnamed = await asyncio.to_thread(channelfile.read_channels, paths.channels())
            except ConfigError as exc:  # nothing is known, so all stays
                for name, listener in listeners.items():
                    self._add(ChannelName(name.removeprefix(PREFIX)), exc, listener)
                journal.error("channels-unreadable", str(exc))
                return [str(exc)]
            for name in self._channels.keys() - found.keys():
                await self._forget(self._channels.pop(name))
            before = {name: (c.config, c.problem) for name, c in self._channels.items()}
            for name, config in found.items():
                self._add(name, config, listeners.get(f"{PREFIX}{name}"))
                # Also if its file is the same and its adapter is there by now.
                if before.get(name) != (config, None):
                    self._start(self._channels[name], anew=name in before)
            for name, listener in listeners.items():
                if name.removeprefix(PREFIX) not in self._channels:
                    forget_listener(name)
                    Apart().close(listener.detach())
        problems = {name: str(c.problem) for name, c in self._channels.items() if c.problem}
        for name, problem in problems.items():
            journal.error("channel-broken", problem, channel=name)
        for stranger in misnamed:
            journal.warning("channel-misnamed", f"{stranger}, ignoring it")
        return [*problems.values(), *map(str, misnamed)]

    def _add(
        self, name: ChannelName, config: ChannelConfig | ConfigError, listener: socket.socket | None
    ) -> None:
        """Have a channel follow what its file says. One that is broken keeps the listener that it has."""
        channel = self._channels.setdefault(
            name, Channel(name=name, announced=self._earlier.pop(name, None))
        )
        channel.config = channel.problem = None
        if isinstance(config, ConfigError):
            channel.problem = config
        else:
            channel.config = config
        try:
            if channel.config is not None:
                find_program(channel.config.kind)
        except ConfigError as exc:  # it listens nevertheless: somebody may run an adapter by hand
            channel.problem = ConfigError(f"{channel.file}: {exc.message}", hint=exc.hint)
        try:
            if channel.listener is None and listener is None and channel.config is not None:
                if len(self._channels) > limits.CHANNELS:
                    raise ConfigError(
                        f"{channel.file}: there are {limits.CHANNELS} channels already",
                        hint="remove one",
                    )
                listener = _listen(name)
        except NanoclawError as exc:
            channel.problem = exc
        if listener is not None:
            assert self.service is not None
            channel.listener = listener
            server = Server(
                self.service,
                listener,
                identity=channel,
                # An adapter that was taken over must not keep the router from all others.
                calls=Rate(limits.CHANNEL_CALLS_PER_S, limits.CALLS_BURST),
                on_close=self.on_close,
                max_fds=limits.FILES_PER_MESSAGE,
                trusted=False,
            )
            channel.serving = self._tasks.create_task(server.run(), name=f"channel {name}")

    async def _remember(self) -> None:
        """Take up what adapters have said in earlier lives: before one is listened to that need not say it
        again.
        """
        self._earlier = {
            row["name"]: Announcement(
                adapter=row["adapter"],
                capabilities=Capabilities.parse(json.loads(row["capabilities"])),
                accounts=frozenset(json.loads(row["accounts"])),
            )
            for row in await self._db.read("list_channels")
        }
        if self.terminal.announced is None:
            self.terminal.announced = self._earlier.get(TERMINAL)

    # --- adapters' units ---------------------------------------------------------------------------

    def _start(self, channel: Channel, *, anew: bool) -> None:
        """Have systemd start an adapter; nobody waits. One that runs is left alone, or begins `anew`."""
        if channel.problem is None:
            start = self.restart(channel) if anew else self._systemd.start_unit(channel.unit)
            self._tasks.create_task(_logging(start, channel), name=f"start of {channel.unit}")

    async def restart(self, channel: Channel) -> None:
        """Start an adapter anew. Raises Failed, Unavailable, NotFound: it is masked."""
        await self._stop(channel)
        channel.health = Health()  # now: the one that ends may just have said something
        await self._systemd.start_unit(channel.unit)

    async def _stop(self, channel: Channel) -> None:
        await self._systemd.stop_unit(channel.unit)
        await self._systemd.reset_failed(channel.unit)

    async def remove(self, channel: Channel) -> Path | None:
        """Stop an adapter and remove all that is its; returns where went what it had to remember."""
        async with self._changing:
            await self._stop(channel)  # before what it uses goes
            remove_file(channel.file)
            del self._channels[channel.name]
            await self._forget(channel)
            state = paths.channel_state(channel.name)
            trash = await asyncio.to_thread(move_to_trash, state, f"channel-{channel.name}")
        journal.info("channel-removed", channel=channel.name)
        return trash

    async def _forget(self, channel: Channel) -> None:
        """Listen no more for a channel that is gone, and let its adapter end."""
        self._tasks.create_task(_logging(self._stop(channel), channel), name=f"stop of {channel.unit}")
        if channel.serving is not None:
            channel.serving.cancel()
            await asyncio.wait([channel.serving])
        if channel.listener is not None:
            forget_listener(f"{PREFIX}{channel.name}")
            Apart().close(channel.listener.detach())  # whoever waits there may have sent what hangs
        shutil.rmtree(paths.channel_socket(channel.name).parent, ignore_errors=True)

    # --- what adapters say -------------------------------------------------------------------------

    async def announce(
        self, channel: Channel, protocol: int, adapter: str, capabilities: Json, accounts: Collection[str]
    ) -> None:
        """Keep what an adapter says of itself. Raises Refused, Unavailable."""
        if protocol != PROTOCOL:
            hint = f"this router speaks {PROTOCOL}"
            raise Refused(f"protocol: {protocol} is not known", hint=hint)
        if len(accounts) > limits.CHANNEL_ACCOUNTS:
            raise Refused(f"accounts: more than {limits.CHANNEL_ACCOUNTS}")
        if min(capabilities["textBytes"], capabilities["fileBytes"]) < 0:
            raise Refused("capabilities: textBytes and fileBytes must not be negative")
        said = Announcement(
            adapter=adapter, capabilities=Capabilities.parse(capabilities), accounts=frozenset(accounts)
        )
        if said != channel.announced:
            row = {
                "name": channel.name,
                "adapter": adapter,
                "capabilities": json.dumps(said.capabilities.shown),
                "accounts": json.dumps(sorted(said.accounts)),
            }
            await self._db.write(lambda tx: tx.all("announce_channel", now=now_ms(), **row))
            channel.announced = said
            journal.info("channel-announced", channel=channel.name, adapter=adapter)

    async def report_health(self, channel: Channel, state: str, text: str) -> None:
        before, channel.health = channel.health, Health(state=state, text=text, at=time.monotonic())
        if state == "connected" != before.state:
            # systemd never forgets by itself how often it had to start an adapter, and waits ever longer.
            await _logging(self._systemd.reset_failed(channel.unit), channel)
        if (before.state, before.text) != (state, text):
            well = state in ("connecting", "connected")
            (journal.info if well else journal.warning)(
                f"channel-{state}", text, channel=channel.name, unit=channel.unit
            )


async def _logging(action: Awaitable[None], channel: Channel) -> None:
    """What systemd cannot do with an adapter is shown by its unit, and harms nobody else."""
    try:
        await action
    except NanoclawError as exc:
        journal.error("adapter-failed", str(exc), channel=channel.name, unit=channel.unit)


def _listen(name: ChannelName) -> socket.socket:
    """Return a new listener for a channel, which systemd keeps too. Raises ConfigError, Unavailable."""
    path = paths.channel_socket(name)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise Unavailable(f"cannot make '{path.parent}': {exc.strerror}") from exc
    listener = bind_listener(path, foreign=False)
    store_listener(f"{PREFIX}{name}", listener)
    return listener
