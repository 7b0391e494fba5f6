"""People, the accounts by which channels know them, and what they are where; each as one step of a write.

Only accounts and roles decide anything. Names that a platform shows are its users' own choice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nanoclawd.access import Role, Standing, may_answer
from nanoclawd.db import Row, Transaction, now_ms
from nanoclawd.errors import NotFound, Refused
from nanoclawd.ids import PersonName, parse_person_name

OWNER = PersonName("owner")


def find_person(tx: Transaction, name: str) -> Row:
    """Return one person. Raises NotFound."""
    row = tx.one("find_person", name=name)
    if row is None:
        raise NotFound(f"there is no person '{name[:64]}'", hint="'nanoclawctl person list' shows all")
    return row


def ensure_person(tx: Transaction, name: str) -> Row:
    """Return the person of that name, who need not be known yet. Raises Refused."""
    name = parse_person_name(name)
    return tx.one("find_person", name=name) or tx.all("add_person", name=name, now=now_ms())[0]


def person_of(tx: Transaction, channel: str, user: str) -> Row:
    """Return the person with that account, who is made if there is none. Their name comes from the
    account's.
    """
    identity = tx.one("find_identity", channel=channel, user=user)
    if identity is not None:
        return next(row for row in tx.all("list_people") if row["id"] == identity["person"])
    base = re.sub(r"[^a-z0-9]+", "_", user.lower()).strip("_")[:28] or "somebody"
    base = base if base[0].isalpha() else f"p_{base}"[:28]
    number, name = 1, base
    while tx.one("find_person", name=name) is not None:
        number, name = number + 1, f"{base}_{number + 1}"
    person = ensure_person(tx, name)
    link(tx, person, channel, user, how="allowed")
    return person


def link(tx: Transaction, person: Row, channel: str, user: str, *, how: str) -> None:
    """Have an account be a person's; it is nobody else's from then on."""
    tx.all("link_identity", channel=channel, user=user, person=person["id"], how=how)


def unlink(tx: Transaction, person: Row, channel: str, user: str) -> None:
    """Have an account of a person's be nobody's. Raises NotFound."""
    if not tx.all("unlink_identity", channel=channel, user=user, person=person["id"]):
        raise NotFound(
            f"'{user[:80]}' of channel '{channel}' is not linked to '{person['name']}'",
            hint="'nanoclawctl person list' shows all",
        )


def standings_of(tx: Transaction, channel: str, user: str) -> frozenset[Standing]:
    """Return all that an account is to us; empty: a stranger."""
    rows = tx.all("standings", channel=channel, user=user)
    return frozenset(Standing(Role(row["role"]), row["agent"], row["chat"]) for row in rows)


def set_role(tx: Transaction, person: Row, standing: Standing) -> None:
    """Give a person one role more, in place of any other for the same chat or agent. Raises Refused."""
    if standing.role is not Role.OWNER:
        _require_owner(tx, person, standing)
    tx.all(
        "set_role",
        person=person["id"],
        agent=standing.agent,
        chat=standing.chat,
        role=standing.role,
        now=now_ms(),
    )


def remove_role(tx: Transaction, person: Row, standing: Standing) -> None:
    """Take away what a person is to `standing.agent`, in `standing.chat`, or everywhere. Raises NotFound,
    Refused.
    """
    _require_owner(tx, person, standing)
    if not tx.all("remove_role", person=person["id"], agent=standing.agent, chat=standing.chat):
        raise NotFound(f"'{person['name']}' has no such role", hint="'nanoclawctl person list' shows all")


def _require_owner(tx: Transaction, person: Row, standing: Standing) -> None:
    """Raise Refused if the last owner would be none any more."""
    roles = tx.all("list_members", person=person["id"], chat=None)
    is_owner = any(row["role"] == Role.OWNER for row in roles)
    everywhere = not standing.agent and standing.chat is None
    if is_owner and everywhere and tx.all("count_owners")[0]["owners"] == 1:
        raise Refused(f"'{person['name']}' is the only owner", hint="make somebody else an owner first")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answerer:
    """Somebody who answers an approval."""

    person: int
    by: str  #: who that is, for the record
    here: bool  #: on this host, by the control socket or the terminal, where nobody asks for roles
    standings: frozenset[Standing] = frozenset()

    def may_answer(self, agent: str) -> bool:
        """Whether they may say what `agent` may do; "": what is of more than one."""
        return self.here or may_answer(self.standings, agent)

    def require(self, approval: str, agent: str) -> None:
        """Raise Refused unless they may answer what is about that."""
        if not self.may_answer(agent):
            whose = f"admins of '{agent}', admins of all" if agent else "Admins of all"
            raise Refused(f"you may not answer approval {approval}", hint=f"{whose} and owners may")


def standings_of_person(tx: Transaction, person: int) -> frozenset[Standing]:
    """Return all that a person is to us."""
    rows = tx.all("list_members", person=person, chat=None)
    return frozenset(Standing(Role(row["role"]), row["agent"], row["chat"]) for row in rows)


def answerer_here(tx: Transaction, by: str) -> Answerer:
    """Return whoever may open our sockets: the owner."""
    return Answerer(person=find_person(tx, OWNER)["id"], by=by, here=True)


def answerer_of(tx: Transaction, channel: str, user: str) -> Answerer | None:
    """Return the person behind an account, if there is one."""
    identity = tx.one("find_identity", channel=channel, user=user)
    if identity is None:
        return None
    standings = standings_of(tx, channel, user)
    return Answerer(person=identity["person"], by=f"{user} on {channel}", here=False, standings=standings)
