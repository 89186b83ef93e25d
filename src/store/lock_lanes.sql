-- Locks up to $2 lanes that have something to claim, beginning with lane $1, and returns them.
--
-- A lane has something to claim when it has a fresh event that nothing holds back, or a due retry. Lanes
-- that another claim has locked are skipped, never waited for. It locks and nothing more: the events are
-- read by a statement of its own (read_events.sql), whose snapshot is taken after the locks.
--
-- The order of work is forced by the LATERALs: look into a lane, then lock it, and stop at $2. The searches
-- end in LIMIT 1; with EXISTS the planner hashes the whole backlog. What holds an event back is asked as
-- NOT (... AND EXISTS ...), which cannot become a join either: one short index search for each event
-- looked at, and none while no event is in retry, which `held` finds out once.
--
-- With 100,000 events pending, or 100,000 in retry and not due: 0.5 to 1 ms. An event that is held back
-- costs 2 us each time its lane is looked at, so a key with 100,000 events behind a retry costs 0.2 s.
--
-- $1 int: first lane, 0 to 63. $2 int: lanes at most. $3 bool: events wait for earlier retries of their
-- key. $4 bool: events wait for earlier dead letters of their key. $5 bigint: longest backoff in ms; a
-- retry further off than that is due, as clocks jump.
  WITH held AS MATERIALIZED (
       SELECT EXISTS (SELECT FROM outboxes
                       WHERE published_at IS NULL AND dead_at IS NULL AND next_attempt_at IS NOT NULL) AS by_retry,
              $4::bool AND EXISTS (SELECT FROM outboxes
                                    WHERE published_at IS NULL AND dead_at IS NOT NULL) AS by_dead)
SELECT locked.lane
  FROM generate_series($1::int, $1::int + 63) AS turn
 CROSS JOIN LATERAL (SELECT turn % 64 AS lane) AS l
 CROSS JOIN LATERAL (
       (SELECT l.lane
          FROM outboxes o
         WHERE outbox_lane(o.topic, o.metadata) = l.lane
           AND o.published_at IS NULL AND o.dead_at IS NULL AND o.next_attempt_at IS NULL
           AND NOT ($3::bool AND (SELECT by_retry FROM held) AND EXISTS (
               SELECT FROM outboxes r
                WHERE md5(outbox_key(r.topic, r.metadata)) = md5(outbox_key(o.topic, o.metadata)) AND r.seq < o.seq
                  AND r.published_at IS NULL AND r.dead_at IS NULL AND isfinite(r.next_attempt_at) IS NOT NULL))
           AND NOT ((SELECT by_dead FROM held) AND EXISTS (
               SELECT FROM outboxes d
                WHERE md5(outbox_key(d.topic, d.metadata)) = md5(outbox_key(o.topic, o.metadata)) AND d.seq < o.seq
                  AND d.published_at IS NULL AND d.dead_at IS NOT NULL))
         LIMIT 1)
       UNION ALL
       (SELECT l.lane
          FROM (SELECT * FROM outboxes p
                 WHERE outbox_lane(p.topic, p.metadata) = l.lane
                   AND p.published_at IS NULL AND p.dead_at IS NULL AND p.next_attempt_at <= now()
                UNION ALL
                SELECT * FROM outboxes p
                 WHERE outbox_lane(p.topic, p.metadata) = l.lane
                   AND p.published_at IS NULL AND p.dead_at IS NULL
                   AND p.next_attempt_at > now() + $5::bigint * interval '1 ms') AS o
         WHERE (SELECT by_retry FROM held)
           AND NOT ($3::bool AND EXISTS (
               SELECT FROM outboxes r
                WHERE md5(outbox_key(r.topic, r.metadata)) = md5(outbox_key(o.topic, o.metadata)) AND r.seq < o.seq
                  AND r.published_at IS NULL AND r.dead_at IS NULL AND isfinite(r.next_attempt_at) IS NOT NULL
                  AND coalesce(r.next_attempt_at > now()
                               AND r.next_attempt_at <= now() + $5::bigint * interval '1 ms', false)))
           AND NOT ((SELECT by_dead FROM held) AND EXISTS (
               SELECT FROM outboxes d
                WHERE md5(outbox_key(d.topic, d.metadata)) = md5(outbox_key(o.topic, o.metadata)) AND d.seq < o.seq
                  AND d.published_at IS NULL AND d.dead_at IS NOT NULL))
         LIMIT 1)
       LIMIT 1) AS claimable
 CROSS JOIN LATERAL (
       SELECT lanes.lane
         FROM outbox_lanes AS lanes
        WHERE lanes.lane = claimable.lane
          FOR UPDATE SKIP LOCKED) AS locked
 LIMIT $2::int
