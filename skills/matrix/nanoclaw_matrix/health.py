"""How it is with the platform, as it is told to the router."""

from __future__ import annotations

import asyncio
from enum import StrEnum

FAILURES = 3  #: so many messages in a row that cannot be decrypted are an alarm


class State(StrEnum):
    CONNECTING = "connecting"
    CONNECTED = "connected"
    LOGIN = "login"  #: somebody must store another password or token
    DEGRADED = "degraded"  #: it works, but not all of it
    FAILED = "failed"


class Health:
    """The adapter's state, with what makes it worse than connected."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self._state, self._text = State.CONNECTING, ""
        self._undecrypted = 0  # in a row
        self._skipped = 0
        self._news = ""

    def set(self, state: State, text: str = "") -> None:
        if (state, text) != (self._state, self._text):
            self._state, self._text = state, text
            self.changed.set()

    def decrypted(self, success: bool) -> None:
        """Count a message that could be decrypted, or could not."""
        self._undecrypted = 0 if success else self._undecrypted + 1
        self.changed.set()

    def skipped(self) -> None:
        """Count an event that could not be understood."""
        self._skipped += 1

    def tell(self, news: str) -> None:
        """Show something that a person waits for at this moment; "" takes it back."""
        self._news = news
        self.changed.set()

    def show(self) -> tuple[State, str]:
        """Return state and text for ReportHealth()."""
        state, texts = self._state, [self._text]
        if state is State.CONNECTED and self._undecrypted >= FAILURES:
            state = State.DEGRADED
            texts.append(f"{self._undecrypted} messages in a row could not be decrypted")
        if self._skipped:
            texts.append(f"{self._skipped} malformed events were skipped")
        return state, "; ".join(text for text in [*texts, self._news] if text)
