-- Every statement of the router, by name. Parameters are named; times are milliseconds since 1970, UTC.

-- find_event --
-- The first message that an earlier delivery of the same event made.
SELECT id FROM inbox
 WHERE channel = :channel AND chat = :chat AND thread = :thread AND event = :event AND revision = :revision
 ORDER BY seq LIMIT 1;

-- find_said --
-- The newest wording of what somebody said.
SELECT body FROM inbox WHERE channel = :channel AND chat = :chat AND thread = :thread AND event = :event
 ORDER BY revision DESC LIMIT 1;

-- find_delivered --
-- The same for an agent.
SELECT inbox.id, session FROM inbox JOIN session ON session.id = session
 WHERE inbox.channel = :channel AND inbox.chat = :chat AND inbox.thread = :thread AND event = :event
   AND revision = :revision AND agent = :agent;

-- find_session --
SELECT * FROM session WHERE agent = :agent AND channel = :channel AND chat = :chat AND thread = :thread;

-- add_session --
-- Sessions are named after their channel, and numbered.
INSERT INTO session (agent, name, channel, chat, thread, created_at, used_at)
SELECT :agent, :prefix || '_' || (1 + coalesce(max(id), 0)), :channel, :chat, :thread, :now, :now FROM session
RETURNING *;

-- list_sessions --
SELECT session.*, count(inbox.seq) FILTER (WHERE inbox.state = 'queued') AS queued,
       (SELECT id FROM inbox AS oldest WHERE oldest.session = session.id AND oldest.state = 'leased'
         ORDER BY seq LIMIT 1) AS message
  FROM session LEFT JOIN inbox ON inbox.session = session.id AND inbox.state IN ('queued', 'leased')
 WHERE :agent IS NULL OR agent = :agent
 GROUP BY session.id ORDER BY session.id;

-- count_queued --
SELECT count(*) FILTER (WHERE session = :session) AS in_session, count(*) AS total FROM inbox WHERE state = 'queued';

-- enqueue --
INSERT INTO inbox (id, session, channel, chat, thread, event, revision, sender, body, received_at, context, command,
                   hops)
VALUES (:id, :session, :channel, :chat, :thread, :event, :revision, :sender, :body, :now, :context, :command, :hops);

-- close_session --
UPDATE session SET closed_at = :now WHERE id = :id;

-- use_session --
-- A closed one is open again.
UPDATE session SET closed_at = NULL, used_at = :now WHERE id = :session;

-- unused_sessions --
-- Open ones whose last message came before some time, and of which nothing waits.
SELECT * FROM session WHERE closed_at IS NULL AND used_at < :before
   AND NOT EXISTS (SELECT 1 FROM inbox WHERE session = session.id AND state IN ('queued', 'leased')) LIMIT :limit;

-- close_unused --
UPDATE session SET closed_at = :now WHERE id = :id AND closed_at IS NULL AND used_at < :before
   AND NOT EXISTS (SELECT 1 FROM inbox WHERE session = session.id AND state IN ('queued', 'leased')) RETURNING id;

-- supersede --
-- What its sender has written anew before an agent had it.
UPDATE inbox SET state = 'stopped', ended_at = :now, reason = 'its sender has written it anew'
 WHERE channel = :channel AND chat = :chat AND thread = :thread AND event = :event AND revision < :revision
   AND session = :session AND state = 'queued'
RETURNING id;

-- find_work --
-- Sessions with something to do: their oldest open message, and when it may be tried.
SELECT session.*, seq, not_before, state, attempts, deferrals, lease_expires_at, reason
  FROM session JOIN inbox ON inbox.seq =
       (SELECT min(seq) FROM inbox WHERE session = session.id AND state IN ('queued', 'leased'))
 ORDER BY inbox.seq;

-- next_message --
-- The oldest open message of a session; no row means nothing to do.
SELECT * FROM inbox WHERE session = :session AND state IN ('queued', 'leased') ORDER BY seq LIMIT 1;

-- claim_message --
-- Lease the oldest open message of a session if it is due; the attempt counts from here, so that a message that
-- kills us still becomes a dead letter.
UPDATE inbox SET state = 'leased', turn = :turn, first_turn = coalesce(first_turn, :turn), attempts = attempts + 1,
       lease_expires_at = :expires
 WHERE seq = (SELECT min(seq) FROM inbox WHERE session = :session AND state IN ('queued', 'leased'))
   AND state = 'queued' AND not_before <= :now
RETURNING *;

-- behind_turn --
-- What waits behind the messages of the turn that runs. Nothing is due later than what is before it.
SELECT * FROM inbox WHERE session = :session AND state = 'queued' ORDER BY seq LIMIT :limit;

-- join_turn --
UPDATE inbox SET state = 'leased', turn = :turn, first_turn = coalesce(first_turn, :turn), attempts = attempts + 1,
       lease_expires_at = :expires
 WHERE seq = :seq;

-- leased_messages --
-- Of the turn that a session has; there is never more than one.
SELECT * FROM inbox WHERE session = :session AND state = 'leased' ORDER BY seq;

-- renew_lease --
UPDATE inbox SET lease_expires_at = :expires WHERE session = :session AND turn = :turn AND state = 'leased'
RETURNING id;

-- finish_turn --
-- Only the turn that has the lease can end its messages.
UPDATE inbox SET state = :state, lease_expires_at = NULL, ended_at = :now, reason = NULL
 WHERE session = :session AND turn = :turn AND state = 'leased' RETURNING id;

-- finish_message --
UPDATE inbox SET state = :state, lease_expires_at = NULL, ended_at = :now, reason = :reason
 WHERE id = :id AND state IN ('queued', 'leased') RETURNING id;

