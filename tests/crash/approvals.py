"""The router dies around each commit while an action is asked for, shown, answered and carried out.

    python -m tests.crash.approvals [SCENE ...]

Each life says and does all of it again, as runner and adapter do that got no answer; the last one lives.
Then the action was done exactly as often as people said, its agent was told once, and so were the chats.
What it does would be there twice if it were done twice: it is no idempotent effect that hides it.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import sqlite3
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from nanoclawd import outbox
from nanoclawd.db import Transaction
from nanoclawd.errors import Refused
from nanoclawd.guard import Handler, Held
from nanoclawd.messages import session_row
from nanoclawd.privileges import Action, Privileges
from tests.crash.points import Kind, Points, wrap_commits
from tests.support.router import Place
from tests.unit.router.test_chat_control import ADA, BOB, World, living


class Late(Points):
    """Counts nothing before the scene begins."""

    begun = False

    def reach(self, kind: Kind, what: str, *, dying: Callable[[], object] = lambda: None) -> None:
        if self.begun:
            super().reach(kind, what, dying=dying)


SCENES = ("allowed by a click", "allowed by two", "denied", "cannot be done")


def handler_of(scene: str) -> Handler:
    async def prepare(held: Held) -> None:
        await asyncio.sleep(0)  # e.g. a file is written, and again by the next life

    def carry_out(tx: Transaction, held: Held) -> str:
        if scene == "cannot be done":
            raise Refused("there is no such destination")
        outbox.notify(tx, f"effect.{secrets.token_hex(8)}", ("test", "elsewhere", ""), "Dinner?")
        return "it is on its way"

    return Handler(carry_out=carry_out, prepare=prepare)


async def play(scene: str, world: World, points: Late) -> None:
    """Do one life's share of a scene."""
    router = world.router
    if scene == "allowed by two":
        config = world.place.registry.agents["berta"]
        world.place.registry.agents["berta"] = replace(config, guard=Privileges(approvals=2))
    await world.say("@berta hello", chat="room", event="first")
    await router.settled()
    if not scene:
        return
    points.begun = True
    place = {"channel": "test", "chat": "room", "thread": ""}
    (row,) = await router.db.read("find_session", agent="berta", **place)
    check = partial(
        router.guard.check,
        action=Action.SEND_ELSEWHERE,
        session=session_row(row),
        place=("test", "room", ""),
        call="m/k",
        payload={"text": "Dinner?"},
    )
    ruling = await router.db.write(check)
    await world.shown()
    cards = await world.cards(ruling)
    reaction = "❌" if scene == "denied" else "✅"
    for user in (ADA, BOB):
        await world.react(reaction, cards[f"with {user}"], user)
    await world.ended(ruling)
    await world.shown()
    await router.settled()


def main() -> int:
    deaths: Counter[Kind] = Counter()
    faults: list[str] = []
    with _directory() as template:
        _life("", template, None)
        for scene in sys.argv[1:] or SCENES:
            kill_at, ended = 0, False
            while not ended:
                kill_at += 1
                with _directory() as root:
                    shutil.copytree(template / "state", root / "state")
                    ended = _life(scene, root, kill_at)
                    if not ended:
                        deaths[Kind.BEFORE_COMMIT if kill_at % 2 else Kind.AFTER_COMMIT] += 1
                        _life(scene, root, None)
                    faults += [f"{scene}, point {kill_at}: {fault}" for fault in _check(scene, root)]
    for kind, number in deaths.items():
        print(f"{kind:<24}{number:>5}")
    print(f"{'faults':<24}{len(faults):>5}", *faults, sep="\n")
    return bool(faults)


@contextmanager
def _directory() -> Iterator[Path]:
    memory = Path("/dev/shm")  # kill -9 takes nothing from a file, wherever that is
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as root:
        yield Path(root)


def _life(scene: str, root: Path, kill_at: int | None) -> bool:
    """Run one life of the router; returns whether it came to its end. Raises RuntimeError if it failed."""
    if (pid := os.fork()) == 0:
        _live(scene, root, kill_at)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"{scene}, point {kill_at}: a life failed")
    return os.WIFEXITED(status)


def _live(scene: str, root: Path, kill_at: int | None) -> None:
    log = os.open(root / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 2)
    status = 0
    try:
        with pytest.MonkeyPatch.context() as patch:
            here = root / f"life{len([*root.iterdir()])}"
            here.mkdir()
            place = Place(here, patch)
            place.handlers = dict.fromkeys(Action, handler_of(scene))
            place.systemd.manager = hash(here)  # all of it ended: as after a reboot
            if (root / "state").exists():  # all that is left of an earlier life
                (here / "STATE_HOME").rmdir()
            else:
                (here / "STATE_HOME").rename(root / "state")
            (here / "STATE_HOME").symlink_to(root / "state")
            points = Late(kill_at, lambda *words: None)
            wrap_commits(points)

            async def body() -> None:
                async with living(place) as world:
                    await play(scene, world, points)

            place.run(body)
    except BaseException:
        traceback.print_exc()
        sys.stdout.write((root / "log").read_text()[-3000:])
        sys.stdout.flush()
        status = 1
    os._exit(status)


def _check(scene: str, root: Path) -> list[str]:
    """Return what is wrong at the end."""
    with closing(sqlite3.connect(root / "state/nanoclaw/nanoclaw.db")) as connection:
        keys = [key for (key,) in connection.execute("SELECT key FROM outbox")]
        told = [body for (body,) in connection.execute("SELECT body FROM inbox WHERE sender = ''")]
        (state,) = connection.execute("SELECT state FROM approval").fetchone()
        audit = Counter(event for (event,) in connection.execute("SELECT event FROM audit"))
    end = {"denied": "denied", "cannot be done": "expired"}.get(scene, "used")
    wanted = {
        "effects": (sum(key.startswith("effect.") for key in keys), int(end == "used")),
        "state": (state, end),
        "told the agent": (len(told), 1),
        "cards": (sum(".card" in key and key[-1].isdigit() for key in keys), 2),
        "told the chats": (sum(".card" in key and key.endswith(f".{end}") for key in keys), 2),
        "asked in the trail": (audit["approval_asked"], 1),
        "ended in the trail": (audit[f"approval_{end}"], 1),
    }
    return [f"{what}: {is_} and not {should}" for what, (is_, should) in wanted.items() if is_ != should]


if __name__ == "__main__":
    sys.exit(main())
