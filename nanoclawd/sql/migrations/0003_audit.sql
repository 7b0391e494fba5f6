-- The audit trail: what agents asked for at the gateway and what became of it, and what a person had the router do.

-- hash is the SHA-256 of the row, which has the hash of the row before it: see audit.py. AUTOINCREMENT remembers the
-- number of the last row, also of one that is gone.
CREATE TABLE audit (
    seq    INTEGER PRIMARY KEY AUTOINCREMENT,
    at     INTEGER NOT NULL,
    -- "request": at the gateway; "control": of a person; "trail": about the trail itself.
    kind   TEXT    NOT NULL CHECK (kind IN ('request', 'control', 'trail')),
    event  TEXT    NOT NULL,
    -- '' if it is about none.
    agent  TEXT    NOT NULL,
    -- JSON.
    detail TEXT    NOT NULL,
    before TEXT    NOT NULL CHECK (length(before) = 64),
    hash   TEXT    NOT NULL CHECK (length(hash) = 64)
) STRICT;

CREATE INDEX audit_anchor ON audit (seq) WHERE event = 'pruned';

CREATE TRIGGER audit_stays BEFORE UPDATE ON audit
BEGIN SELECT RAISE(ABORT, 'audit: a row is never changed'); END;

-- What is old goes once a row "pruned" has taken its place in the chain.
CREATE TRIGGER audit_ends BEFORE DELETE ON audit
WHEN old.seq > coalesce((SELECT detail ->> '$.through' FROM audit
                          WHERE event = 'pruned' AND kind = 'trail' ORDER BY seq DESC LIMIT 1), 0)
BEGIN SELECT RAISE(ABORT, 'audit: a row is deleted by retention only'); END;

-- The gateway (its start) whose decisions were read last, and the number of the last one.
ALTER TABLE router ADD COLUMN gateway_life TEXT NOT NULL DEFAULT '';
ALTER TABLE router ADD COLUMN gateway_read INTEGER NOT NULL DEFAULT 0;
