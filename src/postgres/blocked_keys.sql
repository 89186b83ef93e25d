-- The keys that an event in retry, or a dead letter, may hold back, oldest first: key, its first such seq, how many of
-- them, whether they are dead letters, and the reason of the first. Looks at up to 10,000 events of each kind.
--
-- $1 boolean: dead letters hold their keys. $2 bigint: how many keys.
SELECT key, min(seq), count(*), dead, (array_agg(reason ORDER BY seq))[1]
  FROM ((SELECT outbox_key(topic, metadata), seq, false, coalesce(last_error, '') FROM outboxes
          WHERE published_at IS NULL AND dead_at IS NULL AND next_attempt_at IS NOT NULL LIMIT 10000)
        UNION ALL
        (SELECT outbox_key(topic, metadata), seq, true, coalesce(last_error, '') FROM outboxes
          WHERE $1 AND published_at IS NULL AND dead_at IS NOT NULL AND discarded_at IS NULL
          LIMIT 10000)) AS found(key, seq, dead, reason)
 GROUP BY key, dead
 ORDER BY 2
 LIMIT $2
