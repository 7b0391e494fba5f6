-- Actions of agents that are held until people have allowed them: approvals of the kind "action".

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
    -- Whether it was said on this host, where nobody asks for roles.
    here     INTEGER NOT NULL CHECK (here IN (0, 1)),
    said_at  INTEGER NOT NULL,
    PRIMARY KEY (approval, person)
) STRICT;
