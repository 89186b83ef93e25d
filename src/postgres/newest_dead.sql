-- The newest dead letters, without their payload and metadata: id, seq, topic, attempts, why, and when in milliseconds
-- since 1970. Reads every dead letter there is.
--
-- $1 bigint: how many.
SELECT id::text, seq, topic::text, coalesce(attempts, 0), coalesce(last_error, ''),
       (extract(epoch FROM dead_at) * 1000)::bigint
  FROM outboxes
 WHERE published_at IS NULL AND dead_at IS NOT NULL AND discarded_at IS NULL AND isfinite(dead_at)
 ORDER BY dead_at DESC, seq DESC
 LIMIT $1
