"""The user's systemd over D-Bus: start, stop, reload and watch units.

Source: org.freedesktop.systemd1(5). The bus is the only way: `systemctl` does not work inside our sandbox.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from jeepney import DBusAddress, HeaderFields, Message, MessageType, new_method_call
from jeepney.bus_messages import MatchRule, message_bus
from jeepney.io.asyncio import DBusRouter, Proxy, open_dbus_connection
from jeepney.io.common import RouterClosed
from jeepney.wrappers import DBusErrorResponse

from nanoclawd import limits
from nanoclawd.errors import Failed, NotFound, Unavailable

_NAME = "org.freedesktop.systemd1"
_ROOT = "/org/freedesktop/systemd1"
_MANAGER = DBusAddress(_ROOT, bus_name=_NAME, interface=f"{_NAME}.Manager")
_UNIT_PATH = f"{_ROOT}/unit"
_MEMBER, _PATH = HeaderFields.member, HeaderFields.path
#: jeepney drops signals that do not fit; a reload announces each unit, so this is for some 10,000 of them.
_SIGNALS = 1 << 16
#: By interface and property, the field of UnitChange that has it.
_CHANGES = {
    "Unit": {"ActiveState": "active_state"},
    "Service": {"Result": "result", "ExecMainStatus": "exit_status", "StatusText": "status_text"},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitChange:
    """What systemd said of a unit: only what changed is not None."""

    unit: str
    active_state: str | None = None  #: "active", "inactive", "failed", …; "inactive" too if unloaded
    job: bool | None = None  #: it has got one, or has none any more
    result: str | None = None  #: "success", "exit-code", "oom-kill", "timeout", "protocol", …
    exit_status: int | None = None  #: of its main process; a signal's number if that ended it
    status_text: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedUnit:
    name: str
    load_state: str
    active_state: str
    sub_state: str
    path: str  #: of its D-Bus object


def unit_of_path(path: str) -> str:
    """Return the unit's name that a D-Bus object path stands for (sd_bus_path_decode(3))."""
    return re.sub(r"_([0-9a-f]{2})", lambda found: chr(int(found[1], 16)), path.rpartition("/")[2])


def path_of_unit(unit: str) -> str:
    """Return the path of a unit's D-Bus object (sd_bus_path_encode(3); our names begin with a letter)."""
    return f"{_UNIT_PATH}/" + re.sub(r"[^A-Za-z0-9]", lambda found: f"_{ord(found[0]):02x}", unit)


@asynccontextmanager
async def connect() -> AsyncIterator[Systemd]:
    """Connect to the user's bus; watch() must then run as a task. Raises Unavailable."""
    try:
        connection = await open_dbus_connection("SESSION")
    except (OSError, EOFError, KeyError, RuntimeError, TimeoutError) as exc:
        raise Unavailable(
            f"cannot connect to the user's D-Bus: {exc}",
            hint="is dbus-user-session (Debian) or dbus-broker installed?",
        ) from exc
    router = DBusRouter(connection)
    try:
        yield Systemd(router)
    finally:
        # At the end of the user's session the bus may be gone before we are; that is no reason to fail.
        # InvalidStateError: jeepney 0.9 means to tell a call of it that was cancelled.
        with suppress(EOFError, OSError, asyncio.InvalidStateError):
            await router.__aexit__(None, None, None)
        with suppress(OSError):
            await connection.close()


