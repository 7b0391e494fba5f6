"""Who may talk to an agent, and for which agents a message is: the decisions alone, whatever comes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoclawd.access import Access, Role, Standing, Verdict, decide_access
from nanoclawd.engagement import Engagement, Heard, Wiring, decide_engagement, names_agent

AGENTS = ("andy", "berta", "carl")
CHATS = (1, 2)
ALLOWED = (Verdict.KNOWN, Verdict.STRANGER)

STANDINGS = st.one_of(
    st.just(Standing(Role.OWNER)),
    st.just(Standing(Role.ADMIN)),
    st.builds(Standing, st.sampled_from([Role.ADMIN, Role.MEMBER]), st.sampled_from(AGENTS)),
    st.builds(Standing, st.sampled_from([Role.MEMBER, Role.DENIED]), st.just(""), st.sampled_from(CHATS)),
)
SETS = st.frozensets(STANDINGS, max_size=5)
ACCESS = st.sampled_from(Access)


@given(SETS, st.sampled_from(AGENTS), st.sampled_from(CHATS), ACCESS)
def test_a_denial_in_a_chat_is_stronger_than_any_role(
    standings: frozenset[Standing], agent: str, chat: int, access: Access
) -> None:
    denied = standings | {Standing(Role.DENIED, chat=chat)}

    assert decide_access(denied, agent, chat, access) is Verdict.DROPPED


@given(SETS, st.sampled_from(AGENTS), st.sampled_from(CHATS))
def test_only_a_role_here_makes_somebody_known_where_it_is_strict(
    standings: frozenset[Standing], agent: str, chat: int
) -> None:
    fitting = {
        Standing(Role.OWNER),
        Standing(Role.ADMIN),
        Standing(Role.ADMIN, agent),
        Standing(Role.MEMBER, agent),
        Standing(Role.MEMBER, chat=chat),
    }
    known = bool(standings & fitting) and Standing(Role.DENIED, chat=chat) not in standings

    assert (decide_access(standings, agent, chat, Access.STRICT) is Verdict.KNOWN) is known


@given(SETS, st.sampled_from(AGENTS), st.sampled_from(CHATS), ACCESS)
def test_roles_for_other_chats_and_agents_change_nothing(
    standings: frozenset[Standing], agent: str, chat: int, access: Access
) -> None:
    here = {s for s in standings if s.agent in ("", agent) and s.chat in (None, chat)}

    assert decide_access(standings, agent, chat, access) is decide_access(here, agent, chat, access)


@pytest.mark.parametrize(
    ("access", "verdict"),
    [(Access.STRICT, Verdict.DROPPED), (Access.ASK, Verdict.HELD), (Access.PUBLIC, Verdict.STRANGER)],
)
def test_what_becomes_of_strangers_is_the_agents_access(access: Access, verdict: Verdict) -> None:
    assert decide_access(frozenset(), "andy", 1, access) is verdict


# --- engagement -------------------------------------------------------------------------------------

WIRING = Wiring(id=1, chat=1, agent="andy", engagement=Engagement.MENTION)
HEARD = Heard(text="hello", at=1000)


@st.composite
def wirings(draw: st.DrawFn) -> list[Wiring]:
    made = []
    for number, agent in enumerate(draw(st.permutations(AGENTS))):
        engagement = draw(st.sampled_from(Engagement))
        made.append(
            Wiring(
                id=number,
                chat=1,
                agent=agent,
                engagement=engagement,
                pattern="deploy" if engagement is Engagement.PATTERN else "",
                sticky_until=draw(st.sampled_from([0, 2000])),
                priority=draw(st.integers(-2, 2)),
                exclusive=draw(st.booleans()),
            )
        )
    return made[: draw(st.integers(0, 3))]


HEARDS = st.builds(
    Heard,
    text=st.sampled_from(["hello", "deploy", "@berta deploy", "andy: hi", "mail a@carl.example"]),
    at=st.just(1000),
    direct=st.booleans(),
    mentioned=st.booleans(),
    agent=st.sampled_from(["", *AGENTS]),
    program=st.booleans(),
)
VERDICTS = st.lists(st.sampled_from(Verdict), min_size=3, max_size=3)


@given(wirings(), HEARDS, VERDICTS)
def test_nobody_gets_what_its_sender_may_not_say_to_them(
    made: list[Wiring], heard: Heard, verdicts: list[Verdict]
) -> None:
    taken = decide_engagement(made, heard, dict(enumerate(verdicts)))

    assert all(verdicts[wiring.id] is not Verdict.DROPPED for wiring, _ in taken)
    assert len({wiring.id for wiring, _ in taken}) == len(taken)


@given(wirings(), HEARDS, VERDICTS)
def test_behind_one_that_is_exclusive_nobody_gets_it(
    made: list[Wiring], heard: Heard, verdicts: list[Verdict]
) -> None:
    taken = [wiring for wiring, _ in decide_engagement(made, heard, dict(enumerate(verdicts)))]

    for wiring in taken[:-1]:
        assert not wiring.exclusive or verdicts[wiring.id] is Verdict.HELD


@given(wirings(), HEARDS, VERDICTS)
def test_a_program_is_heard_by_none_that_it_does_not_mention(
    made: list[Wiring], heard: Heard, verdicts: list[Verdict]
) -> None:
    taken = decide_engagement(made, replace(heard, program=True), dict(enumerate(verdicts)))

    assert all(mentioned for _, mentioned in taken)


@given(wirings(), HEARDS, VERDICTS)
def test_who_is_named_comes_first_and_a_mention_is_for_it_alone(
    made: list[Wiring], heard: Heard, verdicts: list[Verdict]
) -> None:
    named = {w.agent for w in made if w.agent == heard.agent or names_agent(heard.text, w.agent)}
    taken = decide_engagement(made, heard, dict(enumerate(verdicts)))

    order = [wiring.agent not in named for wiring, _ in taken]
    assert order == sorted(order)
    if named:
        assert {wiring.agent for wiring, mentioned in taken if mentioned} <= named


@pytest.mark.parametrize(
    ("wiring", "heard", "takes"),
    [
        ({}, {}, False),
        ({}, {"mentioned": True}, True),
        ({}, {"direct": True}, True),
        ({}, {"agent": "andy"}, True),
        ({}, {"text": "ask @Andy!"}, True),
        ({"engagement": Engagement.EVERY}, {}, True),
        ({"engagement": Engagement.PATTERN, "pattern": "^hell"}, {}, True),
        ({"engagement": Engagement.PATTERN, "pattern": "^hell"}, {"text": "oh hello"}, False),
        ({"engagement": Engagement.PATTERN, "pattern": "^hell"}, {"text": "oh", "direct": True}, False),
        ({"engagement": Engagement.STICKY}, {}, False),
        ({"engagement": Engagement.STICKY, "sticky_until": 1001}, {}, True),
        ({"engagement": Engagement.STICKY, "sticky_until": 1000}, {}, False),
    ],
)
def test_what_an_agent_takes(wiring: dict[str, object], heard: dict[str, object], takes: bool) -> None:
    made = replace(WIRING, **wiring)  # type: ignore[arg-type]

    taken = decide_engagement([made], replace(HEARD, **heard), {1: Verdict.KNOWN})  # type: ignore[arg-type]

    assert bool(taken) is takes


@pytest.mark.parametrize(
    ("text", "named"),
    [
        *(("@andy", True), ("hi @ANDY, you", True), ("andy: do", True), (" Andy, do", True)),
        *(("(@andy)", True), ("andy do", False), ("candy: x", False), ("x andy: y", False)),
        *(("@andyx", False), ("me@andy", False), ("a.@andy", False), ("@andy@example", False), ("", False)),
    ],
)
def test_how_an_agent_is_named(text: str, named: bool) -> None:
    assert names_agent(text, "andy") is named
