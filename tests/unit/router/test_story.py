"""What the journal tells of a message: all of it, in order, and found by its id alone."""

from __future__ import annotations

import re

import pytest

from nanoclawd import journal, outbox
from nanoclawd.db import Transaction
from nanoclawd.errors import NotFound
from tests.support.router import Container, Place
from tests.support.varlink_peer import eventually

LINE = re.compile(r"<\d>((?:message|delivery)-[a-z-]+): (.*)")


def story(stderr: str, message: str) -> list[str]:
    """Return the events of all lines that have the id of a message in their field of that name."""
    events = []
    for event, text in LINE.findall(stderr):
        found = re.search(r"\bmessage=(\S+)", text)
        if found and message in found[1].split(","):
            events.append(event)
    return events


def test_each_step_is_told_in_order(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    async def fails_once(container: Container) -> None:
        await container.begin()
        await container.fail(await container.take(), retryable=True)
        while True:
            await container.finish(await container.take(), "done")

    async def run() -> None:
        place.systemd.program = fails_once
        async with place.router() as router:
            adapter = await router.attach()
            message = (await router.deliver("hello"))["message"]
            await adapter.failed(await adapter.delivery(), retryable=True)
            await adapter.sent(await adapter.delivery())

            assert story(capfd.readouterr().err, message) == [
                "message-queued",
                "message-leased",
                "message-failed",
                "message-leased",
                "message-answered",
                "delivery-leased",
                "delivery-failed",
                "delivery-leased",
                "delivery-sent",
            ]

    place.run(run)


def test_messages_that_share_a_turn_share_what_is_told_of_its_reply(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    async def run() -> None:
        place.registry.held.add("berta")
        async with place.router() as router:
            ids = [(await router.deliver(text))["message"] for text in ("one", "two")]
            place.registry.held.clear()
            await router.start_waiting()
            adapter = await router.attach()
            for _ in range(2):
                await adapter.reply()

            told = capfd.readouterr().err
            for id in ids:
                assert story(told, id)[:3] == ["message-queued", "message-leased", "message-answered"]
                assert story(told, id)[-1] == "delivery-sent"

    place.run(run)


@pytest.mark.parametrize("how", ["stopped", "dead"])
def test_every_end_is_told(place: Place, capfd: pytest.CaptureFixture[str], how: str) -> None:
    async def breaks(container: Container) -> None:
        await container.begin()
        await container.fail(await container.take(), retryable=False)

    async def run() -> None:
        place.systemd.program = breaks
        async with place.router() as router:
            if how == "stopped":
                place.registry.held.add("berta")
            message = (await router.deliver("hello"))["message"]
            if how == "stopped":
                assert await router.stop_turn()
            told = ""

            def is_told() -> bool:
                nonlocal told
                told += capfd.readouterr().err
                return story(told, message)[-1:] == [f"message-{how}"]

            await eventually(is_told)  # readers see a commit a moment before its lines are written

    place.run(run)


def test_what_is_rolled_back_was_never_told(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    async def run() -> None:
        async with place.router() as router:

            def operation(tx: Transaction) -> None:
                tx.tell(journal.info, "message-queued", message="m1")
                outbox.find(tx, "test", "nothing")

            with pytest.raises(NotFound):
                await router.db.write(operation)
            await router.db.write(lambda tx: tx.tell(journal.info, "message-queued", message="m2"))

            told = capfd.readouterr().err
            assert (story(told, "m1"), story(told, "m2")) == ([], ["message-queued"])

    place.run(run)


def test_a_field_with_several_values_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    monkeypatch.setattr(journal, "_to_journal", True)
    monkeypatch.setattr(journal.sd_journal, "sendv", lambda *fields: sent.extend(fields))

    journal.info("delivery-sent", "a\nb", message=["m1", "m2"], key="k", turn=None, unit="u.service")

    for field in (
        *(
            "MESSAGE=delivery-sent: a\\nb message=m1,m2 key=k",
            "NANOCLAWD_MESSAGE=m1",
            "NANOCLAWD_MESSAGE=m2",
        ),
        *("NANOCLAWD_EVENT=delivery-sent", "NANOCLAWD_KEY=k", "USER_UNIT=u.service", "PRIORITY=6"),
        *(f"CODE_FILE={__file__}", "CODE_FUNC=test_a_field_with_several_values_is_repeated"),
    ):
        assert field in sent
    assert not any(field.startswith(("NANOCLAWD_TURN", "NANOCLAWD_UNIT")) for field in sent)