-- requeue_message --
UPDATE inbox SET state = 'queued', lease_expires_at = NULL, not_before = :not_before, reason = :reason
 WHERE id = :id AND state IN ('queued', 'leased');

-- count_deferral --
-- The failure was not the message's: it is no attempt.
UPDATE inbox SET attempts = max(0, attempts - 1), deferrals = deferrals + 1 WHERE id = :id;

-- leave_turn --
-- It joined a turn that ended without having seen it.
UPDATE inbox SET state = 'queued', lease_expires_at = NULL, attempts = attempts - 1,
       first_turn = nullif(first_turn, :turn)
 WHERE id = :id AND turn = :turn AND state = 'leased';

-- end_sharing --
UPDATE inbox SET attempts = max(attempts, :attempts) WHERE id = :id;

-- fail_start --
-- A start of the container that failed counts like a claim.
UPDATE inbox SET attempts = attempts + 1, not_before = :not_before, reason = :reason WHERE id = :id;

-- put_back --
-- The turn was broken off by us and not by its messages: it is no attempt.
UPDATE inbox SET state = 'queued', lease_expires_at = NULL, not_before = 0, reason = NULL,
       attempts = attempts - 1
 WHERE session = :session AND state = 'leased' RETURNING *;

-- open_messages --
SELECT * FROM inbox WHERE session = :session AND state IN ('queued', 'leased') ORDER BY seq;

-- finish_queued --
-- Everything that waits for a session in one chat, e.g. when the person stops it.
UPDATE inbox SET state = :state, ended_at = :now, reason = :reason
 WHERE session = :session AND channel = :channel AND chat = :chat AND thread = :thread AND state = 'queued'
RETURNING *;

-- mark_stopping --
UPDATE inbox SET stopping = 1
 WHERE session = :session AND channel = :channel AND chat = :chat AND thread = :thread AND state = 'leased'
RETURNING id;

-- busy_sessions --
-- Those with something to do in one chat.
SELECT * FROM session WHERE id IN
       (SELECT session FROM inbox
         WHERE channel = :channel AND chat = :chat AND thread = :thread AND state IN ('queued', 'leased'));

-- end_stopping --
UPDATE inbox SET state = :state, lease_expires_at = NULL, ended_at = :now, reason = :reason
 WHERE session = :session AND stopping AND state IN ('queued', 'leased') RETURNING *;

-- extend_leases --
-- After a restart of the router: its runners get a full lease to come back in.
UPDATE inbox SET lease_expires_at = :expires WHERE state = 'leased';

-- publish --
-- The same key again changes nothing.
INSERT INTO outbox (key, message, turn, agent, channel, chat, thread, kind, body, in_reply_to, created_at)
VALUES (:key, :message, :turn, :agent, :channel, :chat, :thread, :kind, :body, :in_reply_to, :now)
ON CONFLICT (key) DO NOTHING;

-- publish_more --
-- The same for what is not just text.
INSERT INTO outbox (key, message, turn, agent, channel, chat, thread, kind, body, in_reply_to, created_at, target_key,
                    target_event, choices)
VALUES (:key, :message, :turn, :agent, :channel, :chat, :thread, :kind, :body, :in_reply_to, :now, :target_key,
        :target_event, :choices)
ON CONFLICT (key) DO NOTHING;

-- already_sent --
-- What earlier attempts at a message sent in mid-turn, the first of them perhaps together with other messages.
SELECT key, body FROM outbox
 WHERE kind NOT IN ('reply', 'notice') AND (message = :message OR turn = :first_turn) ORDER BY seq;

-- messages_of_turn --
-- That of a mid-turn message is the first attempt's, if it was shared.
SELECT id, event, sender, hops, channel, chat, thread FROM inbox WHERE turn = :turn OR first_turn = :turn;

-- count_sends --
-- Besides this one, which may be there already.
SELECT count(*) AS sends FROM outbox WHERE message = :message AND key != :key;

-- next_delivery --
-- The oldest open delivery of a chat, unless it must wait or an adapter has it: then the younger ones wait, too.
SELECT * FROM outbox
 WHERE seq = (SELECT min(seq) FROM outbox WHERE channel = :channel AND chat = :chat AND thread = :thread
                 AND state IN ('pending', 'leased'))
   AND state = 'pending' AND not_before <= :now;

-- deliveries_of_event --
-- What answers one event, alone or with its turn.
SELECT * FROM outbox
 WHERE channel = :channel AND state = 'pending' AND not_before <= :now AND (:chat IS NULL OR chat = :chat)
   AND (in_reply_to = :event
        OR EXISTS (SELECT * FROM inbox
                    WHERE channel = :channel AND chat = outbox.chat AND thread = outbox.thread AND event = :event
                      AND outbox.turn IN (inbox.turn, first_turn))
        OR EXISTS (SELECT * FROM ask JOIN inbox ON inbox.id = ask.message
                    WHERE ask.event = :event AND outbox.turn IN (inbox.turn, first_turn)))
 ORDER BY seq LIMIT :limit;

-- due_deliveries --
-- The same for each chat of a channel.
SELECT outbox.* FROM outbox
  JOIN (SELECT min(seq) AS seq FROM outbox
         WHERE channel = :channel AND state IN ('pending', 'leased') AND (:chat IS NULL OR chat = :chat)
         GROUP BY chat, thread) AS oldest USING (seq)
 WHERE state = 'pending' AND not_before <= :now ORDER BY seq LIMIT :limit;

-- claim_delivery --
UPDATE outbox SET state = 'leased', attempts = attempts + 1 WHERE seq = :seq;

