-- Milliseconds until the earliest event in retry is due: 0 when one is due now, NULL when none is in retry.
-- One short index search for each lane and partition, each ending at its first row.
--
-- $1 bigint: longest backoff in ms; a retry further off than that is due, as clocks jump.
SELECT min(CASE WHEN due.next_attempt_at BETWEEN now() AND now() + $1::bigint * interval '1 ms'
                THEN ceil(extract(epoch FROM due.next_attempt_at - now()) * 1000)::bigint
                ELSE 0 END)
  FROM outbox_lanes AS l
 CROSS JOIN LATERAL (
       (SELECT o.next_attempt_at
          FROM outboxes o
         WHERE outbox_lane(o.topic, o.metadata) = l.lane
           AND o.published_at IS NULL AND o.dead_at IS NULL AND o.next_attempt_at IS NOT NULL
         ORDER BY o.next_attempt_at
         LIMIT 1)
       UNION ALL
       (SELECT o.next_attempt_at
          FROM outboxes o
         WHERE outbox_lane(o.topic, o.metadata) = l.lane
           AND o.published_at IS NULL AND o.dead_at IS NULL
           AND o.next_attempt_at > now() + $1::bigint * interval '1 ms'
         ORDER BY o.next_attempt_at
         LIMIT 1)) AS due
