-- Which of the keys $1 are held, each with the first event that holds it: one in retry, due or not, or, where $2 says that
-- it matters, a dead letter. Later events of the key wait. Two short searches of an index for each key.
--
-- $1 bigint[]: hashes of keys. $2 bool: dead letters hold their keys.
SELECT held.key_hash, held.seq
  FROM (SELECT k.key_hash,
               least((SELECT r.seq
                        FROM outboxes AS r
                       WHERE outbox_key_hash(r.topic, r.metadata) = k.key_hash
                         AND isfinite(r.next_attempt_at) IS NOT NULL AND r.published_at IS NULL AND r.dead_at IS NULL
                       ORDER BY r.seq
                       LIMIT 1),
                     CASE WHEN $2::bool THEN (
                     SELECT d.seq
                       FROM outboxes AS d
                      WHERE outbox_key_hash(d.topic, d.metadata) = k.key_hash
                        AND d.dead_at IS NOT NULL AND d.discarded_at IS NULL AND d.published_at IS NULL
                      ORDER BY d.seq
                      LIMIT 1) END) AS seq
          FROM unnest($1::bigint[]) AS k(key_hash)
        OFFSET 0) AS held
 WHERE held.seq IS NOT NULL
