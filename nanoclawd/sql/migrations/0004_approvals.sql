-- What waits for a person's answer, and what was answered.
CREATE TABLE approval (
    id         TEXT    NOT NULL PRIMARY KEY,
    -- What is asked about: "request", one of an agent at the gateway.
    kind       TEXT    NOT NULL,
    -- Who asks, and where that can be seen.
    agent      TEXT    NOT NULL,
    session    TEXT    NOT NULL,
    channel    TEXT    NOT NULL,
    chat       TEXT    NOT NULL,
    thread     TEXT    NOT NULL,
    -- All of what is asked for, as JSON in its one spelling, and its SHA-256: that is what an answer is about.
    payload    TEXT    NOT NULL,
    sha256     TEXT    NOT NULL CHECK (length(sha256) = 64),
    state      TEXT    NOT NULL DEFAULT 'pending'
                       CHECK (state IN ('pending', 'allowed', 'denied', 'used', 'expired')),
    asked_at   INTEGER NOT NULL,
    -- Until when it can be answered; then, until when the answer counts.
    expires_at INTEGER NOT NULL,
    -- Whether the answer is for this once, for a while, or a rule in the agent's file.
    scope      TEXT    CHECK (scope IN ('once', 'for', 'always')),
    decided_at INTEGER,
    decided_by TEXT,
    CHECK ((scope IS NULL) = (decided_at IS NULL) AND (scope IS NULL) = (decided_by IS NULL)),
    CHECK (state != 'pending' OR scope IS NULL),
    CHECK (state NOT IN ('allowed', 'denied', 'used') OR scope IS NOT NULL),
    CHECK (state != 'used' OR scope = 'once')
) STRICT;

-- Whoever asks for the same waits for the same answer.
CREATE UNIQUE INDEX approval_pending ON approval (agent, sha256) WHERE state = 'pending';
CREATE INDEX approval_live ON approval (expires_at) WHERE state IN ('pending', 'allowed', 'denied');
