-- How many keys an event in retry holds back, and how many a dead letter does. Counted among up to 100,000 events of
-- each kind. Only the indexes by key are read where vacuum has been.
--
-- $1 boolean: dead letters hold their keys.
SELECT (SELECT count(DISTINCT key)
          FROM (SELECT outbox_key_hash(topic, metadata) FROM outboxes
                 WHERE isfinite(next_attempt_at) IS NOT NULL
                 LIMIT 100000) AS retrying(key)),
       (SELECT count(DISTINCT key)
          FROM (SELECT outbox_key_hash(topic, metadata) FROM outboxes
                 WHERE $1 AND dead_at IS NOT NULL AND discarded_at IS NULL
                 LIMIT 100000) AS dead(key))