-- report_part --
UPDATE outbox SET parts_sent = max(parts_sent, :parts), receipt = :receipt
 WHERE channel = :channel AND key = :key AND state IN ('pending', 'leased') RETURNING seq;

-- recent_deliveries --
-- The last of a session, newest first.
SELECT * FROM outbox WHERE agent = :agent AND channel = :channel AND chat = :chat AND thread = :thread
 ORDER BY seq DESC LIMIT :limit;

-- release_delivery --
UPDATE outbox SET state = 'pending', not_before = :not_before, reason = :reason
 WHERE key = :key AND state = 'leased' RETURNING seq;

-- release_deliveries --
-- After a restart: nobody holds one any more.
UPDATE outbox SET state = 'pending' WHERE state = 'leased';

-- end_delivery --
UPDATE outbox SET state = :state, ended_at = :now, receipt = :receipt, reason = :reason
 WHERE channel = :channel AND key = :key AND state IN ('pending', 'leased') RETURNING *;

-- find_delivery --
SELECT * FROM outbox WHERE channel = :channel AND key = :key;

-- find_published --
SELECT * FROM outbox WHERE key = :key;

-- get_message --
SELECT * FROM inbox WHERE id = :id;

-- add_receipt --
-- The platform's id of one part. ReportSent() tells of the last one again.
INSERT INTO receipt (key, part, channel, receipt)
SELECT :key, coalesce(:part, (SELECT 1 + coalesce(max(part), 0) FROM receipt WHERE key = :key)), :channel, :receipt
 WHERE NOT EXISTS (SELECT 1 FROM receipt WHERE key = :key AND receipt = :receipt)
ON CONFLICT DO NOTHING;

-- first_receipt --
SELECT receipt FROM receipt WHERE key = :key ORDER BY part LIMIT 1;

-- find_receipt --
-- The delivery that a platform's id is about, the newest if ids repeat.
SELECT outbox.* FROM receipt JOIN outbox USING (key)
 WHERE receipt.channel = :channel AND receipt.receipt = :receipt AND chat = :chat ORDER BY seq DESC LIMIT 1;

-- capabilities --
-- What the adapter of a channel has said that it can do.
SELECT capabilities FROM channel WHERE name = :channel;

-- next_retry --
-- When the next delivery of a channel may be tried again.
SELECT min(not_before) AS not_before FROM outbox WHERE state = 'pending' AND channel = :channel AND not_before > :now;

-- shift_messages --
-- The clock was set; 0 is not a time.
UPDATE inbox SET not_before = not_before + :by WHERE state = 'queued' AND not_before > 0;

-- shift_deliveries --
UPDATE outbox SET not_before = not_before + :by WHERE state = 'pending' AND not_before > 0;

-- hasten_messages --
UPDATE inbox SET not_before = :soon WHERE state = 'queued' AND not_before > :latest;

-- hasten_deliveries --
UPDATE outbox SET not_before = :soon WHERE state = 'pending' AND not_before > :latest;

-- count_states --
-- Named as in io.nanoclaw.Control.
SELECT state, count(*) AS number FROM inbox WHERE state != 'dead' GROUP BY state
UNION ALL SELECT 'dead', count(*) FROM inbox WHERE state = 'dead' AND NOT dropped
UNION ALL SELECT 'deferred', count(*) FROM inbox WHERE state = 'queued' AND deferrals > 0
UNION ALL SELECT 'deliveriesPending', count(*) FROM outbox WHERE state IN ('pending', 'leased')
UNION ALL SELECT 'deliveriesSent', count(*) FROM outbox WHERE state = 'sent'
UNION ALL SELECT 'deliveriesDead', count(*) FROM outbox WHERE state = 'dead' AND NOT dropped;

-- list_messages --
SELECT inbox.id AS id FROM inbox JOIN session ON session.id = inbox.session
 WHERE (:agent IS NULL OR agent = :agent) AND (:state IS NULL OR state = :state) ORDER BY seq DESC LIMIT :limit;

-- show_message --
-- Named as in io.nanoclaw.Control.
SELECT inbox.id, agent, name AS session, inbox.channel, inbox.chat, inbox.thread, event, revision, sender,
       substr(body, 1, :characters) AS text, state, received_at / 1000.0 AS receivedAt, attempts, deferrals,
       iif(state = 'queued' AND not_before > 0, not_before / 1000.0, NULL) AS notBefore,
       lease_expires_at / 1000.0 AS leaseExpiresAt, ended_at / 1000.0 AS endedAt, turn, first_turn AS firstTurn,
       reason, revived, dropped
  FROM inbox JOIN session ON session.id = inbox.session WHERE inbox.id = :id;

-- show_delivery --
SELECT key, message, turn, agent, channel, chat, thread, kind, substr(body, 1, :characters) AS text, state,
       created_at / 1000.0 AS createdAt, attempts, parts_sent AS partsSent,
       iif(state = 'pending' AND not_before > 0, not_before / 1000.0, NULL) AS notBefore,
       ended_at / 1000.0 AS endedAt, receipt, reason, dropped
  FROM outbox WHERE key = :id;

-- deliveries_of --
-- Messages that share a turn share what it sends.
SELECT key AS id FROM outbox
 WHERE message = :message OR turn = :turn AND message IN (SELECT id FROM inbox WHERE turn = :turn) ORDER BY seq;

-- find_ids --
-- What begins with :id; a key begins with its message's id.
SELECT * FROM (SELECT 'message' AS kind, id FROM inbox WHERE id BETWEEN :id AND :id || char(1114111)
                ORDER BY id LIMIT :limit)
