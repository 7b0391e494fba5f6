"""The container of a session, from sockets and unit to their end; and what keeps its runner in line."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from nanoclawd import journal, limits, paths
from nanoclawd.errors import Failed, NanoclawError, Unavailable
from nanoclawd.gateway_link import GatewayLink
from nanoclawd.killswitch import KillSwitch
from nanoclawd.rates import Rate
from nanoclawd.registry import Registry
from nanoclawd.server import Server, Service
from nanoclawd.session import Session, SessionState
from nanoclawd.sockets import bind_listener, forget_listener, store_listener
from nanoclawd.systemd import Systemd, UnitChange


class Containers:
    """The containers of all live sessions. Which session has one, and when, is the business of Sessions."""

    def __init__(
        self,
        *,
        systemd: Systemd,
        registry: Registry,
        gateway: GatewayLink,
        switch: KillSwitch,
        tasks: asyncio.TaskGroup,
        offer_due: Callable[[Session], Awaitable[None]],
    ) -> None:
        self._systemd = systemd
        self._registry = registry
        self._gateway = gateway
        self._switch = switch
        self._tasks = tasks
        self._offer_due = offer_due  #: called when there may be work for a runner
        self.service: Service | None = None  #: what runners are served; set once before anything starts

    # --- from start to end -------------------------------------------------------------------------

    async def run(self, session: Session, *, adopted: bool) -> NanoclawError | None:
        """Return when the session's container is gone; what we met ourselves that ended it, or None."""
        problem: NanoclawError | None = None
        try:
            self._prepare(session)
            self._serve(session)
            if not adopted:
                await self._start(session)
            await self._look(session)
            if session.stream is None:
                self.expect_work(session)
            await self._wait_gone(session)
        except NanoclawError as exc:
            problem = exc
            if isinstance(exc, Unavailable):  # systemd did not say that it does not run
                await self.stop(session)
        finally:
            session.end_stream()
            if session.serving is not None:
                session.serving.cancel()
                await asyncio.wait([session.serving])
                session.serving = None
            session.cancel_timers()
        return problem

    def _prepare(self, session: Session) -> None:
        """Make directories and listeners; those that came from the fd store stay."""
        agent, name = session.row.agent, session.row.name
        try:
            runtime = paths.session_runtime(agent, name)
            runtime.mkdir(mode=0o711, parents=True, exist_ok=True)
            runtime.chmod(0o711)  # whatever the umask; the directory above all, nanoclaw/, keeps others out
            state = paths.session_state(agent, name)
            state.mkdir(parents=True, exist_ok=True)
            state.chmod(0o770)  # the agent's uid is foreign, its group is ours
        except OSError as exc:
            raise Unavailable(f"cannot make the session's directories: {exc}") from exc
        if session.host is None:
            session.host = bind_listener(runtime / "host.sock")
            store_listener(f"host.{agent}.{name}", session.host)
        if session.gateway is None:
            session.gateway = bind_listener(runtime / "gateway.sock")
            store_listener(f"gateway.{agent}.{name}", session.gateway)

    def _serve(self, session: Session) -> None:
        """Have the runner's two sockets answered."""
        assert session.host is not None and session.gateway is not None and self.service is not None
        server = Server(
            self.service,
            session.host,
            identity=session,
            connections=limits.CONNECTIONS_PER_SESSION,
            calls=Rate(limits.CALLS_PER_S, limits.CALLS_BURST),
            on_offence=partial(self._note_offence, session),
        )
        session.serving = self._tasks.create_task(server.run(), name=f"host.sock of {session.unit}")
        self._gateway.attach(session.row.agent, session.row.name, session.gateway)

    async def _start(self, session: Session) -> None:
        await self._registry.ensure_unit(session.row.agent)
        if not await self._switch.start_unit(session.unit):
            session.stopped_by_person = True
            return
        session.alive = True
        if session.state is SessionState.STARTING:
            session.state = SessionState.READY
        journal.info("session-started", agent=session.row.agent, session=session.row.name, unit=session.unit)

    async def _look(self, session: Session) -> None:
        """See whether the unit ended before we got here, without a signal that we took for its end."""
        active = await self._systemd.unit_property(session.unit, "Unit", "ActiveState")
        if active in ("inactive", "failed"):
            session.gone.set()

    async def _wait_gone(self, session: Session) -> None:
        """Return when the unit is gone; meanwhile offer the runner what comes due."""
        gone = asyncio.ensure_future(session.gone.wait())
        try:
            while not session.gone.is_set():
                wanted = asyncio.ensure_future(session.wanted.wait())
                try:
                    await asyncio.wait((gone, wanted), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    wanted.cancel()
                if session.wanted.is_set():
                    session.wanted.clear()
                    await self._offer_due(session)
        finally:
            gone.cancel()

    def discard(self, session: Session) -> None:
        """Close the listeners and remove the runtime directory of a session without a container."""
        agent, name = session.row.agent, session.row.name
        self._gateway.detach(agent, name)
        for kind, listener in (("host", session.host), ("gateway", session.gateway)):
            if listener is not None:
                forget_listener(f"{kind}.{agent}.{name}")
                listener.close()
        session.host = session.gateway = None
        remove_runtime(paths.session_runtime(agent, name))

    async def forget_failure(self, session: Session) -> None:
        try:
            await self._systemd.reset_failed(session.unit)
        except NanoclawError as exc:
            journal.debug("reset-failed", str(exc), unit=session.unit)

    # --- events ------------------------------------------------------------------------------------

    def unit_changed(self, session: Session, change: UnitChange) -> None:
        """Systemd has something to say of a session's unit."""
        if change.result is not None:
            session.result = change.result
        if change.exit_status is not None:
            session.exit_status = change.exit_status
        if change.active_state in ("active", "activating"):
            session.alive = True
        elif change.active_state == "deactivating":
            session.state = SessionState.STOPPING
        elif change.active_state in ("inactive", "failed") and session.alive:
            # Not before it has run: what systemd says late of its previous life must not end this one.
            session.gone.set()

    def expect_work(self, session: Session) -> None:
        """From now on the runner has a while to ask for work: one that never does would block its chat."""
        if session.silence is not None:
            session.silence.cancel()
        loop = asyncio.get_running_loop()
        session.silence = loop.call_later(limits.HELLO_S, self._stop_silent, session)

    def _stop_silent(self, session: Session) -> None:
        if session.stream is None and session.turn is None:
            reason = f"its runner did not ask for work within {limits.HELLO_S:.0f} s"
            self._disown(session, "runner-silent", reason)

    def leave(self, session: Session) -> None:
        """The runner has said good-bye: it takes nothing more, and must be gone soon."""
        if session.left:  # saying it again gives no more time
            return
        session.left = True
        session.state = SessionState.STOPPING
        if session.stopping is not None:
            session.stopping.cancel()
        session.stopping = asyncio.get_running_loop().call_later(
            limits.STOP_TURN_S, self._stop_straggler, session
        )

    def _stop_straggler(self, session: Session) -> None:
        journal.warning("runner-stayed", "it said good-bye; stopping the container", unit=session.unit)
        self.stop_soon(session, "its runner said good-bye and stayed")

    def _note_offence(self, session: Session, what: str) -> None:
        """A call broke the contract. A runner that goes on like that is not heard any more, and stopped."""
        if not session.offences.take() or session.refused is not None:
            return
        self._disown(session, "protocol-broken", "its runner broke the protocol too often", what)
        if session.serving is not None:
            session.serving.cancel()

    def _disown(self, session: Session, event: str, reason: str, detail: str = "") -> None:
        text = f"{reason}, at last with: {detail}" if detail else reason
        journal.warning(event, f"{text}, stopping the container", unit=session.unit, agent=session.row.agent)
        hint = f"'nanoclawctl agent logs {session.row.agent}' shows more"
        self.refuse(session, Failed(reason, hint=hint))

    def refuse(self, session: Session, reason: NanoclawError) -> None:
        """Nothing can come of this runner: stop it, and let its message have the reason."""
        if session.refused is None:
            session.refused = reason
            self.stop_soon(session, reason.message)

    # --- stopped -----------------------------------------------------------------------------------

    def stop_soon(self, session: Session, why: str) -> None:
        """Stop the container of a session; `why` in one line, for people."""
        session.ending = session.ending or why
        self._tasks.create_task(self.stop(session), name=f"stop of {session.unit}")

    async def stop(self, session: Session) -> None:
        """The same, and return when it is gone, or systemd has failed to stop it."""
        try:
            await self.end(session)
        except NanoclawError as exc:
            journal.warning("stop-failed", f"{exc}, waiting for systemd", unit=session.unit)

    async def stop_stranger(self, unit: str) -> None:
        """Stop a container of which nothing is known but its unit."""
        journal.warning("stranger", "nobody knows its session, stopping the container", unit=unit)
        with suppress(NanoclawError):  # then it is systemd's alone
            await self._systemd.stop_unit(unit)

    async def end(self, session: Session) -> None:
        """The same. Raises Failed, Unavailable."""
        gone = session.gone  # of this life
        await self._systemd.stop_unit(session.unit)
        gone.set()  # of a unit that was gone already, systemd says nothing more


def remove_runtime(runtime: Path) -> None:
    """Remove the runtime directory of a session that has no container."""
    # Ours alone: the container sees it read-only.
    shutil.rmtree(runtime, ignore_errors=True)
    with suppress(OSError):  # another session of the agent lives there
        runtime.parent.rmdir()
