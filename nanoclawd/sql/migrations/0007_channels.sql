-- What adapters have said of themselves, by Announce(): it counts also while they are away.

CREATE TABLE channel (
    name         TEXT    PRIMARY KEY,
    -- Its program, as it calls itself.
    adapter      TEXT    NOT NULL,
    -- The type Capabilities of io.nanoclaw.Channel, as JSON.
    capabilities TEXT    NOT NULL CHECK (json_type(capabilities) = 'object'),
    -- Its own accounts on the platform, as a JSON array.
    accounts     TEXT    NOT NULL CHECK (json_type(accounts) = 'array'),
    announced_at INTEGER NOT NULL
) STRICT;