UNION ALL
SELECT * FROM (SELECT 'delivery', key FROM outbox WHERE key BETWEEN :id AND :id || char(1114111)
                ORDER BY key LIMIT :limit);

-- list_dead_letters --
SELECT 'message' AS kind, id, seq FROM inbox WHERE state = 'dead' AND NOT dropped
UNION ALL SELECT 'delivery', key, seq FROM outbox WHERE state = 'dead' AND NOT dropped
 ORDER BY kind DESC, seq LIMIT :limit;

-- retry_message --
UPDATE inbox SET state = 'queued', attempts = 0, deferrals = 0, not_before = 0, ended_at = NULL, reason = NULL,
                 revived = revived + 1
 WHERE id = :id AND state = 'dead' AND NOT dropped RETURNING session;

-- retry_delivery --
UPDATE outbox SET state = 'pending', attempts = 0, not_before = 0, ended_at = NULL, reason = NULL
 WHERE key = :key AND state = 'dead' AND NOT dropped RETURNING key;

-- find_session_of --
SELECT session.* FROM session JOIN inbox ON inbox.session = session.id WHERE inbox.id = :message;

-- drop_message --
UPDATE inbox SET dropped = 1 WHERE id = :id AND state = 'dead' AND NOT dropped RETURNING id;

-- drop_delivery --
UPDATE outbox SET dropped = 1 WHERE key = :key AND state = 'dead' AND NOT dropped RETURNING key;

-- find_old --
-- Messages that ended before :before and may be deleted with all their deliveries. A dead letter is needed until it
-- is dropped; so is what was sent in mid-turn by the first turn of a message that may be tried again.
SELECT id FROM inbox
 WHERE ended_at < :before AND (state != 'dead' OR dropped)
   AND NOT EXISTS (SELECT 1 FROM outbox WHERE message = inbox.id
                      AND (ended_at IS NULL OR ended_at >= :before OR (state = 'dead' AND NOT dropped)
                           OR (kind NOT IN ('reply', 'notice') AND turn IN
                               (SELECT first_turn FROM inbox
                                 WHERE state IN ('queued', 'leased') OR (state = 'dead' AND NOT dropped)))))
 ORDER BY ended_at LIMIT :limit;

-- delete_deliveries --
DELETE FROM outbox WHERE message = :message;

-- delete_old_deliveries --
-- The same for deliveries without a message, e.g. since it could not be read when the database was salvaged.
DELETE FROM outbox WHERE seq IN
       (SELECT seq FROM outbox
         WHERE message IS NULL AND ended_at < :before AND (state != 'dead' OR dropped)
           AND (kind IN ('reply', 'notice') OR turn IS NULL OR turn NOT IN
                (SELECT first_turn FROM inbox WHERE first_turn IS NOT NULL
                    AND (state IN ('queued', 'leased') OR (state = 'dead' AND NOT dropped))))
         ORDER BY ended_at LIMIT :limit)
RETURNING seq;

-- delete_message --
DELETE FROM inbox WHERE id = :id;

-- find_gone_agents --
SELECT DISTINCT agent FROM session WHERE agent NOT IN (SELECT name FROM agent);

-- list_agents --
SELECT * FROM agent ORDER BY name;

-- add_agent --
-- The lowest index that is free.
INSERT INTO agent (name, uid_index, created_at)
SELECT :name, coalesce((SELECT min(candidate) FROM (SELECT 0 AS candidate UNION ALL SELECT uid_index + 1 FROM agent)
                         WHERE candidate NOT IN (SELECT uid_index FROM agent)), 0), :now
RETURNING *;

-- remove_agent --
DELETE FROM agent WHERE name = :name;

-- remove_sessions --
-- Sessions of a removed agent stay as long as messages name them; those without any go.
DELETE FROM session WHERE agent = :agent AND id NOT IN (SELECT session FROM inbox);

-- remove_closed_sessions --
DELETE FROM session WHERE closed_at IS NOT NULL AND id NOT IN (SELECT session FROM inbox);

-- hold_agent --
UPDATE agent SET held = :held WHERE name = :name RETURNING name;

-- router --
SELECT held, slice_boot FROM router;

-- set_router --
UPDATE router SET held = :held, slice_boot = :seen;

-- newest_audit --
-- The number that was given last, and the hash of the newest row that is there.
SELECT (SELECT seq FROM sqlite_sequence WHERE name = 'audit') AS seq,
       (SELECT hash FROM audit ORDER BY seq DESC LIMIT 1) AS hash;

-- add_audit --
INSERT INTO audit VALUES (:seq, :at, :kind, :event, :agent, :detail, :before, :hash);

-- list_audit --
SELECT * FROM audit
 WHERE seq >= :first AND at >= :since AND (:agent IS NULL OR agent = :agent) AND (:kind IS NULL OR kind = :kind)
 ORDER BY seq LIMIT :limit;

-- find_audit --
-- The first of the :limit newest of such rows.
SELECT min(seq) AS first FROM
       (SELECT seq FROM audit
         WHERE at >= :since AND (:agent IS NULL OR agent = :agent) AND (:kind IS NULL OR kind = :kind)
         ORDER BY seq DESC LIMIT :limit);

-- audit_anchor --
SELECT detail FROM audit WHERE event = 'pruned' AND kind = 'trail' ORDER BY seq DESC LIMIT 1;

-- oldest_audit --
SELECT seq, at, hash FROM audit ORDER BY seq LIMIT :limit;

-- prune_audit --
DELETE FROM audit WHERE seq <= :through;

-- gateway_read --
SELECT gateway_life, gateway_read FROM router;

