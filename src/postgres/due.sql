-- The lanes that have an event in retry, each with the milliseconds until its earliest one is due (0: now).
--
-- Two short searches of an index for each lane and partition. A retry that is further off than the longest backoff counts as
-- due, as clocks jump.
--
-- $1 bigint: longest backoff in ms.
SELECT l.lane,
       min(CASE WHEN due.next_attempt_at BETWEEN now() AND now() + $1::bigint * interval '1 ms'
                THEN ceil(extract(epoch FROM due.next_attempt_at - now()) * 1000)::bigint
                ELSE 0 END) AS due_ms
  FROM generate_series(0, 63) AS l(lane)
 CROSS JOIN LATERAL (
       (SELECT o.next_attempt_at
          FROM outboxes AS o
         WHERE outbox_lane(o.topic, o.metadata)::int2 = l.lane::int2 AND o.next_attempt_at IS NOT NULL
           AND o.published_at IS NULL AND o.dead_at IS NULL
         ORDER BY o.next_attempt_at
         LIMIT 1)
       UNION ALL
       (SELECT o.next_attempt_at
          FROM outboxes AS o
         WHERE outbox_lane(o.topic, o.metadata)::int2 = l.lane::int2
           AND o.next_attempt_at > now() + $1::bigint * interval '1 ms'
           AND o.published_at IS NULL AND o.dead_at IS NULL
         ORDER BY o.next_attempt_at
         LIMIT 1)) AS due
 GROUP BY l.lane
