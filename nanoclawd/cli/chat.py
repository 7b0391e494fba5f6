"""A conversation with an agent in a terminal."""

from __future__ import annotations

import signal
import sys
import time
import uuid
from argparse import Namespace
from queue import Empty, SimpleQueue
from types import FrameType

from nanoclawd import paths
from nanoclawd.cli import control, output, text
from nanoclawd.cli.conversation import (
    Activity,
    Attachment,
    Broken,
    Calls,
    Delivery,
    Item,
    Link,
    Turn,
    chat_id,
    check_text,
)
from nanoclawd.cli.parser import UsageError
from nanoclawd.cli.prompt import Prompt, Woken, no_echo, styled
from nanoclawd.cli.screen import Screen
from nanoclawd.cli.shown import Shown, shown_file
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
}


class _Interrupt:
    """The person pressed Ctrl-C while the agent worked."""


def run(options: Namespace) -> int:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("a chat needs a terminal", hint="in scripts use 'nanoclawctl send --wait'")
    chat = chat_id(options.AGENT, options.chat)
    runtime = control.call_agent("ShowAgent", options.AGENT)["runtime"]
    if runtime["state"] == "held":
        output.talk(
            f"'{options.AGENT}' is stopped; messages wait until 'nanoclawctl agent start {options.AGENT}'."
        )
    elif runtime["state"] == "broken":
        output.talk(f"warning: '{options.AGENT}' cannot run: {runtime['problem']}")
    return _Chat(options.AGENT, chat).run()


class _Chat:
    """The main thread's side. The attachment's thread only fills `inbox`."""

    def __init__(self, agent: str, chat: str) -> None:
        self.agent = agent
        self.inbox: SimpleQueue[Item | _Interrupt] = SimpleQueue()
        self.shown = Shown(shown_file())
        self.screen = Screen(sys.stdout, preview=True)
        self.prompt = Prompt(
            styled("you> "),
            paths.state() / "terminal" / "history",
            is_waiting=lambda: not self.inbox.empty(),
        )
        self.calls = Calls(chat, agent)
        self.exchanging = False  #: activity is of interest
        self.working = False  #: Ctrl-C is for the agent, not for us
        self.lost: NanoclawError | None = None  #: why nothing can come any more
        self.unsent: tuple[str, str] | None = None  #: text and event of a message that may not be stored
        signal.signal(signal.SIGINT, self._on_interrupt)
        Attachment(chat, event=None, put=self._put)

    def run(self) -> int:
        """Talk until the person leaves; return the exit code."""
        self._show_unread()
        leaving = False
        while True:
            try:
                message = self.prompt.read()
                leaving = False
                if message.strip():
                    self._exchange(message)
            except Woken:
                self._show_waiting()
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
                self._wait(Turn(event))
        except NanoclawError as error:
            if error is self.lost:
                raise
            self.screen.end()
            output.say_error(error, as_json=False)
            self.prompt.typed = message
        except KeyboardInterrupt:
            self.screen.end()
            output.talk("It may not have been sent. Send it again to be sure: it will not be doubled.")
            self.prompt.typed = message
        finally:
            self.working = self.exchanging = False
            self.screen.end()

    def _send(self, message: str) -> str:
        event = str(uuid.uuid4())
        if self.unsent is not None and self.unsent[0] == message:
            event = self.unsent[1]  # by it the router knows whether it has the message already
        self.unsent = (message, event)
        self.screen.begin("sending")
        self.calls.deliver(message, event, until=float("inf"))
        self.unsent = None
        return event

    def _wait(self, turn: Turn) -> None:
        stopping = False
        self.screen.begin("sent")
        until = float("inf")
        while (left_s := turn.left_s(time.monotonic())) != 0 and time.monotonic() < until:
            try:
                item = self.inbox.get(timeout=min(left_s or 1.0, 1.0))
            except Empty:
                self.screen.tick()
                continue
            if isinstance(item, _Interrupt):
                if stopping:
                    self.screen.end()
                    return output.talk("It goes on; the reply will be shown when it comes.")
                stopping = True
                self.screen.set_status("stopping; Ctrl-C again goes on without waiting")
                if not self._stop():
                    return
                until = time.monotonic() + STOP_S
                continue
            if isinstance(item, Delivery | Activity):
                turn.note(item, time.monotonic())
            self._show(item, status=not stopping)

    def _stop(self) -> bool:
        """Stop the turn; return whether there is something to wait for."""
        try:
            stopped = self.calls.stop_turn()
        except NanoclawError as error:
            self.screen.end()
            output.say_error(error, as_json=False)
            return False
        if not stopped:
            self.screen.end()
            output.talk("There was nothing to stop.")
        return stopped

    def _show_unread(self) -> None:
        """Show what was sent while nobody was here, before the first prompt."""
        until = time.monotonic() + UNREAD_S
        while (left_s := until - time.monotonic()) > 0:
            try:
                item = self.inbox.get(timeout=left_s)
            except Empty:
                return
            if item is None:
                return
            self._show(item, status=False)

    def _show_waiting(self) -> None:
        while not self.inbox.empty():
            self._show(self.inbox.get(), status=False)

    def _show(self, item: Item | _Interrupt, *, status: bool) -> None:
        match item:
            case Delivery():
                self._show_delivery(item)
            case Activity() if status:
                if item.kind == "text":
                    self.screen.add_text(item.text)
                if template := _STATUS.get(item.kind):
                    words = template.format(agent=self.agent, text=text.one_line(item.text))
                    self.screen.set_status(words)
            case Link(up=up) if status:
                self.screen.set_status("sent" if up else "the router is away, trying again")
            case Broken(error=error):
                self.lost = error
                raise error

    def _show_delivery(self, delivery: Delivery) -> None:
        """Print it, unless that was done; then report it: a failure in between is covered by `shown`."""
        if delivery.key not in self.shown:
            self.screen.erase()
            words = text.visible(delivery.text.rstrip("\n"))
            if delivery.kind == "notice":
                print(f"{output.colour(output.YELLOW, 'notice:')} {words}", flush=True)
            else:
                name = text.one_line(delivery.agent)
                print(f"{output.colour(output.BOLD, f'{name}>')} {words}", flush=True)
            self.shown.add(delivery.key)
        self.calls.report_sent(delivery.key)

    def _put(self, item: Item) -> None:
        """Called in the attachment's thread."""
        if isinstance(item, Delivery | Broken):
            self.inbox.put(item)
            self.prompt.wake()
        elif self.exchanging or not isinstance(item, Activity):
            self.inbox.put(item)

    def _on_interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        if not self.working:
            raise KeyboardInterrupt
        self.inbox.put(_Interrupt())