-- set_gateway_read --
UPDATE router SET gateway_life = :life, gateway_read = :number;

-- find_chat --
SELECT * FROM chat WHERE channel = :channel AND chat = :chat;

-- get_chat --
SELECT * FROM chat WHERE id = :id;

-- add_chat --
-- Unless as many wait for an answer as may.
INSERT INTO chat (channel, chat, kind, title, state, created_at)
SELECT :channel, :chat, :kind, :title, 'new', :now WHERE (SELECT count(*) FROM chat WHERE state = 'new') < :limit
RETURNING *;

-- describe_chat --
UPDATE chat SET kind = :kind, title = :title WHERE id = :id;

-- set_chat_state --
UPDATE chat SET state = :state WHERE id = :id;

-- count_dropped --
UPDATE chat SET dropped = dropped + :number WHERE id = :id;

-- set_hops --
UPDATE chat SET hops = :hops WHERE id = :id;

-- pay_program --
UPDATE chat SET hops = hops + 1, programs_paid_until = :until WHERE id = :id;

-- pay_stranger --
UPDATE chat SET strangers_paid_until = :until WHERE id = :id;

-- list_chats --
SELECT chat.*, (SELECT count(*) FROM held WHERE held.chat = chat.id) AS held FROM chat
 WHERE :id IS NULL OR id = :id ORDER BY id;

-- list_wirings --
SELECT * FROM wiring WHERE chat = :chat ORDER BY priority DESC, agent;

-- set_wiring --
INSERT INTO wiring (chat, agent, engagement, pattern, sticky_seconds, priority, exclusive, session_mode, access,
                    keep_context)
VALUES (:chat, :agent, :engagement, :pattern, :sticky_seconds, :priority, :exclusive, :session_mode, :access,
        :keep_context)
ON CONFLICT (chat, agent) DO UPDATE SET
       engagement = :engagement, pattern = :pattern, sticky_seconds = :sticky_seconds, priority = :priority,
       exclusive = :exclusive, session_mode = :session_mode, access = :access, keep_context = :keep_context;

-- set_sticky --
UPDATE wiring SET sticky_until = :until WHERE id = :id;

-- remove_context_of --
DELETE FROM context WHERE wiring IN
       (SELECT id FROM wiring WHERE (:chat IS NULL OR chat = :chat) AND (:agent IS NULL OR agent = :agent));

-- remove_wirings --
DELETE FROM wiring WHERE (:chat IS NULL OR chat = :chat) AND (:agent IS NULL OR agent = :agent) RETURNING chat, agent;

-- find_identity --
SELECT * FROM identity WHERE channel = :channel AND user = :user;

-- standings --
-- All that the person behind an account is; no row: nobody.
SELECT role, agent, chat FROM member JOIN identity USING (person) WHERE channel = :channel AND user = :user;

-- list_people --
SELECT * FROM person ORDER BY id;

-- find_person --
SELECT * FROM person WHERE name = :name;

-- add_person --
INSERT INTO person (name, created_at) VALUES (:name, :now) RETURNING *;

-- list_identities --
SELECT * FROM identity WHERE :person IS NULL OR person = :person ORDER BY person, channel, user;

-- link_identity --
INSERT INTO identity VALUES (:channel, :user, :person, :how)
ON CONFLICT (channel, user) DO UPDATE SET person = :person, how = :how;

-- unlink_identity --
DELETE FROM identity WHERE channel = :channel AND user = :user AND person = :person RETURNING person;

-- list_members --
SELECT member.*, name FROM member JOIN person ON person.id = person
 WHERE (:person IS NULL OR person = :person) AND (:chat IS NULL OR chat = :chat)
 ORDER BY person, role, agent, chat;

-- set_role --
INSERT INTO member VALUES (:person, :agent, :chat, :role, :now)
ON CONFLICT (person, agent, coalesce(chat, 0)) DO UPDATE SET role = :role;

-- remove_role --
DELETE FROM member WHERE person = :person AND agent = :agent AND chat IS :chat RETURNING role;

-- remove_roles_at --
-- To an agent that is gone.
DELETE FROM member WHERE agent = :agent;

-- count_owners --
SELECT count(*) AS owners FROM member WHERE role = 'owner';

-- find_held --
SELECT seq FROM held WHERE chat = :chat AND thread = :thread AND event = :event AND revision = :revision;

-- count_held --
SELECT count(*) FILTER (WHERE chat = :chat) AS in_chat,
       coalesce(sum(length(CAST(body AS BLOB))) FILTER (WHERE chat = :chat), 0) AS bytes, count(*) AS total FROM held;

-- hold_message --
INSERT INTO held (chat, thread, event, revision, sender, sender_name, body, agent, mentioned, program, received_at)
VALUES (:chat, :thread, :event, :revision, :sender, :sender_name, :body, :agent, :mentioned, :program, :now);

-- list_held --
SELECT * FROM held WHERE :chat IS NULL OR chat = :chat ORDER BY seq;

-- release_held --
DELETE FROM held WHERE seq = :seq;

-- drop_held --
DELETE FROM held WHERE chat = :chat RETURNING seq;

-- drop_old_held --
DELETE FROM held WHERE received_at < :before RETURNING chat;

-- forget_new_chats --
-- Those that nobody wanted an answer about for long: they make room for others.
DELETE FROM chat WHERE state = 'new' AND created_at < :before
   AND NOT EXISTS (SELECT 1 FROM held WHERE held.chat = chat.id)
   AND NOT EXISTS (SELECT 1 FROM member WHERE member.chat = chat.id);

