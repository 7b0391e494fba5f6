-- What agents have used of models: told by the gateway as sums, which replace what it told before.

CREATE TABLE usage (
    -- The gateway (its start) that has counted it; '' with the day, if days are summed up.
    life        TEXT    NOT NULL,
    -- Of this host's calendar, as in 2026-11-22; '': of days that retention has summed up.
    day         TEXT    NOT NULL CHECK (day = '' OR day GLOB '[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]'),
    agent       TEXT    NOT NULL,
    session     TEXT    NOT NULL,
    model       TEXT    NOT NULL,
    calls       INTEGER NOT NULL CHECK (calls >= 0),
    estimated   INTEGER NOT NULL CHECK (estimated >= 0),
    unpriced    INTEGER NOT NULL CHECK (unpriced >= 0),
    -- Tokens.
    input       INTEGER NOT NULL CHECK (input >= 0),
    output      INTEGER NOT NULL CHECK (output >= 0),
    cache_write INTEGER NOT NULL CHECK (cache_write >= 0),
    cache_read  INTEGER NOT NULL CHECK (cache_read >= 0),
    -- Millionths of a dollar.
    money       INTEGER NOT NULL CHECK (money >= 0),
    UNIQUE (agent, day, session, model, life)
) STRICT;
