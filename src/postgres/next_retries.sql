-- The events in retry that are due first, without their payload and metadata: seq, topic, attempts, why the last one
-- failed, and when the next comes, in milliseconds since 1970. Looks at up to 10,000 of them.
--
-- $1 bigint: how many.
SELECT seq, topic::text, coalesce(attempts, 0), coalesce(last_error, ''),
       (extract(epoch FROM next_attempt_at) * 1000)::bigint
  FROM (SELECT seq, topic, attempts, last_error, next_attempt_at FROM outboxes
         WHERE published_at IS NULL AND dead_at IS NULL AND next_attempt_at IS NOT NULL LIMIT 10000) AS found
 WHERE isfinite(next_attempt_at)
 ORDER BY next_attempt_at, seq
 LIMIT $1
