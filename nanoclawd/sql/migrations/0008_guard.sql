-- Actions of agents that are held until people have allowed them: approvals of the kind "action". Where approvals are
-- shown and answered in chats.

-- The call of the agent that asks: the same again is the same action.
ALTER TABLE approval ADD COLUMN call TEXT;
-- How many people have to allow it.
ALTER TABLE approval ADD COLUMN needed INTEGER NOT NULL DEFAULT 1 CHECK (needed > 0);
-- What came of what was allowed, in words.
ALTER TABLE approval ADD COLUMN outcome TEXT NOT NULL DEFAULT '';
CREATE UNIQUE INDEX approval_call ON approval (agent, session, call) WHERE call IS NOT NULL;

-- Who has allowed it so far. Each person counts once, whatever accounts they have.
CREATE TABLE vote (
    approval TEXT    NOT NULL REFERENCES approval (id) ON DELETE CASCADE,
    person   INTEGER NOT NULL REFERENCES person (id),
    -- "here": on this host, where nobody asks for roles.
    place    TEXT    NOT NULL CHECK (place IN ('here', 'chat')),
    said_at  INTEGER NOT NULL,
    PRIMARY KEY (approval, person)
) STRICT;

-- Whether it has been shown in chats, or nobody was to be told.
ALTER TABLE approval ADD COLUMN shown INTEGER NOT NULL DEFAULT 0 CHECK (shown IN (0, 1));
UPDATE approval SET shown = 1;

-- Where an approval is shown.
CREATE TABLE card (
    -- The delivery that shows it.
    key      TEXT    NOT NULL PRIMARY KEY,
    approval TEXT    NOT NULL REFERENCES approval (id) ON DELETE CASCADE,
    channel  TEXT    NOT NULL,
    chat     TEXT    NOT NULL,
    thread   TEXT    NOT NULL,
    -- Of what is shown: that is what an answer to it is about.
    sha256   TEXT    NOT NULL,
    -- All of it is shown, so that it can be allowed there.
    whole    INTEGER NOT NULL CHECK (whole IN (0, 1)),
    -- The state that the chat was told last.
    told     TEXT    NOT NULL
) STRICT;
CREATE INDEX card_approval ON card (approval);

-- What an agent is to do, in place of answering: "compact", or ''.
ALTER TABLE inbox ADD COLUMN command TEXT NOT NULL DEFAULT '';

-- When the newest message of a session came, by which those that nobody uses are closed.
-- The check tells a row of another table from one of this, should only pages be left of both.
ALTER TABLE session ADD COLUMN used_at INTEGER NOT NULL DEFAULT 0 CHECK (used_at >= 0 AND agent GLOB '[a-z?]*');
UPDATE session SET used_at =
       max(created_at, coalesce((SELECT max(received_at) FROM inbox WHERE session = session.id), 0));

-- In a chat of two: the account of the other one, by its last message.
ALTER TABLE chat ADD COLUMN peer TEXT;
