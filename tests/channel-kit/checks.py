"""What each adapter has to do. A check sees to itself what it needs, and leaves the adapter running."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

from world import POLL_S, WITHIN_S, Failed, Json, World

Check = Callable[[World], Awaitable[None]]
CHECKS: dict[str, Check] = {}
QUIET_S = 0.5  #: long enough to see that something is not done
KILLS = 4
SEED = 1


def check(name: str) -> Callable[[Check], Check]:
    def add(function: Check) -> Check:
        CHECKS[name] = function
        return function

    return add


def need(condition: object, otherwise: str) -> None:
    if not condition:
        raise Failed(otherwise)


# --- introduction and health ------------------------------------------------------------------------


@check("announces itself on each connection, first of all")
async def announces(world: World) -> None:
    first: dict[int, str] = {}
    for call in world.router.calls:
        first.setdefault(call.connection, call.method)
    wrong = set(first.values()) - {"Announce"}
    need(not wrong, f"began with {', '.join(wrong)}")
    need(world.router.announced and world.router.announced["accounts"], "names no account of its own")


@check("says how it is")
async def says_health(world: World) -> None:
    world.needs("health")
    await world.until(lambda: world.router.of("ReportHealth", state="connected"), "ReportHealth(connected)")


@check("notices that its platform is away, and comes back")
async def platform_away(world: World) -> None:
    chat = await world.chat()
    before = len(world.router.of("ReportHealth"))
    await world.driver("cut")
    try:
        await world.until(
            lambda: any(
                c.parameters["state"] != "connected" for c in world.router.of("ReportHealth")[before:]
            ),
            "ReportHealth of anything but connected",
        )
    finally:
        await world.driver("heal")
    await world.say(chat, "are you back?")


# --- from the platform to the router ----------------------------------------------------------------


@check("hands over what is said, with its chat, event, sender and text")
async def hands_over(world: World) -> None:
    chat = await world.chat()
    said = await world.driver("say", chat=chat, text="hello")
    await world.until(lambda: world.delivered(chat, said["event"]), "Deliver")
    told = world.delivered(chat, said["event"])[0]
    need(told["text"] == "hello", f"as {told['text']!r}")
    need(told["sender"] == said["sender"], f"as from {told['sender']!r}, not {said['sender']!r}")
    need(told["revision"] == 0, f"with the revision {told['revision']}")


@check("hands over in the order of the chat")
async def in_order(world: World) -> None:
    chat = await world.chat()
    events = [(await world.driver("say", chat=chat, text=f"{n}"))["event"] for n in range(10)]
    await world.until(lambda: world.delivered(chat, events[-1]), "Deliver of the last")
    told = [call.parameters["event"] for call in world.router.of("Deliver", chat=chat)]
    need(told == events, f"{events} came as {told}")


@check("hands over one event of a chat at a time, the next one after the answer")
async def one_at_a_time(world: World) -> None:
    chat = await world.chat()
    world.router.held.add("Deliver")
    try:
        first = await world.say(chat, "first")
        second = (await world.driver("say", chat=chat, text="second"))["event"]
        await asyncio.sleep(QUIET_S)
        told = {call.parameters["event"] for call in world.router.of("Deliver", chat=chat)}
        need(told == {first}, "the second came before the first was answered")
    finally:
        world.router.held.clear()
        world.router.hang_up()
    await world.until(lambda: world.delivered(chat, second), "Deliver of the second")


@check("hands over again what was not answered, with the same id, after kill -9")
async def again_after_kill(world: World) -> None:
    chat = await world.chat()
    world.router.held.add("Deliver")
    try:
        event = await world.say(chat, "is it lost?")
        await world.kill_adapter()
    finally:
        world.router.held.clear()
    before = len(world.delivered(chat, event))
    await world.run_adapter()
    await world.until(lambda: len(world.delivered(chat, event)) > before, "Deliver again, with the same id")


@check("the same when the router goes away and comes back")
async def again_after_router(world: World) -> None:
    chat = await world.chat()
    world.router.held.add("Deliver")
    try:
        event = await world.say(chat, "is it lost?")
        world.router.stop()
    finally:
        world.router.held.clear()
    before = len(world.delivered(chat, event))
    await world.router.start()
    await world.until(lambda: len(world.delivered(chat, event)) > before, "Deliver again, with the same id")
    await world.until(world.router.is_attached, "Attach again")


@check("hands over what was said while it was away")
async def said_while_away(world: World) -> None:
    chat = await world.chat()
    await world.kill_adapter()
    events = [(await world.driver("say", chat=chat, text=f"{n}"))["event"] for n in range(20)]
    await world.run_adapter()
    await world.until(lambda: world.delivered(chat, events[-1]), "Deliver of the last")
    told = [*dict.fromkeys(call.parameters["event"] for call in world.router.of("Deliver", chat=chat))]
    need(told == events, f"{events} came as {told}")


@check("repeats a call that is refused as Unavailable")
async def repeats(world: World) -> None:
    chat = await world.chat()
    world.router.errors["Deliver"] = ["Unavailable"]
    event = (await world.driver("say", chat=chat, text="again"))["event"]
    await world.until(lambda: len(world.delivered(chat, event)) > 1, "Deliver again")


@check("goes on after an event that is Refused")
async def goes_on(world: World) -> None:
    chat = await world.chat()
    world.router.errors["Deliver"] = ["Refused"]
    await world.say(chat, "not taken")
    await world.say(chat, "taken")


@check("hands over nothing that its own accounts have said")
async def own_messages(world: World) -> None:
    chat = await world.chat()
    own = (await world.driver("own", chat=chat, text="I said"))["event"]
    key = world.router.deliver(chat, "so did I")
    await world.reported(key)
    await world.say(chat, "and I")
    sent = {own, *world.router.sent[key]}
    told = [call.parameters["event"] for call in world.router.of("Deliver", chat=chat)]
    need(not sent & set(told), "its own message came back")


@check("says that a chat is of two")
async def direct(world: World) -> None:
    chat = await world.chat(direct=True)
    event = await world.say(chat, "just us")
    told = world.delivered(chat, event)[0]["kind"]
    need(told == "direct", f"as {told}")


@check("says that it is mentioned")
async def mentioned(world: World) -> None:
    chat = await world.chat()
    chatter = await world.say(chat, "talk")
    event = await world.say(chat, "you there", mention=True)
    need(world.delivered(chat, event)[0]["mentioned"], "did not say so")
    need(not world.delivered(chat, chatter)[0]["mentioned"], "said so of another")


@check("names the thread")
async def threads(world: World) -> None:
    world.can("threads")
    chat = await world.chat()
    thread = (await world.driver("thread", chat=chat))["thread"]
    event = await world.say(chat, "in the thread", thread=thread)
    told = world.delivered(chat, event)[0]["thread"]
    need(told, "no thread is named")
    key = world.router.deliver(chat, "there, too", thread=told)
    await world.reported(key)
    messages = (await world.driver("messages", chat=chat))["messages"]
    need([m["thread"] for m in messages if m["text"].strip() == "there, too"] == [thread], "sent elsewhere")


@check("hands over an edit as a higher revision, with the whole text")
async def edit(world: World) -> None:
    chat = await world.chat()
    event = await world.say(chat, "helo")
    for number, text in enumerate(("hello", "hello!"), 2):
        await world.driver("edit", chat=chat, event=event, text=text)
        await world.until(lambda n=number: len(world.delivered(chat, event)) >= n, "Deliver of the edit")  # type: ignore[misc]
    told = [(each["revision"], each["text"]) for each in world.delivered(chat, event)]
    need([text for _, text in told] == ["helo", "hello", "hello!"], f"as {told}")
    need(told[0][0] < told[1][0] < told[2][0], f"revisions are {[number for number, _ in told]}")


@check("retracts what was taken back")
async def redaction(world: World) -> None:
    chat = await world.chat()
    event = await world.say(chat, "oops")
    await world.driver("redact", chat=chat, event=event)
    await world.until(lambda: world.router.of("Retract", chat=chat, event=event), "Retract")


@check("hands over a reaction, and that it was taken back")
async def reaction(world: World) -> None:
    world.can("reactions")
    chat = await world.chat()
    event = await world.say(chat, "react to this")
    made = (await world.driver("react", chat=chat, target=event, reaction="👍"))["event"]
    about = {"chat": chat, "target": event, "event": made, "reaction": "👍"}
    await world.until(lambda: world.router.of("React", removed=False, **about), "React")
    await world.driver("unreact", chat=chat, event=made)
    await world.until(lambda: world.router.of("React", removed=True, **about), "React(removed)")


@check("asks before it joins, and does what is said")
async def invitations(world: World) -> None:
    for state, later, end in (
        ("open", None, "joined"),
        ("blocked", None, "left"),
        ("new", "open", "joined"),
        ("new", "blocked", "left"),
    ):
        world.router.chat_state = state
        chat = (await world.driver("invite"))["chat"]
        await world.until(lambda c=chat: world.router.of("Invite", chat=c), "Invite")  # type: ignore[misc]
        if later is not None:
            await asyncio.sleep(QUIET_S)
            found = (await world.driver("membership", chat=chat))["membership"]
            need(found == "invited", f"{found} before anybody has said")
            world.router.push({"chat": {"chat": chat, "state": later}})
        await _membership(world, chat, end)
    world.router.chat_state = "open"


async def _membership(world: World, chat: str, wanted: str) -> None:
    """Wait until the platform says that of the adapter's account."""
    end = time.monotonic() + WITHIN_S
    while (found := (await world.driver("membership", chat=chat))["membership"]) != wanted:
        need(time.monotonic() < end, f"the chat is {found}, not {wanted}")
        await asyncio.sleep(POLL_S)


