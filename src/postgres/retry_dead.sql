-- Makes dead letters retries that are due at once, with no attempt made yet, and returns the seq of each. What is no
-- dead letter any more stays as it is. The lanes must be locked.
--
-- The error of the last attempt stays until the next one.
--
-- $1 uuid[], $2 timestamptz[]: id and created_at of each event.
UPDATE outboxes o
   SET dead_at = NULL,
       next_attempt_at = statement_timestamp(),
       attempts = 0
  FROM unnest($1::uuid[], $2::timestamptz[]) AS e(id, created_at)
 WHERE o.id = e.id
   AND o.created_at = e.created_at
   AND o.published_at IS NULL
   AND o.dead_at IS NOT NULL
   AND o.discarded_at IS NULL
RETURNING o.seq
