-- What agents do beside sending text: edits, reactions, questions, files, messages to other chats and agents.

-- Kinds of deliveries cannot be added to a CHECK: the table is made anew.
CREATE TABLE outbox_new (
    seq         INTEGER PRIMARY KEY AUTOINCREMENT,
    -- The idempotency key: the same cause gives the same key.
    key         TEXT    NOT NULL UNIQUE,
    -- The message that caused it; NULL for what an agent sends on its own account.
    message     TEXT    REFERENCES inbox (id),
    agent       TEXT    NOT NULL,
    channel     TEXT    NOT NULL,
    chat        TEXT    NOT NULL,
    thread      TEXT    NOT NULL,
    kind        TEXT    NOT NULL
                        CHECK (kind IN ('reply', 'message', 'notice', 'edit', 'reaction', 'redaction')),
    body        TEXT    NOT NULL,
    in_reply_to TEXT,
    created_at  INTEGER NOT NULL,
    state       TEXT    NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'leased', 'sent', 'dead')),
    attempts    INTEGER NOT NULL DEFAULT 0,
    not_before  INTEGER NOT NULL DEFAULT 0,
    -- The platform's id for it, or for its last part.
    receipt     TEXT,
    ended_at    INTEGER,
    reason      TEXT,
    -- As 0002_nothing_lost.sql has them.
    turn        TEXT,
    parts_sent  INTEGER NOT NULL DEFAULT 0 CHECK (parts_sent >= 0),
    dropped     INTEGER NOT NULL DEFAULT 0 CHECK (dropped IN (0, 1)),
    -- What an edit, a reaction or a redaction is about: a delivery, by its key, or a message, by its event.
    target_key   TEXT,
    target_event TEXT,
    -- JSON: what may be answered; '' if nothing is asked.
    choices     TEXT    NOT NULL DEFAULT '',
    CHECK ((state IN ('sent', 'dead')) = (ended_at IS NOT NULL)),
    CHECK ((kind IN ('edit', 'reaction', 'redaction')) = (target_key IS NOT NULL OR target_event IS NOT NULL))
) STRICT;
INSERT INTO outbox_new
SELECT seq, key, message, agent, channel, chat, thread, kind, body, in_reply_to, created_at, state, attempts,
       not_before, receipt, ended_at, reason, turn, parts_sent, dropped, NULL, NULL, ''
  FROM outbox;
-- AUTOINCREMENT goes on behind numbers of rows that are gone.
UPDATE sqlite_sequence SET seq = (SELECT seq FROM sqlite_sequence WHERE name = 'outbox')
 WHERE name = 'outbox_new' AND EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = 'outbox');
DROP TABLE outbox;
ALTER TABLE outbox_new RENAME TO outbox;
CREATE INDEX outbox_state ON outbox (state);
CREATE INDEX outbox_message ON outbox (message);
CREATE INDEX outbox_ended ON outbox (ended_at) WHERE ended_at IS NOT NULL;
-- What was sent in mid-turn.
CREATE INDEX outbox_turn ON outbox (turn) WHERE kind NOT IN ('reply', 'notice');
CREATE INDEX outbox_order ON outbox (channel, chat, thread, seq) WHERE state IN ('pending', 'leased');
CREATE INDEX outbox_place ON outbox (agent, channel, chat, thread, seq);

-- The platform's ids of what was sent: of each part of a long text.
CREATE TABLE receipt (
    key     TEXT    NOT NULL REFERENCES outbox (key) ON DELETE CASCADE,
    -- Counted from 1.
    part    INTEGER NOT NULL CHECK (part > 0),
    channel TEXT    NOT NULL,
    receipt TEXT    NOT NULL CHECK (receipt != ''),
    PRIMARY KEY (key, part)
) STRICT;
CREATE INDEX receipt_found ON receipt (channel, receipt);

-- Files that came with messages, or go with deliveries. What is in them is in the directory files/, by id. A row is
-- there after its file, and goes before it: see filestore.py.
CREATE TABLE file (
    id         TEXT    NOT NULL PRIMARY KEY CHECK (id GLOB 'f????????????????'),
    -- Who sent it, or who was the first to get it; '' if that is not known yet.
    agent      TEXT    NOT NULL,
    -- Of what it goes with, from 0.
    number     INTEGER NOT NULL CHECK (number BETWEEN 0 AND 99),
    name       TEXT    NOT NULL,
    media_type TEXT    NOT NULL,
    bytes      INTEGER NOT NULL CHECK (bytes >= 0),
    sha256     TEXT    NOT NULL CHECK (length(sha256) = 64),
    -- It stays until then (ms), and as long as what it goes with.
    kept_until INTEGER NOT NULL,
    -- The delivery that it goes with, by its key.
    key        TEXT,
    -- The event that it came with.
    channel    TEXT,
    chat       TEXT,
    thread     TEXT,
    event      TEXT,
    revision   INTEGER,
    CHECK ((key IS NULL) = (event IS NOT NULL))
) STRICT;
CREATE UNIQUE INDEX file_of_delivery ON file (key, number) WHERE key IS NOT NULL;
CREATE UNIQUE INDEX file_of_event ON file (channel, chat, thread, event, revision, number) WHERE key IS NULL;

-- What an agent asked somebody in a chat.
CREATE TABLE ask (
    -- The delivery that asks.
    key         TEXT    NOT NULL PRIMARY KEY,
    -- The first message of the turn that waits for the answer.
    message     TEXT    NOT NULL REFERENCES inbox (id) ON DELETE CASCADE,
    expires_at  INTEGER NOT NULL,
    answer      TEXT,
    -- The account that answered, and the event.
    answered_by TEXT,
    event       TEXT,
    CHECK ((answer IS NULL) = (answered_by IS NULL) AND (answer IS NULL) = (event IS NULL))
) STRICT;
CREATE INDEX ask_message ON ask (message);
CREATE INDEX ask_open ON ask (expires_at) WHERE answer IS NULL;
CREATE INDEX ask_event ON ask (event) WHERE event IS NOT NULL;

-- Where an agent may say something besides the chat that it works for.
CREATE TABLE destination (
    agent   TEXT NOT NULL,
    -- As the agent knows it.
    name    TEXT NOT NULL CHECK (name GLOB '[a-z]*'),
    channel TEXT NOT NULL,
    chat    TEXT NOT NULL,
    PRIMARY KEY (agent, name)
) STRICT;

-- How many agents a message has come through since a person said something.
ALTER TABLE inbox ADD COLUMN hops INTEGER NOT NULL DEFAULT 0 CHECK (hops >= 0);
