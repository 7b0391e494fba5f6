"""The channel "agent": carries to an agent what another one answers, as the adapter of a channel does.

What agent A says to agent B is a message of B in a chat of this channel that is A's session. B's replies
there go into the chat for which A worked when it asked, as messages of A.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from nanoclawd import journal, limits, outbox
from nanoclawd.db import Database, Row, Transaction
from nanoclawd.errors import Refused, Unavailable
from nanoclawd.ids import AgentName
from nanoclawd.messages import Event, SessionRow, place_of, session_row
from nanoclawd.outbox import Delivery
from nanoclawd.outlets import Outlet, Outlets
from nanoclawd.queue import enqueue
from nanoclawd.states import DeliveryState

CHANNEL = "agent"


def account(agent: AgentName) -> str:
    """Return how an agent is told who another one is."""
    return f"agent:{agent}"


class AgentPost:
    def __init__(
        self,
        *,
        db: Database,
        outlets: Outlets,
        wake: Callable[[SessionRow], None],
        known: Callable[[str], bool],
    ) -> None:
        self._db = db
        self._outlets = outlets
        self._wake = wake
        self._known = known  #: whether there is such an agent

    async def run(self) -> None:
        """Carry what there is, until cancelled."""
        while True:
            outlet = Outlet(CHANNEL, None, None)
            self._outlets.attach(outlet)
            try:
                with suppress(Unavailable):  # logged by the database
                    while (item := await self._outlets.next(outlet)) is not None:
                        if item["delivery"] is not None:
                            await self._carry(item["delivery"]["key"], item["delivery"]["text"])
            finally:
                self._outlets.detach(outlet)
            await asyncio.sleep(limits.STORE_AGAIN_S)

    async def _carry(self, key: str, text: str) -> None:
        deliveries = await self._db.write(partial(self._hand_over, key=key, text=text))
        self._outlets.reported(key)
        self._outlets.publish(deliveries)

    def _hand_over(self, tx: Transaction, key: str, text: str) -> list[Delivery]:
        """Make a delivery a message: both are one transaction, so that it comes once."""
        row = outbox.find(tx, CHANNEL, key)
        try:
            self._enqueue(tx, row, text)
            outbox.end(tx, CHANNEL, key, state=DeliveryState.SENT, receipt=key)
        except Refused as exc:
            outbox.end(tx, CHANNEL, key, state=DeliveryState.DEAD, reason=exc.message)
        return self._outlets.claim(tx, place_of(row))

    def _enqueue(self, tx: Transaction, row: Row, text: str) -> None:
        said = tx.one("get_message", id=row["message"])
        # Its event is the call that said it, which begins with the message that the other agent worked on.
        asked = None if said is None else tx.one("get_message", id=said["event"].partition("/")[0])
        found = None if asked is None else tx.one("find_session_of", message=asked["id"])
        if said is None or asked is None or found is None or not self._known(found["agent"]):
            raise Refused("nobody waits for this any more")
        session = session_row(found)
        channel, chat, thread = place_of(asked)
        event = Event(
            channel=channel,
            chat=chat,
            thread=thread,
            event=f"{CHANNEL}/{row['key']}",  # no platform's looks like it
            revision=0,
            sender=account(row["agent"]),
            text=text,
        )
        enqueue(tx, session.agent, event, conversation=session.place, hops=said["hops"] + 1)
        tx.tell(journal.info, "agent-answered", agent=row["agent"], message=asked["id"])
        tx.then(partial(self._wake, session))
