-- All times are milliseconds since 1970, UTC.

-- What the router must remember of an agent beside its file.
CREATE TABLE agent (
    name       TEXT    NOT NULL PRIMARY KEY,
    -- Its processes run as uid 2000 + uid_index of the container. Never given to another agent while a row has it.
    uid_index  INTEGER NOT NULL UNIQUE CHECK (uid_index >= 0),
    -- Stopped by the person: nothing starts it until the person says so.
    held       INTEGER NOT NULL DEFAULT 0 CHECK (held IN (0, 1)),
    created_at INTEGER NOT NULL
) STRICT;

-- Agent x chat x thread. The name is the instance of the agent's unit.
CREATE TABLE session (
    id         INTEGER PRIMARY KEY,
    agent      TEXT    NOT NULL,
    name       TEXT    NOT NULL,
    channel    TEXT    NOT NULL,
    chat       TEXT    NOT NULL,
    thread     TEXT    NOT NULL,
    created_at INTEGER NOT NULL,
    UNIQUE (agent, name),
    UNIQUE (agent, channel, chat, thread)
) STRICT;

-- Messages of people. A row is never deleted while it is queued or leased.
CREATE TABLE inbox (
    seq              INTEGER PRIMARY KEY AUTOINCREMENT,
    id               TEXT    NOT NULL UNIQUE,
    session          INTEGER NOT NULL REFERENCES session (id),
    channel          TEXT    NOT NULL,
    chat             TEXT    NOT NULL,
    thread           TEXT    NOT NULL,
    event            TEXT    NOT NULL,
    revision         INTEGER NOT NULL,
    sender           TEXT    NOT NULL,
    body             TEXT    NOT NULL,
    received_at      INTEGER NOT NULL,
    state            TEXT    NOT NULL DEFAULT 'queued'
                             CHECK (state IN ('queued', 'leased', 'answered', 'stopped', 'dead')),
    -- Claims so far, and starts of the container that failed.
    attempts         INTEGER NOT NULL DEFAULT 0,
    not_before       INTEGER NOT NULL DEFAULT 0,
    -- The turn that has leased it, or that was the last to do so.
    turn             TEXT,
    lease_expires_at INTEGER,
    ended_at         INTEGER,
    -- Why the last attempt failed, or why it is dead.
    reason           TEXT,
    -- The idempotency key of what a channel delivers.
    UNIQUE (channel, chat, thread, event, revision),
    CHECK ((state = 'leased') = (lease_expires_at IS NOT NULL)),
    CHECK ((state IN ('answered', 'stopped', 'dead')) = (ended_at IS NOT NULL)),
    CHECK (state != 'leased' OR turn IS NOT NULL)
) STRICT;

CREATE INDEX inbox_open ON inbox (session, seq) WHERE state IN ('queued', 'leased');
CREATE INDEX inbox_state ON inbox (state);

-- What goes to chats. Written in the transaction that caused it.
CREATE TABLE outbox (
    seq         INTEGER PRIMARY KEY AUTOINCREMENT,
    -- The idempotency key: the same cause gives the same key.
    key         TEXT    NOT NULL UNIQUE,
    -- The message that caused it; NULL for what an agent sends on its own account.
    message     TEXT    REFERENCES inbox (id),
    agent       TEXT    NOT NULL,
    channel     TEXT    NOT NULL,
    chat        TEXT    NOT NULL,
    thread      TEXT    NOT NULL,
    kind        TEXT    NOT NULL CHECK (kind IN ('reply', 'message', 'notice')),
    body        TEXT    NOT NULL,
    in_reply_to TEXT,
    created_at  INTEGER NOT NULL,
    state       TEXT    NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'leased', 'sent', 'dead')),
    attempts    INTEGER NOT NULL DEFAULT 0,
    not_before  INTEGER NOT NULL DEFAULT 0,
    -- The platform's id for it.
    receipt     TEXT,
    ended_at    INTEGER,
    reason      TEXT,
    CHECK ((state IN ('sent', 'dead')) = (ended_at IS NOT NULL))
) STRICT;

CREATE INDEX outbox_open ON outbox (channel, chat, seq) WHERE state IN ('pending', 'leased');
CREATE INDEX outbox_state ON outbox (state);
CREATE INDEX outbox_message ON outbox (message);