@check("asks again after a start about an invitation that nobody has answered")
async def invitation_again(world: World) -> None:
    world.router.chat_state = "new"
    chat = (await world.driver("invite"))["chat"]
    await world.until(lambda: world.router.of("Invite", chat=chat), "Invite")
    await world.kill_adapter()
    world.router.chat_state = "open"
    await world.run_adapter()
    await _membership(world, chat, "joined")


@check("survives what a hostile platform sends")
async def garbage(world: World) -> None:
    chat = await world.chat()
    await world.driver("garbage")
    await world.say(chat, "still there?")


@check("survives a message that is too long for the router")
async def giant(world: World) -> None:
    chat = await world.chat()
    await world.driver("say", chat=chat, text="x" * (700 << 10))
    await world.say(chat, "still there?")


# --- from the router to the platform ----------------------------------------------------------------


@check("sends, and reports the platform's id")
async def sends(world: World) -> None:
    chat = await world.chat()
    key = world.router.deliver(chat, "hello there")
    await world.reported(key)
    messages = (await world.driver("messages", chat=chat))["messages"]
    found = [m["id"] for m in messages if m["text"].strip() == "hello there"]
    receipts = world.router.sent[key]
    # A terminal has no ids.
    need(found in (receipts[:1], [None]), f"receipts {receipts}, the platform has {found}")


