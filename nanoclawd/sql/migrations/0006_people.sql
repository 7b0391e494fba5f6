-- Who may talk to which agent where: people and how channels know them, chats, agents in chats, what waits for an
-- answer about a sender or a chat. Nothing here is about the terminal, where whoever sits there is the owner.

-- The first person is the owner.
CREATE TABLE person (
    id         INTEGER PRIMARY KEY,
    -- As the owner calls them, see people.py.
    name       TEXT    NOT NULL UNIQUE CHECK (name GLOB '[a-z]*'),
    created_at INTEGER NOT NULL
) STRICT;
INSERT INTO person VALUES (1, 'owner', 0);

-- What a platform vouches for: an account. Names that it shows are nobody's.
CREATE TABLE identity (
    channel TEXT    NOT NULL,
    user    TEXT    NOT NULL,
    person  INTEGER NOT NULL REFERENCES person (id),
    -- "paired": they proved it by a code; "linked": the owner said so; "allowed": with the answer to a question.
    how     TEXT    NOT NULL CHECK (how IN ('paired', 'linked', 'allowed')),
    PRIMARY KEY (channel, user)
) STRICT;

CREATE TABLE chat (
    id         INTEGER PRIMARY KEY,
    channel    TEXT    NOT NULL,
    -- The platform's id of it.
    chat       TEXT    NOT NULL,
    kind       TEXT    NOT NULL CHECK (kind IN ('direct', 'group')),
    -- As the platform shows it: whoever is in there may have chosen it.
    title      TEXT    NOT NULL,
    -- "new": nobody has said yet what is to become of it; "open": agents listen; "blocked": nothing is taken from it.
    state      TEXT    NOT NULL CHECK (state IN ('new', 'open', 'blocked')),
    created_at INTEGER NOT NULL,
    -- Messages of senders who may not talk to any agent here: of these there is nothing but the number.
    dropped    INTEGER NOT NULL DEFAULT 0,
    -- Messages of programs that an agent was given since a person's last one.
    hops       INTEGER NOT NULL DEFAULT 0,
    -- Until when (ms) the messages of programs, and of strangers, are paid for: see rates.py.
    programs_paid_until  INTEGER NOT NULL DEFAULT 0,
    strangers_paid_until INTEGER NOT NULL DEFAULT 0,
    UNIQUE (channel, chat)
) STRICT;

-- An agent that listens in a chat.
CREATE TABLE wiring (
    id             INTEGER PRIMARY KEY,
    chat           INTEGER NOT NULL REFERENCES chat (id),
    agent          TEXT    NOT NULL,
    engagement     TEXT    NOT NULL CHECK (engagement IN ('every', 'mention', 'pattern', 'sticky')),
    pattern        TEXT    NOT NULL,
    sticky_seconds INTEGER NOT NULL CHECK (sticky_seconds >= 0),
    priority       INTEGER NOT NULL,
    exclusive      INTEGER NOT NULL CHECK (exclusive IN (0, 1)),
    session_mode   TEXT    NOT NULL CHECK (session_mode IN ('chat', 'thread', 'agent')),
    access         TEXT    NOT NULL CHECK (access IN ('strict', 'ask', 'public')),
    keep_context   INTEGER NOT NULL CHECK (keep_context >= 0),
    -- Until when (ms) each message is for the agent, since it was mentioned.
    sticky_until   INTEGER NOT NULL DEFAULT 0,
    UNIQUE (chat, agent),
    CHECK ((engagement = 'pattern') = (pattern != ''))
) STRICT;

-- What a person is in a chat, to an agent, or ('' and NULL) everywhere.
CREATE TABLE member (
    person     INTEGER NOT NULL REFERENCES person (id),
    agent      TEXT    NOT NULL,
    chat       INTEGER REFERENCES chat (id),
    role       TEXT    NOT NULL CHECK (role IN ('owner', 'admin', 'member', 'denied')),
    created_at INTEGER NOT NULL,
    CHECK (CASE role WHEN 'owner' THEN agent = '' AND chat IS NULL
                     WHEN 'admin' THEN chat IS NULL
                     WHEN 'member' THEN (agent = '') = (chat IS NOT NULL)
                     ELSE agent = '' AND chat IS NOT NULL END)
) STRICT;
CREATE UNIQUE INDEX member_once ON member (person, agent, coalesce(chat, 0));
CREATE INDEX member_chat ON member (chat);
INSERT INTO member VALUES (1, '', NULL, 'owner', 0);

