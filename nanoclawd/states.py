"""The states of messages, deliveries and approvals, and every way from one to another. There are no others:
the database refuses them, since its triggers are made from these tables.
"""

from __future__ import annotations

from enum import StrEnum


class MessageState(StrEnum):
    QUEUED = "queued"  #: waits; not before not_before
    LEASED = "leased"  #: a turn has it until lease_expires_at
    ANSWERED = "answered"  #: its turn ended
    STOPPED = "stopped"  #: the person stopped it; the chat was told
    DEAD = "dead"  #: attempts used up, or cannot be answered; the chat was told


class DeliveryState(StrEnum):
    PENDING = "pending"  #: waits; not before not_before, nor before older ones of its chat
    LEASED = "leased"  #: an adapter has it
    SENT = "sent"  #: the platform has it
    DEAD = "dead"  #: attempts used up, or the platform does not take it


class ChatState(StrEnum):
    NEW = "new"  #: nobody has said yet what is to become of it: nothing of it gets to an agent
    OPEN = "open"  #: agents listen there
    BLOCKED = "blocked"  #: nothing is taken from it


class ApprovalState(StrEnum):
    PENDING = "pending"  #: waits for a person's answer until expires_at
    ALLOWED = "allowed"  #: once: until it is used; for a while: until expires_at; always: by a rule
    DENIED = "denied"  #: remembered until expires_at
    USED = "used"  #: what was allowed once was sent, or done
    EXPIRED = (
        "expired"  #: not answered, or what was allowed not used, in time; or it could not be done any more
    )


#: From, to: what does it. ARCHITECTURE.md has the same as a picture.
MESSAGE_TRANSITIONS = {
    (MessageState.QUEUED, MessageState.LEASED): "a turn claims it; counts as an attempt",
    (MessageState.QUEUED, MessageState.STOPPED): "the person says stop",
    (MessageState.QUEUED, MessageState.DEAD): "no container can be started for it, or its agent is removed",
    (MessageState.LEASED, MessageState.QUEUED): "its turn failed or broke off",
    (MessageState.LEASED, MessageState.ANSWERED): "its turn ends",
    (MessageState.LEASED, MessageState.STOPPED): "the person says stop",
    (MessageState.LEASED, MessageState.DEAD): "its turn failed for the last time, or can never succeed",
    (MessageState.DEAD, MessageState.QUEUED): "the operator puts the dead letter back",
}
DELIVERY_TRANSITIONS = {
    (DeliveryState.PENDING, DeliveryState.LEASED): "an adapter gets it",
    (DeliveryState.PENDING, DeliveryState.SENT): "an adapter reports it after all",
    (DeliveryState.PENDING, DeliveryState.DEAD): "an adapter reports after all that it cannot be sent",
    (
        DeliveryState.LEASED,
        DeliveryState.PENDING,
    ): "its adapter has left, or reports a failure that may pass",
    (DeliveryState.LEASED, DeliveryState.SENT): "its adapter reports the receipt",
    (DeliveryState.LEASED, DeliveryState.DEAD): "its adapter reports that it cannot be sent",
    (DeliveryState.DEAD, DeliveryState.PENDING): "the operator puts the dead letter back",
}
APPROVAL_TRANSITIONS = {
    (ApprovalState.PENDING, ApprovalState.ALLOWED): "a person allows it",
    (ApprovalState.PENDING, ApprovalState.DENIED): "a person denies it",
    (
        ApprovalState.PENDING,
        ApprovalState.EXPIRED,
    ): "nobody answers in time, a rule decides by now, or its agent is removed",
    (ApprovalState.ALLOWED, ApprovalState.USED): "the very same request is sent, or the action done, once",
    (
        ApprovalState.ALLOWED,
        ApprovalState.EXPIRED,
    ): "its time is over, its agent is removed, or it cannot be done any more",
}

#: Where a row may be deleted: in an end, and a dead letter only when the operator has dropped it.
_MAY_BE_DELETED = {
    "inbox": "old.state IN ('answered', 'stopped') OR (old.state = 'dead' AND old.dropped)",
    "outbox": "old.state = 'sent' OR (old.state = 'dead' AND old.dropped)",
    "approval": "old.state IN ('denied', 'used', 'expired') OR old.scope IS 'always'",
}


def triggers() -> str:
    """Return SQL that holds one connection to the tables above (TEMP: an older nanoclawd knows others)."""
    parts = []
    for table, first, transitions in (
        ("inbox", MessageState.QUEUED, MESSAGE_TRANSITIONS),
        ("outbox", DeliveryState.PENDING, DELIVERY_TRANSITIONS),
        ("approval", ApprovalState.PENDING, APPROVAL_TRANSITIONS),
    ):
        allowed = ", ".join(f"('{source}', '{target}')" for source, target in transitions)
        parts.append(f"""
            CREATE TEMP TRIGGER {table}_begins BEFORE INSERT ON main.{table} WHEN new.state != '{first}'
            BEGIN SELECT RAISE(ABORT, '{table}: a row begins as {first}'); END;
            CREATE TEMP TRIGGER {table}_changes BEFORE UPDATE OF state ON main.{table}
            WHEN old.state != new.state AND (old.state, new.state) NOT IN (VALUES {allowed})
            BEGIN SELECT RAISE(ABORT, '{table}: no such transition'); END;
            CREATE TEMP TRIGGER {table}_ends BEFORE DELETE ON main.{table}
            WHEN NOT ({_MAY_BE_DELETED[table]})
            BEGIN SELECT RAISE(ABORT, '{table}: the row is needed'); END;
        """)
    return "".join(parts)
