-- Looks into the lanes $1, without locking anything, and returns them in their order with two answers each.
--
-- claimable: the lane has a fresh event that nothing holds back, or a due retry. settled: it has no fresh event at
-- all, not even one that is held back. Fresh events are looked for above the lane's cursor.
--
-- The searches end in LIMIT 1; with EXISTS the planner hashes the whole backlog. What holds an event back is asked
-- as NOT (... AND EXISTS ...), which cannot become a join either: one short index search for each event looked at,
-- and none while no event is in retry, which `held` finds out once.
--
-- $1 int[]: lanes. $2 bigint[]: their cursors. $3 bool: events wait for earlier retries of their key. $4 bool: events
-- wait for earlier dead letters of their key. $5 bigint: longest backoff in ms; a retry further off than that is due,
-- as clocks jump.
SELECT lane, claimable,
       CASE
           WHEN claimable THEN false
           WHEN (SELECT by_retry OR by_dead FROM held) THEN (
               SELECT false
                 FROM outboxes o
                WHERE outbox_lane(o.topic, o.metadata) = looked.lane
                  AND o.published_at IS NULL AND o.dead_at IS NULL AND o.next_attempt_at IS NULL AND o.seq > looked.cursor
                LIMIT 1) IS NULL
           ELSE true
       END AS settled
  FROM (
SELECT l.lane, l.cursor, l.turn, (
       (SELECT true
          FROM outboxes o
         WHERE outbox_lane(o.topic, o.metadata) = l.lane
           AND o.published_at IS NULL AND o.dead_at IS NULL AND o.next_attempt_at IS NULL AND o.seq > l.cursor
           AND NOT ($3::bool AND (SELECT by_retry FROM held) AND EXISTS (
               SELECT FROM outboxes r
                WHERE md5(outbox_key(r.topic, r.metadata)) = md5(outbox_key(o.topic, o.metadata)) AND r.seq < o.seq
                  AND r.published_at IS NULL AND r.dead_at IS NULL AND isfinite(r.next_attempt_at) IS NOT NULL))
           AND NOT ((SELECT by_dead FROM held) AND EXISTS (
               SELECT FROM outboxes d
                WHERE md5(outbox_key(d.topic, d.metadata)) = md5(outbox_key(o.topic, o.metadata)) AND d.seq < o.seq
                  AND d.published_at IS NULL AND d.dead_at IS NOT NULL AND d.discarded_at IS NULL))
         LIMIT 1)
       UNION ALL
       (SELECT true
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
                  AND d.published_at IS NULL AND d.dead_at IS NOT NULL AND d.discarded_at IS NULL))
         LIMIT 1)
       LIMIT 1) IS NOT NULL AS claimable
  FROM unnest($1::int[], $2::bigint[]) WITH ORDINALITY AS l(lane, cursor, turn)
OFFSET 0) AS looked
 ORDER BY turn
