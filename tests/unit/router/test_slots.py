"""Slots: who gets one, in which order, and that everybody does; see nanoclawd/slots.py."""

from __future__ import annotations

import math
import random
from collections import Counter, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nanoclawd.ids import AgentName
from nanoclawd.slots import Claim, Slots

AGENTS = tuple(map(AgentName, ("anna", "berta", "carl", "dora")))


class SlotsMachine(RuleBasedStateMachine):
    """Sessions come and go as they like; what is granted is compared with what the rules say."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 3
        self.slots = Slots(self.count)
        self.waiting: list[Claim] = []
        self.held: list[Claim] = []

    def expect_grants(self) -> None:
        """Move what must have been granted, by the rules in the words of the specification."""
        while self.waiting and len(self.held) < self.count:
            wanting = {claim.agent for claim in (*self.waiting, *self.held)}
            share = max(1, math.floor(self.count / len(wanting)))
            has = Counter(claim.agent for claim in self.held)
            below = [claim for claim in self.waiting if has[claim.agent] < share]
            chosen = min(below or self.waiting, key=lambda claim: claim.seq)
            self.waiting.remove(chosen)
            self.held.append(chosen)

    @rule(agent=st.sampled_from(AGENTS), seq=st.integers(0, 10**6))
    def ask(self, agent: AgentName, seq: int) -> None:
        if all(claim.seq != seq for claim in (*self.waiting, *self.held)):
            self.waiting.append(self.slots.ask(agent, seq))
            self.expect_grants()

    @rule(agent=st.sampled_from(AGENTS))
    def adopt(self, agent: AgentName) -> None:
        if len(self.held) < 2 * self.count:
            self.held.append(self.slots.hold(agent))

    @precondition(lambda self: self.waiting or self.held)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        claim = data.draw(st.sampled_from([*self.waiting, *self.held]))
        (self.waiting if claim in self.waiting else self.held).remove(claim)
        self.slots.give_back(claim)
        self.expect_grants()

    @rule(count=st.integers(1, 5))
    def resize(self, count: int) -> None:
        self.count = count
        self.slots.resize(count)
        self.expect_grants()

    @invariant()
    def who_has_one_is_as_the_rules_say(self) -> None:
        assert all(claim.granted.is_set() for claim in self.held)
        assert not any(claim.granted.is_set() for claim in self.waiting)
        too_many = len(self.waiting) + len(self.held) - self.count
        assert self.slots.wanted == (too_many if self.waiting else 0)

    @invariant()
    def places_in_the_line_are_those_of_the_next_grants(self) -> None:
        places = sorted(self.slots.before(claim) for claim in self.waiting)
        assert places == list(range(len(self.waiting)))


TestSlots = SlotsMachine.TestCase


@given(st.randoms(use_true_random=False), st.integers(1, 4), st.integers(1, 4))
def test_no_message_waits_for_more_than_what_is_older_however_much_comes(
    chance: random.Random, count: int, agents: int
) -> None:
    """Turns take equally long, and sessions keep their slots for as long as the rules allow."""
    slots, seq, served = Slots(count), 0, 0
    sessions = [(AGENTS[chance.randrange(agents)], deque[int]()) for _ in range(3 * count + 2)]
    claims: dict[int, Claim] = {}  # of the sessions that have messages
    worked: set[int] = set()  # have had a turn in their slot
    arrived: dict[int, tuple[int, int]] = {}  # how many were served when a message came, and how many waited

    def deliver(number: int) -> None:
        nonlocal seq
        seq += 1
        agent, messages = sessions[number]
        messages.append(seq)
        arrived[seq] = (served, len(arrived))
        if number not in claims:
            claims[number] = slots.ask(agent, seq)

    for number in range(len(sessions)):
        deliver(number)
    for _ in range(100):
        deliver(0 if chance.random() < 0.7 else chance.randrange(len(sessions)))
        for number in [number for number, claim in claims.items() if claim.granted.is_set()]:
            agent, messages = sessions[number]
            if number in worked and slots.is_due_to_another(claims[number], messages[0], leaving=0):
                worked.discard(number)
                slots.give_back(claims[number])
                claims[number] = slots.ask(agent, messages[0])
                continue
            worked.add(number)
            served_then, older = arrived.pop(messages.popleft())
            assert served - served_then <= 2 * (older + count)
            served += 1
            if not messages:
                worked.discard(number)
                slots.give_back(claims.pop(number))


def test_agent_with_many_sessions_leaves_room_for_others() -> None:
    slots = Slots(4)
    busy = [slots.ask(AGENTS[0], seq) for seq in range(10)]
    late = slots.ask(AGENTS[1], 100)
    assert [claim.granted.is_set() for claim in busy] == [True] * 4 + [False] * 6
    assert [slots.before(claim) for claim in (late, busy[4], busy[9])] == [0, 1, 6]

    slots.give_back(busy[0])

    assert late.granted.is_set() and not busy[4].granted.is_set()


def test_two_busy_agents_leave_room_for_a_third() -> None:
    slots = Slots(4)
    busy = [slots.ask(AGENTS[seq % 2], seq) for seq in range(10)]
    late = slots.ask(AGENTS[2], 100)

    slots.give_back(busy[0])

    assert late.granted.is_set() and not busy[4].granted.is_set()


@pytest.mark.parametrize(("seq", "leaving", "due"), [(5, 0, True), (3, 0, False), (5, 1, False)])
def test_slot_is_due_to_whoever_waits_for_longer(seq: int, leaving: int, due: bool) -> None:
    slots = Slots(1)
    held = slots.ask(AGENTS[0], 1)
    slots.ask(AGENTS[0], 4)

    assert slots.is_due_to_another(held, seq, leaving=leaving) is due