-- keep_context --
INSERT INTO context (wiring, thread, event, revision, sender, body, said_at)
VALUES (:wiring, :thread, :event, :revision, :sender, :body, :now) ON CONFLICT DO NOTHING;

-- list_context --
-- With what was told already, or without.
SELECT * FROM context WHERE wiring = :wiring AND (:thread IS NULL OR thread = :thread) AND told <= :told ORDER BY seq;

-- tell_context --
UPDATE context SET told = 1 WHERE seq = :seq;

-- remove_context --
DELETE FROM context WHERE seq = :seq;

-- take_back --
-- Nobody has it yet, and nobody is to have it.
DELETE FROM held WHERE chat = :chat AND thread = :thread AND event = :event;

-- take_back_context --
DELETE FROM context WHERE thread = :thread AND event = :event AND wiring IN (SELECT id FROM wiring WHERE chat = :chat);

-- take_back_message --
UPDATE inbox SET state = 'stopped', ended_at = :now, reason = 'taken back by its sender', body = ''
 WHERE channel = :channel AND chat = :chat AND thread = :thread AND event = :event AND state = 'queued'
RETURNING id, session;

-- set_usage --
-- What the gateway tells is the whole, not what is new: told twice, it counts once.
INSERT INTO usage VALUES (:life, :day, :agent, :session, :model, :calls, :estimated, :unpriced, :input, :output,
                          :cache_write, :cache_read, :money)
    ON CONFLICT (agent, day, session, model, life) DO UPDATE
   SET calls = excluded.calls, estimated = excluded.estimated, unpriced = excluded.unpriced, input = excluded.input,
       output = excluded.output, cache_write = excluded.cache_write, cache_read = excluded.cache_read,
       money = excluded.money;

-- spent --
-- By all agents, on a day or ever.
SELECT agent, session, sum(input + output + cache_write + cache_read) AS tokens, sum(money) AS money
  FROM usage WHERE :day IS NULL OR day = :day GROUP BY agent, session;

-- spent_before --
-- By one agent, without what one gateway has counted.
SELECT agent, session, sum(input + output + cache_write + cache_read) AS tokens, sum(money) AS money
  FROM usage WHERE agent = :agent AND (:day IS NULL OR day = :day) AND life != :without GROUP BY session;

-- list_usage --
-- Named as in io.nanoclaw.Control.
SELECT iif(:by = 'day', '', agent) AS agent, iif(:by = 'session', session, '') AS session,
       iif(:by = 'day', day, '') AS day, sum(calls) AS calls, sum(estimated) AS estimated,
       sum(unpriced) AS unpriced, sum(input) AS input, sum(output) AS output, sum(cache_write) AS cacheWrite,
       sum(cache_read) AS cacheRead, sum(money) AS microdollars
  FROM usage WHERE (:agent IS NULL OR agent = :agent) AND day >= :since GROUP BY 1, 2, 3 ORDER BY 3, 1, 2;

-- sum_up_usage --
-- Days before :day become one row; not those of the gateway that may still tell of them.
INSERT INTO usage
SELECT '', '', agent, session, model, sum(calls), sum(estimated), sum(unpriced), sum(input), sum(output),
       sum(cache_write), sum(cache_read), sum(money)
  FROM usage WHERE day < :day AND life != :running AND day != '' GROUP BY agent, session, model
    ON CONFLICT (agent, day, session, model, life) DO UPDATE
   SET calls = calls + excluded.calls, estimated = estimated + excluded.estimated,
       unpriced = unpriced + excluded.unpriced, input = input + excluded.input, output = output + excluded.output,
       cache_write = cache_write + excluded.cache_write, cache_read = cache_read + excluded.cache_read,
       money = money + excluded.money;

-- delete_old_usage --
DELETE FROM usage WHERE day < :day AND life != :running AND day != '' RETURNING day;

-- session_of --
SELECT * FROM session WHERE agent = :agent AND name = :name;

-- find_approval --
SELECT * FROM approval WHERE id = :id;

-- find_approvals --
-- Those whose id begins so.
SELECT * FROM approval WHERE substr(id, 1, length(:id)) = :id ORDER BY asked_at DESC LIMIT :limit;

-- list_approvals --
-- The newest, the oldest of them first.
SELECT id FROM (SELECT asked_at, rowid AS place, id FROM approval
                 WHERE (:agent IS NULL OR agent = :agent) AND (:state IS NULL OR state = :state)
                 ORDER BY asked_at DESC, rowid DESC LIMIT :limit)
 ORDER BY asked_at, place;

-- pending_approval --
SELECT * FROM approval WHERE agent = :agent AND sha256 = :sha256 AND state = 'pending';

-- pending_approvals --
SELECT * FROM approval WHERE state = 'pending';

-- expire_approval --
UPDATE approval SET state = 'expired' WHERE id = :id RETURNING *;

-- count_approvals --
SELECT count(*) FILTER (WHERE agent = :agent) AS of_agent, count(*) AS total FROM approval WHERE state = 'pending';

-- add_approval --
INSERT INTO approval (id, kind, agent, session, channel, chat, thread, payload, sha256, asked_at, expires_at)
VALUES (:id, :kind, :agent, :session, :channel, :chat, :thread, :payload, :sha256, :now, :expires);

-- decide_approval --
UPDATE approval SET state = :state, scope = :scope, decided_at = :now, decided_by = :by, expires_at = :expires
 WHERE id = :id AND state = 'pending' AND expires_at > :now RETURNING *;

