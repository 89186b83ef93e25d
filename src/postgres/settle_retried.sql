-- Puts events into retry; returns how many rows changed. A row that is no longer pending stays as it is.
--
-- $1 uuid[], $2 timestamptz[]: id and created_at of each event. $3 int[]: attempts, this one included.
-- $4 bigint[]: ms until the next attempt, from now by the database's clock. $5 text[]: why it failed.
UPDATE outboxes o
   SET attempts = e.attempts,
       last_error = e.error,
       next_attempt_at = statement_timestamp() + e.delay_ms * interval '1 ms'
  FROM unnest($1::uuid[], $2::timestamptz[], $3::int[], $4::bigint[], $5::text[])
       AS e(id, created_at, attempts, delay_ms, error)
 WHERE o.id = e.id
   AND o.created_at = e.created_at
   AND o.published_at IS NULL
   AND o.dead_at IS NULL
