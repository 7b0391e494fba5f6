"""Every limit of the host programs, with its unit in its name."""

from __future__ import annotations

# --- wire -----------------------------------------------------------------------------------------
MESSAGE_BYTES = 1 << 20  #: one Varlink message, without its final NUL
JSON_DEPTH = 32  #: nesting of one message; deeper ones only serve to exhaust the parser
JSON_BRACKETS = 16_384  #: of one message: 1 MiB of empty arrays would be 350,000 objects
JSON_ITEMS = 1024  #: of one array or map among a call's parameters
CONNECTIONS_PER_LISTENER = 64  #: further ones wait in the kernel's backlog
CONNECTIONS_PER_SESSION = 4  #: a runner needs two
CALLS_PER_S = 200.0  #: of one session in the long run; a runner makes some ten
CALLS_BURST = 500
CALL_BYTES = 32 << 10  #: so many bytes, in either direction, count as one more call
OFFENCES = 32  #: calls that break the contract, before a session's container is stopped
OFFENCES_FORGIVEN_PER_S = 1 / 60  #: a runner may be wrong now and then, e.g. about a turn that ended
LISTEN_BACKLOG = 128
TURN_AWAY_S = 5.0  #: for telling all who wait why the router does not start
SEND_S = 30.0  #: a reader that takes nothing for so long is cut off
STREAM_QUEUE = 256  #: replies waiting for one slow reader of a stream
SUN_PATH_MAX = 108  # man 7 unix; counts the final NUL

# --- messages -------------------------------------------------------------------------------------
TEXT_BYTES = 256 << 10  #: one message in either direction, as UTF-8
NAME_BYTES = 255  #: channel, chat, thread, event, sender, receipt
QUEUED_PER_SESSION = 1000  #: inbound messages waiting; more are refused
QUEUED_TOTAL = 50_000
PRUNED_AT_ONCE = 20  #: messages with their deliveries, in one transaction
RETENTION_DAYS = 30  #: of messages that have ended, unless nanoclaw.toml says otherwise
AUDIT_DAYS = 90  #: of the audit trail, unless nanoclaw.toml says otherwise
USAGE_DAYS = 400  #: that usage is kept by the day, unless nanoclaw.toml says otherwise
AUDIT_AT_ONCE = 500  #: rows of it that are read, or taken out in one transaction
AUDIT_CHARACTERS = 8192  #: of one row; of more it has the hash
REPLIES_PER_TURN = 16
SENDS_PER_TURN = 100
MESSAGES_LISTED = 10_000  #: in one answer to an operator
SESSIONS_SHOWN = 200  #: in the whole picture
EXCERPT_CHARACTERS = 200  #: of a text in a list
ACTIVITY_BYTES = 4096  #: one line of progress; longer ones are cut
INSTRUCTIONS_BYTES = 256 << 10
AGENTS = 1000

# --- files and what else agents do -----------------------------------------------------------------
FILE_BYTES = 32 << 20  #: one file
FILES_PER_MESSAGE = 10
FILES_PER_AGENT_BYTES = 512 << 20  #: of what came to an agent or was sent by it, as long as it is kept
FILES_HELD_BYTES = 64 << 20  #: of messages that wait until their sender is known
FILES_BYTES = 4 << 30  #: of all
FILE_NAME_BYTES = 120
FILE_CHUNK_BYTES = 512 << 10  #: of a file, in one message of a runner; some 700 KB as base64
FILE_COPY_S = 60.0  #: for reading a file that an adapter hands over
REACTION_BYTES = 64
ASK_OPTIONS = 10
ASK_OPTION_BYTES = 200
ASK_PERSON_MAX_S = 86_400
ASK_POLL_S = 10.0  #: that a runner's call waits for an answer; then it calls again
AGENT_HOPS = 4  #: agents that a message may come through after a person has said something
AGENT_MESSAGES_PER_S = 1 / 30  #: of one agent to others, in the long run
AGENT_MESSAGES_BURST = 6
DESTINATIONS = 50  #: of one agent

# --- approvals ------------------------------------------------------------------------------------
ASK_S = 120  #: that a request waits for a person's answer, unless nanoclaw.toml says otherwise
ASK_MAX_S = 3600
APPROVAL_OPEN_S = 86_400.0  #: so long it can be answered
APPROVAL_ONCE_S = 3600.0  #: what was allowed once waits so long for the agent to ask again
DENIAL_S = 3600.0  #: a denial is remembered so long, unless the person says otherwise
APPROVAL_MAX_S = 30 * 86_400  #: what a person may allow or deny for a while
APPROVALS_PER_AGENT = 20  #: that wait for an answer
APPROVALS = 200
APPROVALS_LISTED = 1000
HOLDS = 1000  #: that a gateway may tell of; ours has fewer at a time
ASK_NOTICES_PER_S = 1 / 60  #: lines in the chats of one agent, in the long run
ASK_NOTICES_BURST = 5