-- use_approval --
-- What was allowed once is used by whoever asks for the same, and then it is used up.
UPDATE approval SET state = 'used'
 WHERE id = (SELECT id FROM approval WHERE agent = :agent AND sha256 = :sha256 AND state = 'allowed'
                AND scope = 'once' AND expires_at > :now ORDER BY decided_at LIMIT 1)
RETURNING *;

-- expire_approvals --
-- What nobody answered, or used, in time; and what was allowed for a while.
UPDATE approval SET state = 'expired'
 WHERE kind != 'action' AND expires_at <= :now AND (state = 'pending' OR (state = 'allowed' AND scope != 'always'))
RETURNING *;

-- end_approvals --
-- Of an agent that is gone: another one of its name inherits nothing.
UPDATE approval SET state = 'expired'
 WHERE agent = :agent AND (state = 'pending' OR (state = 'allowed' AND scope != 'always')) RETURNING *;

-- forget_denials --
UPDATE approval SET expires_at = min(expires_at, :now) WHERE agent = :agent AND state = 'denied';

-- live_approvals --
-- Answers for a while, the newest first.
SELECT * FROM approval
 WHERE state IN ('allowed', 'denied') AND scope = 'for' AND expires_at > :now ORDER BY decided_at DESC;

-- next_expiry --
SELECT min(expires_at) AS at FROM approval
 WHERE kind != 'action' AND (state = 'pending' OR (state = 'allowed' AND scope != 'always')
                             OR (state = 'denied' AND expires_at > :now));

-- delete_approvals --
DELETE FROM approval WHERE id IN
       (SELECT id FROM approval
         WHERE (state IN ('denied', 'used', 'expired') OR (state = 'allowed' AND scope = 'always'))
           AND max(expires_at, coalesce(decided_at, 0)) < :before LIMIT :limit)
RETURNING id;

-- find_question --
SELECT id FROM approval
 WHERE state = 'pending' AND kind = :kind AND channel = :channel AND chat = :chat
   AND (:user IS NULL OR payload ->> '$.user' = :user);

-- count_questions --
SELECT count(*) AS questions FROM approval WHERE state = 'pending' AND kind IN ('sender', 'chat');

-- end_questions --
UPDATE approval SET state = 'expired'
 WHERE state = 'pending' AND kind IN ('sender', 'chat')
   AND NOT EXISTS (SELECT 1 FROM held JOIN chat ON chat.id = held.chat
                    WHERE chat.channel = approval.channel AND chat.chat = approval.chat
                      AND (approval.kind = 'chat') = (chat.state = 'new')
                      AND (approval.kind = 'chat' OR held.sender = payload ->> '$.user'));

-- list_channels --
SELECT * FROM channel;

-- announce_channel --
INSERT INTO channel (name, adapter, capabilities, accounts, announced_at)
VALUES (:name, :adapter, :capabilities, :accounts, :now)
    ON CONFLICT (name) DO UPDATE
   SET adapter = excluded.adapter, capabilities = excluded.capabilities, accounts = excluded.accounts,
       announced_at = excluded.announced_at;

-- forget_channel --
DELETE FROM channel WHERE name = :name;

-- add_file --
INSERT INTO file (id, agent, number, name, media_type, bytes, sha256, kept_until, key, channel, chat, thread, event,
                  revision)
VALUES (:id, :agent, :number, :name, :media_type, :bytes, :sha256, :kept_until, :key, :channel, :chat, :thread, :event,
        :revision);

-- files_of_event --
-- An edit comes without the files that it leaves as they are.
SELECT * FROM file
 WHERE key IS NULL AND channel = :channel AND chat = :chat AND thread = :thread AND event = :event AND revision =
       (SELECT max(revision) FROM file
         WHERE key IS NULL AND channel = :channel AND chat = :chat AND thread = :thread AND event = :event
           AND revision <= :revision)
 ORDER BY number;

-- files_of_delivery --
SELECT * FROM file WHERE key = :key ORDER BY number;

-- find_file --
SELECT * FROM file WHERE id = :id;

-- file_ids --
SELECT id FROM file;

-- count_files --
-- What there is of an agent, of messages that are held, and of all, in bytes.
SELECT coalesce(sum(bytes) FILTER (WHERE agent = :agent), 0) AS of_agent,
       coalesce(sum(bytes) FILTER (WHERE agent = ''), 0) AS held, coalesce(sum(bytes), 0) AS total FROM file;

-- give_files --
-- Of a message that was held: now it is known who gets it.
UPDATE file SET agent = :agent
 WHERE key IS NULL AND channel = :channel AND chat = :chat AND thread = :thread AND event = :event AND agent = '';

-- take_back_files --
DELETE FROM file WHERE key IS NULL AND channel = :channel AND chat = :chat AND thread = :thread AND event = :event;

-- prune_files --
-- What they came or went with is gone.
DELETE FROM file
 WHERE kept_until < :now
   AND CASE WHEN key IS NOT NULL THEN NOT EXISTS (SELECT 1 FROM outbox WHERE outbox.key = file.key)
            ELSE NOT EXISTS (SELECT 1 FROM inbox
                              WHERE inbox.channel = file.channel AND inbox.chat = file.chat
                                AND inbox.thread = file.thread AND inbox.event = file.event
                                AND inbox.revision >= file.revision)
             AND NOT EXISTS (SELECT 1 FROM held JOIN chat ON chat.id = held.chat
                              WHERE chat.channel = file.channel AND chat.chat = file.chat
                                AND held.thread = file.thread AND held.event = file.event
                                AND held.revision >= file.revision) END
RETURNING id;

-- find_action --
-- What a call of an agent was made of.
SELECT * FROM approval WHERE agent = :agent AND session = :session AND call = :call;

