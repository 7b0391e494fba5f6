"""The router's side of io.nanoclaw.Gateway: hands over session listeners, policies and budgets, again after
a restart of the gateway; and reads what that has decided and counted.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence

from nanoclawd import budget, journal, limits, paths, varlink
from nanoclawd.budget import Budget
from nanoclawd.errors import Unavailable
from nanoclawd.idl import read_interface
from nanoclawd.ids import AgentName, SessionName
from nanoclawd.policy import Policy, to_json
from nanoclawd.usage import Usage
from nanoclawd.wire import Json, VarlinkError, WireError

_INTERFACE = read_interface(paths.INTERFACES / "io.nanoclaw.Gateway.varlink")
_RETRY_S = 2.0
_ANSWER_S = 10.0
Key = tuple[AgentName, SessionName]
#: Stores what io.nanoclaw.Gateway.ReadRecords() or ReadUsage() return, of one life. May raise Unavailable.
TakeOver = Callable[[str, Sequence[Json]], Awaitable[None]]


class GatewayLink:
    """Keeps the gateway supplied with the listeners of live sessions, and with what their agents may.

    run() must run as a task. `policy_of` tells an agent's policy at this moment, and `usage` its budget;
    what agents have asked for goes to `take_over`, and what they have spent to `usage`, again if it was not
    on disk yet when the router before us ended. What is `beside` runs while a gateway is connected.
    """

    def __init__(
        self,
        policy_of: Callable[[AgentName], Policy],
        take_over: TakeOver,
        usage: Usage,
        beside: Sequence[Callable[[], Awaitable[None]]] = (),
    ) -> None:
        self._policy_of = policy_of
        self._take_over = take_over
        self._usage = usage
        self._beside = beside
        self._wanted: dict[Key, socket.socket] = {}
        self._changed = asyncio.Event()
        self._supplied = asyncio.Event()  #: the gateway has all that it should have

    def attach(self, agent: AgentName, session: SessionName, listener: socket.socket) -> None:
        """Have the gateway serve `listener`, which stays ours. Does not wait: the backlog holds who is
        faster.
        """
        self._wanted[agent, session] = listener
        self.change()

    def detach(self, agent: AgentName, session: SessionName) -> None:
        """Have the gateway close its copy. Harmless if it has none."""
        self._wanted.pop((agent, session), None)
        self.change()

    async def refresh(self) -> None:
        """Have the gateway take over policies that have changed; return when it has. Raises Unavailable."""
        self.change()
        if not self._wanted:
            return  # nobody runs: it gets them with the next session
        try:
            async with asyncio.timeout(_ANSWER_S):
                await self._supplied.wait()
        except TimeoutError:
            message = f"the gateway did not take the change within {_ANSWER_S:.0f} s"
            hint = "'systemctl --user restart nanoclaw-gateway' makes it forget what it has"
            raise Unavailable(message, hint=hint) from None

    def change(self) -> None:
        """Have the gateway take over what has changed, without waiting for it."""
        self._supplied.clear()
        self._changed.set()

    async def run(self, *, left: bool = False) -> None:
        """Connect when there is something to hand over; when the gateway goes away, do it again.

        `left`: a gateway that runs may have sessions of the router before us, which have ended.
        """
        while True:
            if not left:
                await self._changed.wait()
            if not self._wanted and not left:
                self._changed.clear()
                continue
            left = False
            try:
                connection = await varlink.connect(paths.gateway_socket())
                try:
                    async with asyncio.TaskGroup() as tasks:
                        reading = [
                            tasks.create_task(self._keep_reading(*each), name=each[0])
                            for each in (
                                ("ReadRecords", "records", self._take_over),
                                ("ReadUsage", "sums", self._usage.take_over),
                            )
                        ]
                        reading += [tasks.create_task(run()) for run in self._beside]  # type: ignore[arg-type]
                        await self._keep_supplied(connection)
                        for task in reading:
                            task.cancel()
                finally:
                    connection.close()
                    self._supplied.clear()
            except* (Unavailable, VarlinkError) as group:
                journal.warning("gateway-away", f"{group.exceptions[0]}, retrying in {_RETRY_S:.0f} s")
                await asyncio.sleep(_RETRY_S)
            self._changed.set()

    async def _keep_reading(self, method: str, field: str, take_over: TakeOver) -> None:
        """Take over what the gateway tells by `method`, until it hangs up."""
        try:
            connection = await varlink.connect(paths.gateway_socket())
        except Unavailable:
            return  # the other connection tells
        try:
            after = 0
            while True:
                full_name = f"{_INTERFACE.name}.{method}"
                reply = await varlink.call(connection, full_name, {"after": after}, more=True)
                # It has credentials and the Internet; what it says must not harm more than itself.
                read = _INTERFACE.check_reply(method, reply)
                if not read[field]:
                    raise WireError(field, "must not be empty")
                await self._store(take_over, read["life"], read[field])
                after = read[field][-1]["number"]
        except Unavailable:
            return
        except (VarlinkError, WireError) as exc:
            hint = "'systemctl --user restart nanoclaw-gateway' starts one that should"
            journal.error(f"{field}-not-read", f"the gateway does not tell what it decides: {exc}; {hint}")
        finally:
            connection.close()

    async def _store(self, take_over: TakeOver, life: str, told: Sequence[Json]) -> None:
        """Store what was told, however long that takes; the gateway keeps what comes meanwhile."""
        while True:
            try:
                return await take_over(life, told)
            except Unavailable as exc:
                journal.warning("records-not-stored", f"{exc}, retrying in {limits.STORE_AGAIN_S:.0f} s")
                await asyncio.sleep(limits.STORE_AGAIN_S)

    async def _keep_supplied(self, connection: varlink.Connection) -> None:
        """Make the gateway's set equal to ours, until it hangs up."""
        names = (name.partition("/") for name in (await _ask(connection, "Status", {}))["sessions"])
        has: dict[Key, socket.socket | None] = {
            (AgentName(agent), SessionName(session)): None for agent, _, session in names
        }
        policies: dict[AgentName, Policy] = {}
        budgets: dict[AgentName, tuple[Budget, set[SessionName]]] = {}
        life = (await _ask(connection, "GetLife", {}))["life"]
        while True:
            self._changed.clear()
            for key in has.keys() - self._wanted.keys():
                del has[key]
                await _ask(connection, "Detach", {"agent": key[0], "session": key[1]})
            agents = {agent for agent, _ in self._wanted}
            policies = {agent: policy for agent, policy in policies.items() if agent in agents}
            budgets = {agent: told for agent, told in budgets.items() if agent in agents}
            for agent in agents:  # before its sessions, which may nothing without it
                limit = self._usage.budget_of(agent)
                sessions = {key[1] for key in self._wanted if key[0] == agent and limit.is_of_session}
                if budgets.get(agent) != (limit, sessions):
                    spent = await self._usage.spent_before(agent, sessions, life)
                    told = {"agent": agent, "budget": budget.to_json(limit), **spent}
                    await _ask(connection, "SetBudget", told)
                    budgets[agent] = limit, sessions
                if policies.get(agent) != (policy := self._policy_of(agent)):
                    told = {
                        "agent": agent,
                        "unknown": policy.unknown,
                        "rules": [*map(to_json, policy.rules)],
                    }
                    await _ask(connection, "SetPolicy", told)
                    policies[agent] = policy
            for key, listener in list(self._wanted.items()):
                # Looked up again: meanwhile the session may have ended and closed it.
                if self._wanted.get(key) is listener and has.get(key) is not listener and key[0] in policies:
                    await _ask(connection, "Attach", {"agent": key[0], "session": key[1]}, listener)
                    has[key] = listener
            if not self._changed.is_set():
                self._supplied.set()
                if await self._gone_before_change(connection):
                    return

    async def _gone_before_change(self, connection: varlink.Connection) -> bool:
        gone = asyncio.ensure_future(connection.wait_gone())
        changed = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait((gone, changed), return_when=asyncio.FIRST_COMPLETED)
            return gone.done()
        finally:
            for task in (gone, changed):
                task.cancel()
            await asyncio.gather(gone, changed, return_exceptions=True)

    async def status(self) -> Json:
        """Return what the gateway says of itself; starts it if need be. Raises Unavailable."""
        connection = await varlink.connect(paths.gateway_socket())
        try:
            return await _ask(connection, "Status", {})
        except VarlinkError as exc:
            raise Unavailable(f"the gateway does not answer: {exc}") from exc
        finally:
            connection.close()


async def _ask(
    connection: varlink.Connection, method: str, parameters: Json, listener: socket.socket | None = None
) -> Json:
    """Call the gateway. Raises VarlinkError, Unavailable."""
    fd = None if listener is None else listener.fileno()
    try:
        async with asyncio.timeout(_ANSWER_S):
            return await varlink.call(connection, f"io.nanoclaw.Gateway.{method}", parameters, fd=fd)
    except TimeoutError:
        raise Unavailable(f"the gateway did not answer within {_ANSWER_S:.0f} s") from None
