"""What people say to the router itself in chats: commands, and reactions to what it asks.

Who that is, the platform's account says, or the terminal's socket; names say nothing. None of it needs a
container, and all of it is answered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from nanoclawd import cards, limits, outbox, people, prices, queue
from nanoclawd.access import Access, Verdict, decide_access
from nanoclawd.answers import Answers
from nanoclawd.approvals import REQUEST, Scope
from nanoclawd.budget import today
from nanoclawd.commands import COMMANDS, Level, Said, parse
from nanoclawd.db import Database, Row, Transaction, now_ms
from nanoclawd.engagement import SessionMode, names_agent
from nanoclawd.errors import NanoclawError, NotFound, Refused, Unavailable
from nanoclawd.guard import KIND
from nanoclawd.ids import TERMINAL, AgentName
from nanoclawd.messages import Event, SessionRow, session_row
from nanoclawd.outbox import Delivery
from nanoclawd.outlets import Outlets
from nanoclawd.people import Answerer
from nanoclawd.rates import Rate
from nanoclawd.registry import Registry
from nanoclawd.routing import Arrival, Outcome, Taken, conversation_of, find_chat
from nanoclawd.sessions import Sessions
from nanoclawd.states import ApprovalState, ChatState
from nanoclawd.usage import Usage

_WITHOUT = dict.fromkeys((0xFE0F, 0x20E3, *range(0x1F3FB, 0x1F400)))  #: variation, keycap, skin tones


@dataclass(frozen=True, kw_only=True, slots=True)
class _Caller:
    """Who says something to the router, and where."""

    event: Event
    chat: Row | None  #: None: the terminal
    levels: dict[AgentName, Level]  #: what they are to each agent that listens there
    modes: dict[AgentName, SessionMode]
    meant: AgentName | None  #: the agent that the platform says is meant
    answerer: Answerer | None

    @property
    def direct(self) -> bool:
        return self.chat is None or self.chat["kind"] == "direct"

    @property
    def by(self) -> Callable[[Transaction], Answerer]:
        """Who answers, as it is in the write of the answer."""
        if self.chat is None:
            return partial(people.answerer_here, by=f"{self.event.sender} at the terminal")
        return partial(_answerer, channel=self.event.channel, user=self.event.sender)


class ChatControl:
    def __init__(
        self,
        *,
        db: Database,
        registry: Registry,
        sessions: Sessions,
        outlets: Outlets,
        usage: Usage,
        answers: Answers,
    ) -> None:
        self._db = db
        self._registry = registry
        self._sessions = sessions
        self._outlets = outlets
        self._usage = usage
        self._answers = answers
        self._rates: dict[tuple[str, ...], Rate] = {}
        self._commands: dict[str, Callable[[_Caller, Said], Awaitable[str | Taken]]] = {
            "help": self._help,
            "agents": self._agents,
            "status": self._status,
            "stop": self._stop,
            "clear": self._clear,
            "compact": self._compact,
            "cost": self._cost,
            "approve": partial(self._answer, allow=True),
            "deny": partial(self._answer, allow=False),
        }

    # --- commands ----------------------------------------------------------------------------------

    async def take(self, arrival: Arrival) -> Taken | None:
        """Carry out a command, and answer it; None: the event is none, or not for us, and goes to agents."""
        event, said = arrival.event, parse(arrival.event.text)
        if said is None or arrival.program:
            return None
        caller = await self._db.write(partial(self._caller, arrival=arrival))
        if caller is None:
            return None
        meant = caller.direct or arrival.mentioned or any(names_agent(event.text, a) for a in caller.levels)
        if said.known is None and not meant:
            return None  # people in a room talk to other programs, too
        key = _key("say", event.channel, event.chat, event.thread, event.event, str(event.revision))
        if await self._db.read("find_delivery", channel=event.channel, key=key):
            return Taken(outcome=Outcome.ANSWERED, duplicate=True)
        if early := self._too_many(caller):
            if early <= 1:  # told once, then silence
                await self._say(key, event, "Too many commands. Wait a little.")
            return await self._db.write(partial(_count, chat=caller.chat))
        try:
            text = await self._run(caller, said)
            if isinstance(text, Taken):
                return text
        except NanoclawError as exc:
            text = f"{_sentence(exc.message)} {_sentence(exc.hint)}".strip()
        await self._say(key, event, text)
        return Taken(outcome=Outcome.ANSWERED)

    async def _run(self, caller: _Caller, said: Said) -> str | Taken:
        if caller.event.revision:
            raise Refused("an edited message is no command", hint="say it anew")
        if (command := said.known) is None:
            hint = f"'/help' lists what there is; '//{said.word}' says it to the agent"
            raise Refused(f"there is no command '/{said.word}'", hint=hint)
        if max(caller.levels.values()) < command.level and not (
            command.takes == "ID" and _answers_something(caller.answerer)
        ):
            raise Refused(f"'/{said.word}' is not for you here", hint="'/help' lists what is")
        return await self._commands[said.word](caller, said)

    def _caller(self, tx: Transaction, arrival: Arrival) -> _Caller | None:
        """Return who says something; None if they may talk to no agent there."""
        event = arrival.event
        meant = AgentName(arrival.agent) if arrival.agent else None
        if event.channel == TERMINAL:
            agents = [AgentName(name) for name in self._registry.names()]
            return _Caller(
                event=event,
                chat=None,
                levels=dict.fromkeys(agents, Level.ADMIN),
                modes=dict.fromkeys(agents, SessionMode.THREAD),
                meant=meant,
                answerer=people.answerer_here(tx, f"{event.sender} at the terminal"),
            )
        chat = find_chat(tx, event.channel, event.chat, direct=arrival.direct, title=arrival.title)
        if chat is None or chat["state"] != ChatState.OPEN:
            return None
        tx.all("set_peer", id=chat["id"], user=event.sender)
        answerer = people.answerer_of(tx, event.channel, event.sender)
        standings = answerer.standings if answerer is not None else frozenset()
        levels, modes = {}, {}
        for row in tx.all("list_wirings", chat=chat["id"]):
            agent = AgentName(row["agent"])
            verdict = decide_access(standings, agent, chat["id"], Access(row["access"]))
            if verdict in (Verdict.KNOWN, Verdict.STRANGER):
                levels[agent] = Level.MEMBER if verdict is Verdict.KNOWN else Level.GUEST
                modes[agent] = SessionMode(row["session_mode"])
                if answerer is not None and answerer.may_answer(agent):
                    levels[agent] = Level.ADMIN
        if not levels:
            return None
        return _Caller(event=event, chat=chat, levels=levels, modes=modes, meant=meant, answerer=answerer)

    def _too_many(self, caller: _Caller) -> float:
        """Return by how many commands this one comes too early; all strangers of a chat count as one."""
        event = caller.event
        known = max(caller.levels.values()) > Level.GUEST
        who = (event.channel, event.sender) if known else (event.channel, event.chat, "")
        rate = self._rates.setdefault(who, Rate(limits.COMMANDS_PER_S, limits.COMMANDS_BURST))
        if not (early_s := rate.take()):
            return 0
        if early_s * limits.COMMANDS_PER_S >= 2:  # else who goes on for long would be silenced for long
            rate.take(-1)
        return early_s * limits.COMMANDS_PER_S

    async def _say(self, key: str, event: Event, text: str) -> None:
        def say(tx: Transaction) -> list[Delivery]:
            outbox.notify(tx, key, event.place, text, in_reply_to=event.event)
            return self._outlets.claim(tx)

        self._outlets.publish(await self._db.write(say))
        # Whoever waits for an answer has it.
        self._outlets.report_activity(cards.NOBODY, event.place, "idle", events=[event.event])

    def _meant(self, caller: _Caller, said: Said) -> AgentName:
        """Return the agent that a command is about. Raises Refused."""
        here = ", ".join(caller.levels)
        if name := said.argument.removeprefix("@").lower():
            if (agent := AgentName(name)) not in caller.levels:
                raise Refused(f"no agent '{name[:32]}' listens here", hint=f"here are {here}")
        elif caller.meant in caller.levels:
            agent = caller.meant
        elif len(caller.levels) == 1:
            (agent,) = caller.levels
        else:
            raise Refused(
                f"several agents listen here: {here}", hint=f"say e.g. '/{said.word} {here.split(',')[0]}'"
            )
        command = COMMANDS[said.word]
        if caller.levels[agent] < command.level:
            raise Refused(f"'/{said.word}' is not for you with '{agent}'", hint="'/help' lists what is")
        return agent

    async def _session(self, caller: _Caller, agent: AgentName) -> SessionRow | None:
        """Return the session that the command's chat has with an agent."""
        channel, chat, thread = conversation_of(caller.modes[agent], caller.event)
        place = {"channel": channel, "chat": chat, "thread": thread}
        for row in await self._db.read("find_session", agent=agent, **place):
            return session_row(row)
        return None

    async def _help(self, caller: _Caller, said: Said) -> str:
        level = max(caller.levels.values())
        lines = [
            f"/{word}{f' [{command.takes}]' if command.takes else ''}: {command.help}"
            for word, command in COMMANDS.items()
            if command.level <= level or (command.takes == "ID" and _answers_something(caller.answerer))
        ]
        return "\n".join([*lines, "What begins with // goes to the agent, with one slash less."])

    async def _agents(self, caller: _Caller, said: Said) -> str:
        lines = []
        for name in caller.levels:
            agent = self._registry.find(name)
            about = agent.config.description if agent is not None and agent.config is not None else ""
            lines.append(f"{name}{f': {about}' if about else ''}")
        return "\n".join(lines)

    async def _status(self, caller: _Caller, said: Said) -> str:
        wanted = [self._meant(caller, said)] if said.argument or caller.meant else [*caller.levels]
        heads = {row["id"]: row for row in await self._db.read("find_work")}
        lines = []
        for agent in wanted:
            row = await self._session(caller, agent)
            live = self._sessions.find(row) if row is not None else None
            doing = live.state if live is not None else "idle"
            head = heads.get(row.id) if row is not None else None
            why = self._sessions.explain(head) if head else self._sessions.explain_hold(agent)
            lines.append(f"{agent}: {doing}{f', {why}' if why else ''}")
        return "\n".join(lines)

    async def _stop(self, caller: _Caller, said: Said) -> str:
        agent, event = self._meant(caller, said), caller.event
        where = {"channel": event.channel, "chat": event.chat, "thread": event.thread}
        stopped = False
        for row in await self._db.read("busy_places", agent=agent, **where):
            place = (event.channel, event.chat, row["at"])
            stopped |= await self._sessions.turns.stop_turn(session_row(row), place)
        return f"'{agent}' is told to stop." if stopped else f"'{agent}' does nothing here."

    async def _clear(self, caller: _Caller, said: Said) -> str:
        agent = self._meant(caller, said)
        alone = caller.direct and caller.modes[agent] is not SessionMode.AGENT
        if not alone and caller.levels[agent] < Level.ADMIN:
            raise Refused("others talk to it here, too: only its admins may say '/clear'")
        row = await self._session(caller, agent)
        if row is None:
            return f"'{agent}' knows nothing of this conversation."
        try:
            trash = await self._sessions.close(row)
        except TimeoutError:
            raise Unavailable("its container does not end", hint="try again later") from None
        return f"'{agent}' begins anew{'; what it knew is in the trash' if trash else ''}."

    async def _compact(self, caller: _Caller, said: Said) -> Taken:
        """Only the agent can: it gets this in its order, and answers."""
        agent = self._meant(caller, said)
        place = conversation_of(caller.modes[agent], caller.event)

        def store(tx: Transaction) -> Taken:
            taken = Taken()
            taken.add(*queue.enqueue(tx, agent, caller.event, conversation=place, command=said.word))
            return taken

        return await self._sessions.turns.write(store, lambda taken: next(iter(taken.sessions), None))

    async def _cost(self, caller: _Caller, said: Said) -> str:
        agent = self._meant(caller, said)
        row = await self._session(caller, agent)
        lines = []
        if row is not None:
            async for used in self._usage.list("session", agent, ""):
                if used["session"] == row.name:
                    lines.append(f"This conversation with '{agent}': {_cost_of(used)}")
        if caller.levels[agent] >= Level.ADMIN:
            async for used in self._usage.list("agent", agent, today()):
                lines.append(f"'{agent}' today: {_cost_of(used)}")
        return "\n".join(lines) or f"'{agent}' has asked no model yet."

    # --- answers -----------------------------------------------------------------------------------

    async def _answer(self, caller: _Caller, said: Said, *, allow: bool) -> str:
        if not said.argument:
            return await self._db.write(partial(_list_waiting, caller=caller))
        row = await self._answers.approvals.find(said.argument)
        await self._db.write(partial(_require, row=row, by=caller.by))
        sha256 = row["sha256"]
        if allow:
            event = caller.event
            found = await self._db.read(
                "find_card", approval=row["id"], channel=event.channel, chat=event.chat
            )
            if not found and row["state"] == ApprovalState.PENDING:
                return await self._show(caller, row)
            if found and not found[0]["whole"]:
                hint = f"'nanoclawctl approval show {row['id']}' shows all of it"
                raise Refused("it is too long to be shown, and so to be allowed, in a chat", hint=hint)
            sha256 = found[0]["sha256"] if found else sha256
        return await self._carry_out(row, sha256, allow, caller.by)

    async def _show(self, caller: _Caller, row: Row) -> str:
        """Nobody allows what they have not seen: show it first, if nobody else reads it there."""
        if not caller.direct:
            raise Refused(
                "it was not shown here", hint="say so in a chat with nobody else, or use nanoclawctl"
            )

        def show(tx: Transaction) -> list[Delivery]:
            if (shown := cards.describe(tx, row)) is not None:
                cards.show(tx, row, shown, caller.event.place)
            return self._outlets.claim(tx)

        self._outlets.publish(await self._db.write(show))
        return "Look at it first, then say it again."

    async def _carry_out(
        self, row: Row, sha256: str, allow: bool, by: Callable[[Transaction], Answerer]
    ) -> str:
        """Answer as nanoclawctl does if nothing is said of a scope; returns what came of it."""
        scope, seconds = (Scope.ONCE if row["kind"] == KIND else Scope.ALWAYS), None
        if row["kind"] == REQUEST:
            scope, seconds = (Scope.ONCE, None) if allow else (Scope.FOR, int(limits.DENIAL_S))
        row, _, _ = await self._answers.answer(row, sha256, allow=allow, scope=scope, seconds=seconds, by=by)
        if row["state"] == ApprovalState.PENDING:
            votes = await self._db.read("votes", approval=row["id"])
            return f"Approval {row['id']}: {len(votes)} of {row['needed']} have allowed it."
        return cards.outcome_of(row)

    async def react(self, event: Event, target: str) -> Outcome:
        """Take a reaction to what was sent, its text being that: the answer to an approval, or DROPPED."""
        found = await self._db.read(
            "card_of_receipt", channel=event.channel, chat=event.chat, receipt=target
        )
        reaction = event.text.translate(_WITHOUT)
        answers = {**dict.fromkeys((*cards.ALLOWS, "1"), True), **dict.fromkeys((*cards.DENIES, "2"), False)}
        if not found or (allow := answers.get(reaction)) is None:
            return Outcome.DROPPED
        (card,) = found
        (row,) = await self._db.read("find_approval", id=card["approval"])
        by = partial(_answerer, channel=event.channel, user=event.sender)
        try:
            await self._db.write(partial(_require, row=row, by=by))
            if allow and not card["whole"]:
                raise Refused(f"see 'nanoclawctl approval show {row['id']}': not all of it is shown here")
            await self._carry_out(row, card["sha256"], allow, by)
        except (Refused, NotFound) as exc:
            await self._db.write(partial(_count_at, event=event))
            rate = self._rates.setdefault((event.channel, event.chat), _clicks())
            if not rate.take():
                key = _key("click", event.channel, event.chat, event.event)
                await self._say(key, event, f"{event.sender}: {_sentence(exc.message)}")
            else:
                rate.take(-1)
        return Outcome.ANSWERED


