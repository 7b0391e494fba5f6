"""Codes by which a person proves that an account is theirs: shown on their terminal, sent by that account.

They are kept in memory: a restart of the router ends them, and the person asks for another.
"""

from __future__ import annotations

import hmac
import re
import secrets
import time
from dataclasses import dataclass

from nanoclawd import journal, limits, outbox, people
from nanoclawd.audit import Kind, append
from nanoclawd.db import Transaction
from nanoclawd.errors import Refused
from nanoclawd.messages import Event

#: Without those that people take for one another.
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"
_CODE = re.compile(rf"\s*([{_LETTERS}]{{4}})-([{_LETTERS}]{{4}})\s*", re.IGNORECASE | re.ASCII)


@dataclass(slots=True)
class _Pairing:
    channel: str
    person: str
    code: str
    until: float  #: by time.monotonic()
    guesses: int = 0  #: wrong codes on its channel while it was good


class Pairings:
    """The codes that are good at this moment. 40 bits each: 20 guesses find one in fifty thousand
    million.
    """

    def __init__(self) -> None:
        self._open: list[_Pairing] = []

    def begin(self, channel: str, person: str) -> str:
        """Return a new code for an account of `person` on a channel, in place of an older one. Raises
        Refused.
        """
        self._forget()
        self._open = [p for p in self._open if (p.channel, p.person) != (channel, person)]
        if len(self._open) >= limits.PAIRINGS:
            raise Refused(f"{limits.PAIRINGS} codes are open already", hint="they end by themselves")
        code = "".join(secrets.choice(_LETTERS) for _ in range(8))
        self._open.append(_Pairing(channel, person, code, time.monotonic() + limits.PAIRING_S))
        return f"{code[:4]}-{code[4:]}"

    def is_code(self, channel: str, text: str) -> bool:
        """Return whether a message looks like a code while a channel has one: then it is for nobody else."""
        self._forget()
        return any(p.channel == channel for p in self._open) and _CODE.fullmatch(text) is not None

    def pair(self, tx: Transaction, event: Event) -> None:
        """Link the sender of the right code, and tell the chat; a wrong one counts."""
        found = _CODE.fullmatch(event.text)
        assert found is not None
        code, match = "".join(found.groups()).upper(), None
        for pairing in self._open:
            if pairing.channel != event.channel:
                continue
            if hmac.compare_digest(pairing.code, code):
                match = pairing
            else:
                pairing.guesses += 1
        self._forget()
        if match is None:
            tx.tell(journal.warning, "pairing-failed", "a wrong code", channel=event.channel)
            return
        self._open.remove(match)
        person = people.ensure_person(tx, match.person)
        people.link(tx, person, event.channel, event.sender, how="paired")
        account = {"channel": event.channel, "user": event.sender}
        append(tx, Kind.CONTROL, "paired", {"person": match.person, **account})
        tx.tell(journal.info, "paired", channel=event.channel, person=match.person)
        text = f"This account is {match.person}'s from now on."
        outbox.notify(tx, f"pair.{secrets.token_hex(8)}", event.place, text, in_reply_to=event.event)

    def _forget(self) -> None:
        """Have those be over whose time is, or that were guessed at too often."""
        now = time.monotonic()
        self._open = [p for p in self._open if p.until > now and p.guesses < limits.PAIRING_GUESSES]
