-- What may make something claimable without any notification: milliseconds until the earliest event in retry is
-- due (0 when one is due now, NULL when none is in retry), and whether somebody has a claim open.
--
-- Retries: one short index search for each lane and partition, each ending at its first row. Claims: the lock on
-- outbox_lanes that FOR UPDATE takes, which is there to see for every role, while row locks are not. Databases made
-- from one template give their tables the same oid, so it takes the database to tell them apart.
--
-- $1 bigint: longest backoff in ms; a retry further off than that is due, as clocks jump.
SELECT min(CASE WHEN due.next_attempt_at BETWEEN now() AND now() + $1::bigint * interval '1 ms'
                THEN ceil(extract(epoch FROM due.next_attempt_at - now()) * 1000)::bigint
                ELSE 0 END),
       EXISTS (SELECT FROM pg_locks
                WHERE locktype = 'relation' AND relation = 'outbox_lanes'::regclass
                  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
                  AND mode = 'RowShareLock' AND granted AND pid <> pg_backend_pid())
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
