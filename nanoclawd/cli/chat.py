"""A conversation with an agent in a terminal."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
import uuid
from argparse import Namespace
from math import inf
from queue import Empty
from types import FrameType

from nanoclawd.cli import control, output, text
from nanoclawd.cli.conversation import Activity, Conversation, Delivery, Item, check_text
from nanoclawd.cli.parser import UsageError
from nanoclawd.cli.prompt import Prompt, Woken, no_echo
from nanoclawd.cli.screen import Screen
from nanoclawd.errors import NanoclawError

UNREAD_S = 0.3  #: what waits from earlier comes first, and within this time
STOP_S = 15.0  #: a turn that was asked to stop is waited for so long

_STATUS = {
    "queued": "waits until {agent} has time",
    "starting": "{agent} starts",
    "thinking": "{agent} thinks",
    "text": "{agent} writes",
    "tool": "{agent}: {text}",
    "retrying": "tries again: {text}",
    "away": "the router is away, trying again",
    "back": "sent",
}


def chat(options: Namespace) -> int:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("a chat needs a terminal", hint="in scripts use 'nanoclawctl send --wait'")
    agent, screen = options.AGENT, Screen(sys.stdout, preview=True)
    conversation = Conversation(agent, options.chat, screen)
    runtime = control.call_agent("ShowAgent", agent)["runtime"]
    if runtime["problem"]:
        output.talk(f"warning: '{agent}' cannot work: {runtime['problem']}")
    return _Chat(agent, conversation, screen).run()


class _Chat:
    """The main thread's side. The conversation's thread only fills `inbox`."""

    def __init__(self, agent: str, conversation: Conversation, screen: Screen) -> None:
        self.agent = agent
        self.conversation = conversation
        self.inbox = conversation.inbox
        self.screen = screen
        self.prompt = Prompt("you> ", is_waiting=lambda: not self.inbox.empty())
        self.exchanging = False  #: activity is of interest
        self.working = False  #: Ctrl-C is for the agent, not for us
        self.lost: NanoclawError | None = None  #: why nothing can come any more
        self.unsent = ("", "")  #: text and event of a message that may not be stored
        signal.signal(signal.SIGINT, self._on_interrupt)
        self.conversation.connect(put=self._put)

    def run(self) -> int:
        """Talk until the person leaves; return the exit code."""
        self._show_waiting(UNREAD_S)
        leaving = False
        while True:
            try:
                message = self.prompt.read()
                leaving = False
                if message.strip():
                    self._exchange(message)
            except Woken:
                self._show_waiting(0)
            except EOFError:
                print()
                return 0
            except KeyboardInterrupt:
                print()
                if leaving and not self.prompt.dropped:
                    return 130
                leaving = not self.prompt.dropped
                if leaving:
                    output.talk("Ctrl-C again or Ctrl-D leaves.")

    def _exchange(self, message: str) -> None:
        """Send one message and show what comes until it is answered."""
        try:
            self.exchanging = True
            with no_echo():
                event = self._send(check_text(message))
                self.working = True
                self._wait(event)
        except NanoclawError as error:
            if error is self.lost:
                raise
            self._say(error)
            self.prompt.typed = message
        except KeyboardInterrupt:
            self._say("It may not have been sent. Send it again to be sure: it will not be doubled.")
            self.prompt.typed = message
        finally:
            self.working = self.exchanging = False
            self.screen.end()

    def _send(self, message: str) -> str:
        # By the event the router knows whether it has the message already.
        event = self.unsent[1] if self.unsent[0] == message else str(uuid.uuid4())
        self.unsent = (message, event)
        self.screen.begin("sending")
        self.conversation.until = inf
        self.conversation.deliver(message, event)
        self.unsent = ("", "")
        return event

    def _wait(self, event: str) -> None:
        stopping = False
        self.screen.begin("sent")
        with contextlib.suppress(TimeoutError):
            for item in self.conversation.follow(event):
                if not isinstance(item, KeyboardInterrupt):
                    self._show(item, status=not stopping)
                    if isinstance(item, Delivery) and item.asks:
                        return  # what is typed now is the answer, and what follows belongs to that
                elif stopping:
                    return self._say("It goes on; the reply will be shown when it comes.")
                else:
                    stopping = True
                    self.screen.set_status("stopping; Ctrl-C again goes on without waiting")
                    if not self._stop():
                        return
                    self.conversation.until = time.monotonic() + STOP_S

    def _stop(self) -> bool:
        """Stop the turn; return whether there is something to wait for."""
        try:
            if self.conversation.stop_turn():
                return True
            self._say("There was nothing to stop.")
        except NanoclawError as error:
            self._say(error)
        return False

    def _say(self, what: str | NanoclawError) -> None:
        self.screen.end()
        output.talk(what) if isinstance(what, str) else output.say_error(what, as_json=False)

    def _show_waiting(self, within_s: float) -> None:
        """Show what was sent while nobody waited for it, or comes `within_s`."""
        until = time.monotonic() + within_s
        with contextlib.suppress(Empty):
            while (item := self.inbox.get(timeout=max(0.0, until - time.monotonic()))) is not None:
                self._show(item, status=False)

    def _show(self, item: Item, *, status: bool) -> None:
        match item:
            case Delivery():
                # Printed unless that was done; then reported: what fails in between is known as shown.
                if not self.conversation.was_shown(item):
                    self.screen.erase()
                    name = output.colour(output.BOLD, f"{text.one_line(item.agent)}>")
                    if item.kind == "notice":
                        name = output.colour(output.YELLOW, "notice:")
                    print(name, text.visible(item.text.rstrip("\n")), flush=True)
                self.conversation.report(item.key)
            case Activity() if status:
                words = text.one_line(item.text)
                if item.kind == "text":
                    self.screen.add_text(item.text)
                if item.kind == "queued" and words:
                    self.screen.set_status(words)
                elif template := _STATUS.get(item.kind):
                    self.screen.set_status(template.format(agent=self.agent, text=words))
            case NanoclawError():
                self.lost = item
                raise item

    def _put(self, item: Item) -> None:
        """Called in the conversation's thread."""
        if self.exchanging or not isinstance(item, Activity):
            self.inbox.put(item)
        if isinstance(item, Delivery | NanoclawError):
            self.prompt.wake()

    def _on_interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        if not self.working:
            raise KeyboardInterrupt
        self.inbox.put(KeyboardInterrupt())
