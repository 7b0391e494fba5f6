-- Messages that share a turn; failures that are not the message's; dead letters that an operator takes up again;
-- deliveries in parts.

-- Attempts that failed for a reason outside, e.g. a model that is overloaded. They do not make a message poison.
ALTER TABLE inbox ADD COLUMN deferrals INTEGER NOT NULL DEFAULT 0;
-- The turn of the first attempt, which several messages may share; so may the second, then each has its own.
ALTER TABLE inbox ADD COLUMN first_turn TEXT;
-- How often an operator put the dead letter back. Each such life has a notice of its own.
ALTER TABLE inbox ADD COLUMN revived INTEGER NOT NULL DEFAULT 0;
-- A dead letter that an operator has done with: kept for its idempotency key, listed no more.
ALTER TABLE inbox ADD COLUMN dropped INTEGER NOT NULL DEFAULT 0 CHECK (dropped IN (0, 1));
-- The person has said stop while a turn had it: it is not tried again, whatever becomes of that turn.
ALTER TABLE inbox ADD COLUMN stopping INTEGER NOT NULL DEFAULT 0 CHECK (stopping IN (0, 1));
UPDATE inbox SET first_turn = turn WHERE turn IS NOT NULL;

-- The turn that it is about as a whole; NULL if it is about `message` alone.
ALTER TABLE outbox ADD COLUMN turn TEXT;
-- Parts of a long text that the platform has taken already.
ALTER TABLE outbox ADD COLUMN parts_sent INTEGER NOT NULL DEFAULT 0 CHECK (parts_sent >= 0);
ALTER TABLE outbox ADD COLUMN dropped INTEGER NOT NULL DEFAULT 0 CHECK (dropped IN (0, 1));
UPDATE outbox SET turn = (SELECT turn FROM inbox WHERE inbox.id = outbox.message) WHERE message IS NOT NULL;

CREATE INDEX inbox_turn ON inbox (turn);
CREATE INDEX inbox_first_turn ON inbox (first_turn);
CREATE INDEX inbox_ended ON inbox (ended_at) WHERE ended_at IS NOT NULL;
CREATE INDEX outbox_ended ON outbox (ended_at) WHERE ended_at IS NOT NULL;
CREATE INDEX outbox_turn ON outbox (turn) WHERE kind = 'message';
CREATE INDEX outbox_order ON outbox (channel, chat, thread, seq) WHERE state IN ('pending', 'leased');
DROP INDEX outbox_open;
CREATE INDEX outbox_place ON outbox (agent, channel, chat, thread, seq);

-- What the router remembers of itself: one row.
CREATE TABLE router (
    one        INTEGER PRIMARY KEY CHECK (one = 1),
    -- All agents are stopped by the person: nothing starts one until the person says so.
    held       INTEGER NOT NULL DEFAULT 0 CHECK (held IN (0, 1)),
    -- The service manager (its start) in which the agents' slice was last seen active; '' if last seen inactive.
    slice_boot TEXT    NOT NULL DEFAULT ''
) STRICT;
INSERT INTO router (one) VALUES (1);