class Systemd:
    """A connection to the user's service manager; made by connect()."""

    def __init__(self, router: DBusRouter) -> None:
        self._router = router
        self._jobs: dict[str, asyncio.Future[str]] = {}
        #: Results of jobs that were done before the reply that names them had been read.
        self._done: dict[str, str] = {}
        self._starting = 0
        self._reloading = False  #: systemd is about to announce every unit as removed and as new
        self.watching = asyncio.Event()  #: set once signals come in
        self.on_unit_change: Callable[[UnitChange], None] = lambda change: None

    async def start_unit(self, unit: str, *, mode: str = "replace") -> None:
        """Start a unit and wait until it is active. Raises Failed with systemd's result, Unavailable.

        mode: "fail" if the start must not undo a job that waits, e.g. a person's stop of the unit's slice.
        """
        await self._job("StartUnit", unit, mode, limits.UNIT_START_S)

    async def stop_unit(self, unit: str) -> None:
        """Stop a unit and wait until it is gone. One that is not loaded counts as stopped."""
        with suppress(NotFound):
            await self._job("StopUnit", unit, "replace", limits.UNIT_STOP_S)

    async def reset_failed(self, unit: str) -> None:
        """Forget that a unit failed, and how often it was started. Harmless if it is not loaded."""
        with suppress(NotFound):
            await self._call("ResetFailedUnit", "s", (unit,))

    async def reload(self) -> None:
        """Have systemd run its generators and read all units again."""
        await self._call("Reload", None, (), timeout_s=limits.RELOAD_S)

    async def list_units(self, patterns: Sequence[str]) -> list[LoadedUnit]:
        """Return the loaded units whose names match one of the glob `patterns`."""
        (rows,) = await self._call("ListUnitsByPatterns", "asas", ([], list(patterns)))
        return [
            LoadedUnit(name=row[0], load_state=row[2], active_state=row[3], sub_state=row[4], path=row[6])
            for row in rows
        ]

    async def unit_property(self, unit: str, interface: str, name: str) -> Any:
        """Return one property, e.g. ("x.service", "Service", "MemoryCurrent"). Loads the unit if need be."""
        return await self._property(path_of_unit(unit), interface, name)

    async def has_job(self, unit: str) -> bool:
        """Return whether systemd starts or stops the unit at this moment."""
        number, _ = await self.unit_property(unit, "Unit", "Job")
        return bool(number)

    async def started_at(self) -> int:
        """Return when this service manager began (µs since 1970): another one has another time."""
        return int(await self._property(_ROOT, "Manager", "UserspaceTimestamp"))

    async def is_ending(self) -> bool:
        """Return whether the service manager stops all units because it ends itself."""
        return bool(await self._property(_ROOT, "Manager", "SystemState") == "stopping")

    async def _property(self, path: str, interface: str, name: str) -> Any:
        address = DBusAddress(path, bus_name=_NAME, interface="org.freedesktop.DBus.Properties")
        ((_, value),) = await self._send(
            new_method_call(address, "Get", "ss", (f"{_NAME}.{interface}", name))
        )
        return value

    async def ping(self) -> None:
        """Return if systemd answers. Raises Unavailable."""
        await self._send(
            new_method_call(
                DBusAddress(_ROOT, bus_name=_NAME, interface="org.freedesktop.DBus.Peer"), "Ping"
            )
        )

    async def watch(self) -> None:
        """Take signals until cancelled; everything that waits for a unit needs it."""
        queue: asyncio.Queue[Message] = asyncio.Queue(_SIGNALS)
        manager = {"type": "signal", "sender": _NAME, "interface": f"{_NAME}.Manager", "path": _ROOT}
        rules = (
            *(
                MatchRule(member=member, **manager)
                for member in ("JobNew", "JobRemoved", "UnitRemoved", "Reloading")
            ),
            MatchRule(
                type="signal",
                sender=_NAME,
                interface="org.freedesktop.DBus.Properties",
                member="PropertiesChanged",
                path_namespace=_UNIT_PATH,
            ),
        )
        # The bus puts our peer's unique name into signals, so the filter must not look for the well-known
        # one.
        own = MatchRule(type="signal")
        with self._router.filter(own, queue=queue):
            for rule in rules:
                await Proxy(message_bus, self._router).AddMatch(rule)
            await self._call("Subscribe", None, ())
            self.watching.set()
            while True:
                self._take(await queue.get())

    def _take(self, signal: Message) -> None:
        member = signal.header.fields.get(_MEMBER)
        if member == "JobRemoved":
            _, path, unit, result = signal.body
            self.on_unit_change(UnitChange(unit=unit, job=False))
            waiting = self._jobs.pop(path, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(result)
            elif self._starting:
                self._done[path] = result
        elif member == "JobNew":
            self.on_unit_change(UnitChange(unit=signal.body[2], job=True))
        elif member == "Reloading":
            (self._reloading,) = signal.body
        elif member == "UnitRemoved" and not self._reloading:  # on daemon-reload it only changes hands
            self.on_unit_change(UnitChange(unit=signal.body[0], active_state="inactive"))
        elif member == "PropertiesChanged":
            interface, changed, _ = signal.body
            fields = _CHANGES.get(interface.removeprefix(f"{_NAME}."), {})
            if found := {field: changed[name][1] for name, field in fields.items() if name in changed}:
                self.on_unit_change(UnitChange(unit=unit_of_path(signal.header.fields[_PATH]), **found))

    async def _job(self, method: str, unit: str, mode: str, timeout_s: float) -> None:
        # JobRemoved may come before the reply that names the job.
        self._starting += 1
        try:
            (path,) = await self._call(method, "ss", (unit, mode))
            result = self._done.pop(path, None)
            if result is None:
                waiting = self._jobs.setdefault(path, asyncio.get_running_loop().create_future())
                try:
                    async with asyncio.timeout(timeout_s):
                        result = await asyncio.shield(waiting)
                except TimeoutError:
                    raise Unavailable(
                        f"systemd did not finish {method}({unit}) in {timeout_s:.0f} s"
                    ) from None
        finally:
            self._starting -= 1
            if not self._starting:
                self._done.clear()
        if result not in ("done", "skipped"):
            raise Failed(
                f"{method} of {unit}: {result}",
                hint=f"see 'journalctl --user -u {unit}' and 'systemctl --user status'",
            )

    async def _call(
        self,
        method: str,
        signature: str | None,
        body: tuple[Any, ...],
        *,
        timeout_s: float = limits.BUS_CALL_S,
    ) -> tuple[Any, ...]:
        return await self._send(new_method_call(_MANAGER, method, signature, body), timeout_s=timeout_s)

    async def _send(self, message: Message, *, timeout_s: float = limits.BUS_CALL_S) -> tuple[Any, ...]:
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self._router.send_and_get_reply(message)
        except (TimeoutError, OSError, EOFError, RouterClosed, KeyError) as exc:
            # KeyError: jeepney 0.9 has forgotten the call when it ends with the bus.
            raise Unavailable(f"systemd does not answer on the user bus: {type(exc).__name__}") from exc
        if reply.header.message_type is MessageType.error:
            error = DBusErrorResponse(reply)
            text = str(error.data[0]) if error.data else error.name
            if error.name == f"{_NAME}.UnitMasked":
                raise NotFound(text.rstrip("."), hint="'systemctl --user unmask' lets it run again")
            if error.name == f"{_NAME}.NoSuchUnit":
                raise NotFound(text)
            raise Failed(f"systemd: {text}")
        return tuple(reply.body)
