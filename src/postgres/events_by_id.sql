-- Everything about the events with these ids, whatever became of them, in the order of their seq. Times are text, in
-- UTC.
--
-- $1 uuid[]: the ids.
SELECT id::text, seq, topic::text, outbox_key(topic, metadata), outbox_lane(topic, metadata),
       CASE WHEN published_at IS NOT NULL THEN 'published'
            WHEN discarded_at IS NOT NULL THEN 'discarded'
            WHEN dead_at IS NOT NULL THEN 'dead'
            WHEN next_attempt_at IS NOT NULL THEN 'in retry'
            ELSE 'pending' END,
       (created_at AT TIME ZONE 'UTC')::text, (published_at AT TIME ZONE 'UTC')::text, coalesce(attempts, 0),
       last_error, (next_attempt_at AT TIME ZONE 'UTC')::text, (dead_at AT TIME ZONE 'UTC')::text,
       (discarded_at AT TIME ZONE 'UTC')::text, discarded_by, discard_reason, metadata::text, payload::text
  FROM outboxes
 WHERE id = ANY ($1::uuid[])
 ORDER BY seq