@check("sends in the order of the chat")
async def sends_in_order(world: World) -> None:
    chat = await world.chat()
    for number in range(10):
        await world.reported(world.router.deliver(chat, f"{number}"))
    texts = await world.texts(chat)
    need(texts == [f"{n}" for n in range(10)], f"as {texts}")


@check("sends a key once that comes twice")
async def once(world: World) -> None:
    chat = await world.chat()
    world.router.held.add("ReportSent")
    try:
        key = world.router.deliver(chat, "once")
        await world.until(lambda: world.router.of("ReportSent", key=key), "ReportSent")
    finally:
        world.router.held.clear()
    before = len(world.router.of("ReportSent", key=key))
    world.router.hang_up()
    await world.until(lambda: len(world.router.of("ReportSent", key=key)) > before, "ReportSent again")
    texts = await world.texts(chat)
    need(texts == ["once"], f"the chat has {texts}")


@check("the same after kill -9 between sending and the answer to its report")
async def once_after_kill(world: World) -> None:
    chat = await world.chat()
    world.router.held.add("ReportSent")
    try:
        key = world.router.deliver(chat, "once")
        await world.until(lambda: world.router.of("ReportSent", key=key), "ReportSent")
        await world.kill_adapter()
    finally:
        world.router.held.clear()
    await world.run_adapter()
    await world.reported(key)
    texts = await world.texts(chat)
    need(texts == ["once"], f"the chat has {texts}")


@check("edits what it has sent")
async def edits(world: World) -> None:
    world.can("edits")
    shown = await _about(world, "edit", "hello")
    need(shown["text"].strip() == "hello", f"the chat has {shown['text']!r}")


@check("reacts")
async def reacts(world: World) -> None:
    world.can("reactions")
    shown = await _about(world, "reaction", "🎉")
    need(shown["reactions"] == ["🎉"], f"the chat has {shown['reactions']}")


