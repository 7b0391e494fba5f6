"""Every limit of the gateway, with its unit in its name."""

from __future__ import annotations

# --- what an agent can grow -----------------------------------------------------------------------
ATTACHED = 512  #: sessions with a listener
CONNECTIONS = 16  #: open connections of one session; further ones wait in the kernel's backlog
REQUESTS_PER_S = 50.0  #: of one session, in the long run
REQUESTS_BURST = 500
TOO_FAST_S = 0.5  #: each refusal of such a request waits so long, so that asking again gains nothing
HEADER_BYTES = 32 << 10  #: request line and headers
CHUNK_BYTES = 64 << 10  #: one read; also how much is buffered for a side that does not read
HELD_PER_AGENT = 8  #: requests that wait for a person's answer; less than CONNECTIONS, for all the others
HELD = 64  #: of all agents
HOLDS_AT_ONCE = 4  #: that the router is told of in one message; see asking.REQUEST_CHARACTERS
LINGER_BYTES = 64 << 20  #: read and thrown away after a refusal, so that the agent sees why

# --- how long we wait for an agent ----------------------------------------------------------------
KEEP_ALIVE_S = 300.0  #: between two requests
HEADERS_S = 10.0  #: from the first byte to the end of the headers
BODY_SILENCE_S = 20.0  #: between two pieces of a body
BODY_S = 300.0  #: a whole body, the endpoint's own slowness included
AGENT_STALL_S = 300.0  #: an agent that takes nothing of its answer
LINGER_S = 2.0
TUNNEL_IDLE_S = 300.0  #: without a byte in either direction
LOG_TOO_FAST_S = 10.0  #: one line about it in so long

# --- how long we wait for a server -------------------------------------------------------------
CONNECT_S = 15.0  #: a name; then a connection with its TLS handshake
ADDRESSES = 3  #: of one name that are tried; each has its share of that time
ENDPOINT_STALL_S = 60.0  #: a server that takes nothing of the request
ANSWER_S = 600.0  #: until the headers of the answer: an answer that is not streamed is computed first
SILENCE_S = 300.0  #: between two pieces of the answer; streams have a ping more often
ENDPOINT_HEADER_BYTES = 64 << 10
HEAR_OUT_S = 120.0  #: for what a call costs that its agent does not wait for
INFORMATIONAL = 8  #: 1xx answers before the real one
POOL_IDLE_S = 60.0  #: an unused connection is kept so long
POOL_SIZE = 16  #: unused connections of one endpoint

# --- what the router is told for its audit trail ---------------------------------------------------
RECORDS = 4096  #: that wait for it; of further ones it gets the number
RECORDS_AT_ONCE = 256
RECORDS_PER_S = 1 / 6  #: of one agent in the long run; the rest is summed up
RECORDS_BURST = 1000
MODELS = 32  #: of one session and day, that have a sum each
SUM_S = 60.0  #: what is alike for so long is one record
HAND_OVER_S = 3.0  #: at SIGTERM; with DRAIN_S below TimeoutStopSec=

# --- the program ----------------------------------------------------------------------------------
DRAIN_S = 10.0  #: what runs at SIGTERM may go on so long; below TimeoutStopSec=
THREADS = 8  #: for decryption, and for the names of endpoints; with the next below TasksMax=
LOOKUP_THREADS = 12  #: for names that agents ask for, which may take long
LOOKUPS = 2  #: at once, of one agent