# --- commands -------------------------------------------------------------------------------------
COMMANDS_PER_S = 0.5  #: of one account in the long run; of all strangers in a chat together
COMMANDS_BURST = 10
CLICKS_TOLD_PER_S = 1 / 60  #: how often a chat is told of reactions by who may not answer
CLICKS_TOLD_BURST = 3

# --- queue ----------------------------------------------------------------------------------------
LEASE_S = 45.0  #: a lease without renewal
HEARTBEAT_S = 15.0  #: what we ask of a runner
ATTEMPTS = 4  #: claims of one message before it becomes a dead letter
BACKOFF_FIRST_S = 2.0
TURN_MESSAGES = 16  #: messages that share a turn; each may have a reply, see REPLIES_PER_TURN
SHARED_ATTEMPTS = 2  #: that messages make together
TURN_BYTES = 512 << 10  #: of their texts, as JSON; the first may be longer
ALREADY_SENT_CHARACTERS = 500  #: of each message that an earlier attempt sent, as a reminder
DEFERRALS = 30  #: attempts that failed for a reason outside before a message is given up: some 6 h
BACKOFF_MAX_S = 900.0
RETRY_AFTER_MAX_S = 6 * 3600.0  #: what a model or a platform may ask us to wait
DELAY_NOTICE_S = 60.0  #: the chat is told if a message must wait so long for its next attempt
REASON_CHARACTERS = 300  #: of why something failed, as the chat is told
DELIVERY_ATTEMPTS = 36  #: some 7 h
REPORT_S = 300.0  #: an adapter that has a delivery and reports nothing for so long is hung up on
RECENT_DELIVERIES = 20  #: what an agent is told of its own
WRITES_PER_COMMIT = 64  #: writes grouped into one transaction
CLOCK_JUMP_S = 2.0  #: the wall clock was set if it is that much off
DATABASE_BUSY_S = 5.0  #: another program may have the database locked for so long
DATABASE_POLL_S = 0.05

# --- systemd and Podman ---------------------------------------------------------------------------
BUS_CALL_S = 25.0
UNIT_START_S = 90.0  #: above the unit's own TimeoutStartSec=
UNIT_STOP_S = 30.0
RELOAD_S = 60.0
PROGRAM_S = 30.0  #: generator and systemd-analyze
PODMAN_S = 30.0  #: one question over the REST socket
BUILD_S = 3600.0
HELLO_S = 60.0  #: until a runner has asked for work; TimeoutStartSec= of an agent unit is as long
STORE_AGAIN_S = 5.0  #: until what must be stored is tried again, when the disk is full
STOP_TURN_S = 10.0  #: a runner that does not stop its turn by then is stopped itself
IDLE_EXIT_MAX_S = 86_400
SESSIONS = 32  #: agent containers at once, unless nanoclaw.toml says otherwise
CHANNELS = 32
FDSTORE = 544  # FileDescriptorStoreMax= of nanoclaw.service: two a session, one a channel

# --- people and chats -----------------------------------------------------------------------------
CHATS_NEW = 200  #: chats that wait for an answer; messages of more are not taken
HELD_PER_CHAT = 50  #: messages that wait for an answer
HELD_BYTES = 256 << 10  #: of the texts of these
HELD_PER_NEW_CHAT = 5  #: of these there may be many, made by strangers
HELD_TOTAL = 2000
QUESTIONS = 50  #: about senders and chats, that wait for an answer
HELD_DAYS = 7  #: then nobody wants an answer any more
CONTEXT_MESSAGES = 50  #: kept for an agent that they were not for
CONTEXT_BYTES = 16 << 10
REACTIONS_KEPT = 10  #: for an agent that is told of nothing else
PATTERN_CHARACTERS = 256
PATTERN_TEXT_CHARACTERS = 8192  #: of a message, that a pattern is looked for in
STICKY_MAX_S = 86_400
PROGRAM_HOPS = (
    4  #: messages of programs that agents of a chat are given before a person has to say something
)
PROGRAM_PER_S = 0.1  #: of one chat, in the long run
PROGRAM_BURST = 6
STRANGER_PER_S = 0.2  #: messages of all strangers in a public chat
STRANGER_BURST = 10
PAIRING_S = 600.0  #: a code is good for so long
PAIRING_GUESSES = 20  #: wrong ones from all together, before a code is worth nothing
PAIRINGS = 16  #: codes at once

# --- channels -------------------------------------------------------------------------------------
CHANNEL_CALLS_PER_S = 200.0  #: of all connections of one adapter, in the long run
CHANNEL_ACCOUNTS = 64  #: an adapter's own on its platform
HEALTH_CHARACTERS = 300