def _clicks() -> Rate:
    return Rate(limits.CLICKS_TOLD_PER_S, limits.CLICKS_TOLD_BURST)


def _answerer(tx: Transaction, channel: str, user: str) -> Answerer:
    """Return who answers with an account. Raises Refused if that is nobody."""
    answerer = people.answerer_of(tx, channel, user)
    if answerer is None:
        raise Refused("you may not answer this")
    return answerer


def _require(tx: Transaction, row: Row, by: Callable[[Transaction], Answerer]) -> None:
    """Raise Refused unless they may answer it at this moment."""
    if not cards.may_answer(tx, row, by(tx)):
        raise Refused(f"you may not answer approval {row['id']}")


def _answers_something(answerer: Answerer | None) -> bool:
    return answerer is not None and (
        answerer.here or any(standing.role in ("owner", "admin") for standing in answerer.standings)
    )


def _list_waiting(tx: Transaction, caller: _Caller) -> str:
    """Say what waits for that person's answer."""
    lines, answerer = [], caller.by(tx)
    for row in tx.all("pending_approvals"):
        if row["expires_at"] > now_ms() and cards.may_answer(tx, row, answerer):
            shown = cards.describe(tx, row)
            lines.append(f"{row['id']}: {shown.head if shown else 'somebody has changed it'}")
    return "\n".join(lines) or "Nothing waits for your answer."


def _count(tx: Transaction, chat: Row | None) -> Taken:
    if chat is not None:
        tx.all("count_dropped", id=chat["id"], number=1)
    return Taken()


def _count_at(tx: Transaction, event: Event) -> None:
    if (chat := tx.one("find_chat", channel=event.channel, chat=event.chat)) is not None:
        tx.all("count_dropped", id=chat["id"], number=1)


def _key(what: str, *parts: str) -> str:
    """Return the key of the answer to an event: the same for the same."""
    return f"{what}.{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _cost_of(used: dict[str, object]) -> str:
    tokens = sum(int(str(used[name])) for name in ("input", "output", "cacheWrite", "cacheRead"))
    left = used["microdollarsLeft"]
    more = f", {prices.show(int(str(left)))} left" if left is not None else ""
    return f"{prices.show(int(str(used['microdollars'])))}, {used['calls']} calls, {tokens:,} tokens{more}"