-- denied_action --
-- The same, denied a short while ago.
SELECT * FROM approval WHERE agent = :agent AND sha256 = :sha256 AND state = 'denied' AND expires_at > :now;

-- add_action --
INSERT INTO approval (id, kind, agent, session, channel, chat, thread, payload, sha256, asked_at, expires_at, call,
                      needed)
VALUES (:id, 'action', :agent, :session, :channel, :chat, :thread, :payload, :sha256, :now, :expires, :call, :needed)
RETURNING *;

-- open_actions --
-- What waits for an answer, or to be carried out.
SELECT * FROM approval WHERE kind = 'action' AND state IN ('pending', 'allowed') ORDER BY decided_at, asked_at;

-- end_action --
UPDATE approval SET state = :state, outcome = :outcome WHERE id = :id RETURNING *;

-- vote --
INSERT INTO vote (approval, person, place, said_at) VALUES (:approval, :person, :place, :now)
ON CONFLICT DO NOTHING RETURNING person;

-- votes --
SELECT person.name, vote.* FROM vote JOIN person ON person.id = person WHERE approval = :approval ORDER BY said_at;

-- unshown_approvals --
SELECT * FROM approval WHERE NOT shown AND state = 'pending' ORDER BY asked_at;

-- set_shown --
UPDATE approval SET shown = 1 WHERE id = :id;

-- set_peer --
UPDATE chat SET peer = :user WHERE id = :id AND kind = 'direct' AND peer IS NOT :user;

-- direct_chats --
-- Open chats of two with people who may answer something.
SELECT DISTINCT chat.*, identity.person FROM chat JOIN identity ON identity.channel = chat.channel AND user = peer
  JOIN member USING (person)
 WHERE kind = 'direct' AND state = 'open' AND role IN ('owner', 'admin') ORDER BY chat.id;

-- add_card --
INSERT INTO card VALUES (:key, :approval, :channel, :chat, :thread, :sha256, :whole, 'pending')
ON CONFLICT DO NOTHING;

-- find_cards --
SELECT * FROM card WHERE approval = :approval;

-- stale_cards --
-- Of approvals of which their chats were told another state.
SELECT card.*, state FROM card JOIN approval ON approval.id = approval WHERE told != state;

-- set_told --
UPDATE card SET told = :state WHERE key = :key;

-- find_card --
SELECT card.* FROM card JOIN approval ON approval.id = approval
 WHERE card.channel = :channel AND card.chat = :chat AND approval = :approval ORDER BY card.rowid DESC LIMIT 1;

-- card_of_receipt --
SELECT card.* FROM receipt JOIN card USING (key)
 WHERE receipt.channel = :channel AND card.chat = :chat AND receipt.receipt = :receipt ORDER BY card.rowid DESC LIMIT 1;

-- busy_places --
-- Sessions of an agent with something to do in a chat, or in one thread of it, and in which.
SELECT DISTINCT session.*, inbox.thread AS at FROM session JOIN inbox ON session = session.id
 WHERE agent = :agent AND inbox.channel = :channel AND inbox.chat = :chat AND (:thread = '' OR inbox.thread = :thread)
   AND state IN ('queued', 'leased');

-- find_ask --
SELECT * FROM ask WHERE key = :key;

-- add_ask --
INSERT INTO ask (key, message, expires_at) VALUES (:key, :message, :expires);

-- open_asks --
-- In one place, as long as somebody waits for the answer.
SELECT ask.*, agent, choices FROM ask JOIN outbox USING (key) JOIN inbox ON inbox.id = ask.message
 WHERE answer IS NULL AND expires_at > :now AND outbox.channel = :channel AND outbox.chat = :chat
   AND outbox.thread = :thread AND inbox.state IN ('queued', 'leased')
 ORDER BY outbox.seq;

-- find_answer --
-- What an event has answered already.
SELECT ask.message FROM ask JOIN outbox USING (key)
 WHERE ask.event = :event AND channel = :channel AND chat = :chat AND thread = :thread;

-- answers_in_turn --
-- Events that answered what was asked in a turn, which is known by its first attempt, too.
SELECT ask.event FROM ask JOIN inbox ON inbox.id = ask.message
 WHERE ask.event IS NOT NULL AND :turn IN (turn, first_turn);

-- answer_ask --
UPDATE ask SET answer = :answer, answered_by = :by, event = :event WHERE key = :key;

-- list_destinations --
SELECT destination.*, state, title FROM destination LEFT JOIN chat USING (channel, chat)
 WHERE :agent IS NULL OR agent = :agent ORDER BY agent, name;

-- set_destination --
INSERT INTO destination (agent, name, channel, chat) VALUES (:agent, :name, :channel, :chat)
ON CONFLICT (agent, name) DO UPDATE SET channel = :channel, chat = :chat;

-- remove_destinations --
DELETE FROM destination WHERE agent = :agent AND (:name IS NULL OR name = :name) RETURNING name;

-- unlink_channel --
DELETE FROM identity WHERE channel = :channel;

-- chats_of_channel --
SELECT id FROM chat WHERE channel = :channel AND state != 'blocked';

-- open_places --
SELECT DISTINCT chat, thread FROM inbox WHERE channel = :channel AND state IN ('queued', 'leased');

-- bury_deliveries --
-- Of a channel that is removed. Those of an adapter that still has some are not taken back.
UPDATE outbox SET state = 'dead', ended_at = :now, reason = :reason
 WHERE channel = :channel AND state IN ('pending', 'leased') RETURNING key;

-- count_waiting --
SELECT count(*) AS waiting FROM outbox WHERE channel = :channel AND state IN ('pending', 'leased');
