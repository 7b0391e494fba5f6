"""The provider `anthropic`: Claude through the gateway, with the tools of Anthropic's SDK in the workspace.

This module imports nothing of the SDK, so that the process can say hello before that has been loaded.
"""

from __future__ import annotations

import gc
import threading
import time
from typing import TYPE_CHECKING

from .. import journal
from ..provider import Paths, Settings, Turn
from ..turn import Chat

if TYPE_CHECKING:
    from .conversation import Conversation


class Anthropic:
    def __init__(self, settings: Settings, paths: Paths) -> None:
        self._settings, self._paths = settings, paths
        self._lock = threading.Lock()
        self._conversation: Conversation | None = None

    def run(self, turn: Turn, chat: Chat) -> list[str]:
        return self.load().run(turn, chat)

    def stop(self) -> None:
        if self._conversation is not None:  # else run() looks at chat.stopping once it is loaded
            self._conversation.stop()

    def load(self) -> Conversation:
        with self._lock:
            if self._conversation is None:
                started = time.monotonic()
                # Thousands of modules make millions of objects that stay: to look for garbage among them
                # again and again takes a quarter of the import.
                gc.disable()
                try:
                    from .conversation import Conversation

                    self._conversation = Conversation(self._settings, self._paths)
                finally:
                    gc.freeze()
                    gc.enable()
                journal.info("provider-loaded", took_ms=round((time.monotonic() - started) * 1000))
            return self._conversation


make = Anthropic