@check("takes back what it has sent")
async def takes_back(world: World) -> None:
    world.can("redactions")
    shown = await _about(world, "redaction", "")
    need(shown["redacted"], "it is still there")


async def _about(world: World, kind: str, text: str) -> Json:
    """Send something, and then something about it; return what the platform shows of the first."""
    chat = await world.chat()
    first = world.router.deliver(chat, "helo")
    await world.reported(first)
    target = world.router.sent[first][0]
    await world.reported(world.router.deliver(chat, text, kind=kind, target=target))
    return await world.driver("shown", chat=chat, id=target)


@check("splits what is longer than it has said, and reports each part")
async def parts(world: World) -> None:
    world.can("textBytes")
    chat, text, limit = await world.chat(), *_long(world)
    key = world.router.deliver(chat, text)
    await world.reported(key)
    texts = await world.texts(chat)
    need(len(texts) > 1 and all(len(each.encode()) <= limit for each in texts), "parts are longer than that")
    need("".join("".join(texts).split()) == "".join(text.split()), "it is not the same text")
    need(
        world.router.parts[key] == len(texts) - 1, f"{world.router.parts[key]} of {len(texts)} were reported"
    )


@check("does not send again the parts that were reported")
async def parts_sent(world: World) -> None:
    world.can("textBytes")
    chat, text, _ = await world.chat(), *_long(world)
    await world.reported(world.router.deliver(chat, text))
    all_of_it = await world.texts(chat)
    chat = await world.chat()
    await world.reported(world.router.deliver(chat, text, parts=1))
    need(await world.texts(chat) == all_of_it[1:], "it did not go on behind the first part")


def _long(world: World) -> tuple[str, int]:
    assert world.router.announced is not None
    limit = int(world.router.announced["capabilities"]["textBytes"])
    lines = (f"This is line {n} of a long text, {'ä' * (n % 40)}\n" for n in range(limit * 5 // 2 // 50))
    return "".join(lines), limit


@check("reports a failure that may pass as retryable")
async def retryable(world: World) -> None:
    chat = await world.chat()
    await world.driver("fail", how="retryable")
    try:
        key = world.router.deliver(chat, "later")
        await world.until(lambda: world.router.failed[key], "ReportFailed")
    finally:
        await world.driver("fail", how="not")
    need(world.router.failed[key][0], "said that it is for good")
    world.router.push_again(key)
    await world.reported(key)
    need(await world.texts(chat) == ["later"], "it is not there")


@check("reports a failure for good as such, and goes on")
async def permanent(world: World) -> None:
    chat = await world.chat()
    await world.driver("fail", how="permanent")
    try:
        key = world.router.deliver(chat, "never")
        await world.until(lambda: world.router.failed[key], "ReportFailed")
    finally:
        await world.driver("fail", how="not")
    need(not world.router.failed[key][0], "said that it is retryable")
    await world.reported(world.router.deliver(chat, "goes on"))


# --- all together -----------------------------------------------------------------------------------


@check("ignores what it does not know")
async def unknown(world: World) -> None:
    chat = await world.chat()
    world.router.push({"news": {"of": "a later router"}})
    await world.reported(world.router.deliver(chat, "known"))


@check("loses and repeats nothing, killed whenever")
async def killed_whenever(world: World) -> None:
    chat, when = await world.chat(), random.Random(SEED)
    said, keys = [], []
    for number in range(KILLS):
        said += [(await world.driver("say", chat=chat, text=f"s{number}.{n}"))["event"] for n in range(4)]
        keys += [world.router.deliver(chat, f"d{number}.{n}") for n in range(4)]
        await asyncio.sleep(when.uniform(0, 0.3))
        await world.kill_adapter()
        await world.run_adapter()
    await world.until(lambda: world.delivered(chat, said[-1]), "Deliver of the last")
    for key in keys:
        await world.reported(key)
    told = [*dict.fromkeys(call.parameters["event"] for call in world.router.of("Deliver", chat=chat))]
    need(told == said, f"{said} came as {told}")
    texts = await world.texts(chat)
    wanted = [f"d{number}.{n}" for number in range(KILLS) for n in range(4)]
    need(sorted(texts) == sorted(wanted), f"the chat has {texts}")


@check("breaks the contract nowhere")
async def contract(world: World) -> None:
    need(not world.router.violations, "; ".join([*dict.fromkeys(world.router.violations)][:5]))
