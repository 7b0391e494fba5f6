"""How it is, as the router is told."""

from __future__ import annotations

from nanoclaw_matrix.health import FAILURES, Health, State


def test_it_is_degraded_while_message_after_message_cannot_be_decrypted() -> None:
    health = Health()
    health.set(State.CONNECTED)
    for _ in range(FAILURES - 1):
        health.decrypted(False)
    assert health.show() == (State.CONNECTED, "")

    health.decrypted(False)
    assert health.show() == (State.DEGRADED, f"{FAILURES} messages in a row could not be decrypted")

    health.decrypted(True)
    assert health.show() == (State.CONNECTED, "")


def test_what_a_person_waits_for_is_shown_with_it() -> None:
    health = Health()
    health.set(State.CONNECTED)
    health.skipped()
    health.tell("look here")

    assert health.show() == (State.CONNECTED, "1 malformed events were skipped; look here")
    assert health.changed.is_set()
