"""Whatever is said and decided in whatever order: who was not let in is nowhere, and nothing comes twice."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from nanoclawd import limits, paths, people
from nanoclawd.access import Access, Role, Standing, Verdict, decide_access
from nanoclawd.db import Transaction, open_writer, read_queries
from nanoclawd.engagement import Engagement
from nanoclawd.messages import Event
from nanoclawd.routing import Arrival, Outcome, block_chat, reconsider, remove_wirings, take, take_back
from tests.support.router import wire

AGENTS = ["berta", "emil"]
SENDERS = st.sampled_from(["@a:x", "@b:x", "@c:x"])
HELD = 4  #: of a chat, be it new or not


class Chat(RuleBasedStateMachine):
    """One chat, two agents, three senders; each text is said once."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="routing-"))
        self.writer = open_writer(self.directory / "db", create=True, whole=True)
        self.queries = read_queries((paths.SQL / "queries.sql").read_text())
        self.tx = Transaction(self.writer, self.queries)
        self.numbers = itertools.count()
        self.dropped: set[str] = set()  #: texts of which nothing may be stored
        self.limits = mock.patch.multiple(
            limits, HELD_PER_CHAT=HELD, HELD_PER_NEW_CHAT=HELD, STRANGER_BURST=10_000
        )
        self.limits.start()
        self.number = 0

    def teardown(self) -> None:
        self.limits.stop()
        self.writer.close()
        shutil.rmtree(self.directory)

    def rows(self, sql: str) -> list[tuple[object, ...]]:
        return [tuple(row) for row in self.writer.execute(sql)]

    def known(self) -> bool:
        if not self.number:
            for row in self.tx.all("list_chats", id=None):
                self.number = row["id"]
        return bool(self.number)

    def verdicts(self, sender: str) -> dict[str, Verdict]:
        standings = people.standings_of(self.tx, "test", sender)
        return {
            row["agent"]: decide_access(standings, row["agent"], self.number, Access(row["access"]))
            for row in self.tx.all("list_wirings", chat=self.number)
        }

    def settle(self) -> None:
        reconsider(self.tx)

    # --- what happens ------------------------------------------------------------------------------

    @rule(sender=SENDERS, mentioned=st.booleans(), again=st.booleans())
    def say(self, sender: str, mentioned: bool, again: bool) -> None:
        text = f"text {next(self.numbers)}"
        event = Event(
            channel="test", chat="room", thread="", event=text, revision=0, sender=sender, text=text
        )
        arrival = Arrival(event=event, mentioned=mentioned)
        verdicts = self.verdicts(sender) if self.known() else {}
        state = self.tx.all("get_chat", id=self.number)[0]["state"] if self.number else "new"
        waiting = len(self.tx.all("list_held", chat=None))

        taken = take(self.tx, arrival)

        if state == "open" and not set(verdicts.values()) - {Verdict.DROPPED}:
            assert taken.outcome is Outcome.DROPPED
        if state == "open" and Verdict.HELD not in verdicts.values():
            assert taken.outcome is not Outcome.HELD
        if state == "new":
            assert taken.outcome is (Outcome.HELD if mentioned and waiting < HELD else Outcome.DROPPED)
        if state == "blocked":
            assert taken.outcome is Outcome.DROPPED
        for _, agent in self.rows(
            f"SELECT body, agent FROM inbox JOIN session ON session.id = session WHERE body = '{text}'"
        ):
            assert verdicts[str(agent)] in (Verdict.KNOWN, Verdict.STRANGER)
        if taken.outcome is Outcome.DROPPED:
            self.dropped.add(text)
        elif again:
            same = take(self.tx, arrival)
            assert same.outcome is taken.outcome
            assert same.duplicate or taken.outcome is Outcome.KEPT

    @rule(
        agent=st.sampled_from(AGENTS),
        engagement=st.sampled_from([Engagement.EVERY, Engagement.MENTION]),
        access=st.sampled_from(Access),
        keep=st.integers(0, 3),
        exclusive=st.booleans(),
    )
    def wire(self, agent: str, engagement: Engagement, access: Access, keep: int, exclusive: bool) -> None:
        how = {"engagement": engagement, "access": access, "keep_context": keep}
        self.number = wire(self.tx, "test", "room", agent, **how, exclusive=int(exclusive))
        self.settle()

    @rule(agent=st.sampled_from(AGENTS))
    def unwire(self, agent: str) -> None:
        remove_wirings(self.tx, agent=agent)
        self.settle()

    @rule()
    def block(self) -> None:
        if self.known():
            block_chat(self.tx, self.number)
            self.settle()

    @rule(sender=SENDERS, role=st.sampled_from([Role.MEMBER, Role.DENIED, None]))
    def decide(self, sender: str, role: Role | None) -> None:
        if self.known():
            person = people.person_of(self.tx, "test", sender)
            roles = self.tx.all("list_members", person=person["id"], chat=self.number)
            if role is not None:
                people.set_role(self.tx, person, Standing(role, chat=self.number))
            elif roles:
                people.remove_role(self.tx, person, Standing(Role.MEMBER, chat=self.number))
            self.settle()

    @rule(number=st.integers(0, 20))
    def retract(self, number: int) -> None:
        take_back(self.tx, "test", "room", "", f"text {number}")

    # --- what always holds -------------------------------------------------------------------------

    @invariant()
    def nothing_of_what_was_dropped_is_anywhere(self) -> None:
        for table in ("inbox", "held", "context", "outbox"):
            assert not {body for (body,) in self.rows(f"SELECT body FROM {table}")} & self.dropped

    @invariant()
    def no_agent_has_an_event_twice(self) -> None:
        rows = self.rows("SELECT agent, event FROM inbox JOIN session ON session.id = session")
        assert all(count == 1 for count in Counter(rows).values())

    @invariant()
    def what_is_held_waits_for_somebody_and_is_bounded(self) -> None:
        held = self.tx.all("list_held", chat=None)
        assert len(held) <= HELD
        if self.known() and self.tx.all("get_chat", id=self.number)[0]["state"] == "open":
            for row in held:
                assert Verdict.HELD in self.verdicts(row["sender"]).values()

    @invariant()
    def each_question_is_about_something_that_waits(self) -> None:
        pending = self.tx.all("list_approvals", agent=None, state="pending", limit=100)
        assert bool(pending) <= bool(self.tx.all("list_held", chat=None))

    @invariant()
    def context_is_bounded(self) -> None:
        for row in self.tx.all("list_wirings", chat=self.number):
            kept = self.tx.all("list_context", wiring=row["id"], thread=None, told=1)
            assert len(kept) <= 3


TestChat = Chat.TestCase
TestChat.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