-- Messages that wait for an answer about their sender or their chat. No agent sees them before that.
CREATE TABLE held (
    seq         INTEGER PRIMARY KEY AUTOINCREMENT,
    chat        INTEGER NOT NULL REFERENCES chat (id),
    thread      TEXT    NOT NULL,
    event       TEXT    NOT NULL,
    revision    INTEGER NOT NULL,
    sender      TEXT    NOT NULL,
    -- What the sender is called on the platform, which proves nothing: for whoever answers.
    sender_name TEXT    NOT NULL,
    body        TEXT    NOT NULL,
    -- The agent that is meant, or ''.
    agent       TEXT    NOT NULL,
    mentioned   INTEGER NOT NULL CHECK (mentioned IN (0, 1)),
    program     INTEGER NOT NULL CHECK (program IN (0, 1)),
    received_at INTEGER NOT NULL,
    UNIQUE (chat, thread, event, revision)
) STRICT;

-- What was said in an agent's chat by who may talk to it, but not to it: it is told when somebody does.
CREATE TABLE context (
    seq      INTEGER PRIMARY KEY AUTOINCREMENT,
    wiring   INTEGER NOT NULL REFERENCES wiring (id),
    thread   TEXT    NOT NULL,
    event    TEXT    NOT NULL,
    revision INTEGER NOT NULL,
    sender   TEXT    NOT NULL,
    body     TEXT    NOT NULL,
    said_at  INTEGER NOT NULL,
    -- The agent has heard of it. It stays a while, should the channel hand it over again.
    told     INTEGER NOT NULL DEFAULT 0 CHECK (told IN (0, 1)),
    UNIQUE (wiring, thread, event, revision)
) STRICT;

-- A conversation that a person has closed, until the next message.
ALTER TABLE session ADD COLUMN closed_at INTEGER;

-- Several agents may get one event: it is stored once for each. So the table is made anew, with context beside.
CREATE TABLE inbox_new (
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
    -- As 0002_nothing_lost.sql has them.
    deferrals        INTEGER NOT NULL DEFAULT 0,
    first_turn       TEXT,
    revived          INTEGER NOT NULL DEFAULT 0,
    dropped          INTEGER NOT NULL DEFAULT 0 CHECK (dropped IN (0, 1)),
    stopping         INTEGER NOT NULL DEFAULT 0 CHECK (stopping IN (0, 1)),
    -- What was said in the chat before it, as JSON (type Said of io.nanoclaw.Agent), or ''.
    context          TEXT    NOT NULL DEFAULT '',
    -- The idempotency key of what a channel delivers, for each session.
    UNIQUE (channel, chat, thread, event, revision, session),
    CHECK ((state = 'leased') = (lease_expires_at IS NOT NULL)),
    CHECK ((state IN ('answered', 'stopped', 'dead')) = (ended_at IS NOT NULL)),
    CHECK (state != 'leased' OR turn IS NOT NULL)
) STRICT;
INSERT INTO inbox_new SELECT *, '' FROM inbox;
-- AUTOINCREMENT goes on behind numbers of rows that are gone.
UPDATE sqlite_sequence SET seq = (SELECT seq FROM sqlite_sequence WHERE name = 'inbox')
 WHERE name = 'inbox_new' AND EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = 'inbox');
DROP TABLE inbox;
ALTER TABLE inbox_new RENAME TO inbox;
CREATE INDEX inbox_open ON inbox (session, seq) WHERE state IN ('queued', 'leased');
CREATE INDEX inbox_state ON inbox (state);
CREATE INDEX inbox_turn ON inbox (turn);
CREATE INDEX inbox_first_turn ON inbox (first_turn);
CREATE INDEX inbox_ended ON inbox (ended_at) WHERE ended_at IS NOT NULL;
