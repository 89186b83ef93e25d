-- Gives dead letters another id, and makes them retries that are due at once, with no attempt made yet; returns the seq
-- of each. What is no dead letter any more stays as it is. The lanes must be locked.
--
-- A fresh id is a fresh message id, and nothing else of the row changes: neither its partition nor its place in the
-- order. The error of the last attempt stays until the next one.
--
-- $1 uuid[], $2 timestamptz[]: id and created_at of each event. $3 uuid[]: the id that each has from now on.
UPDATE outboxes o
   SET id = e.new_id,
       dead_at = NULL,
       next_attempt_at = statement_timestamp(),
       attempts = 0
  FROM unnest($1::uuid[], $2::timestamptz[], $3::uuid[]) AS e(id, created_at, new_id)
 WHERE o.id = e.id
   AND o.created_at = e.created_at
   AND o.published_at IS NULL
   AND o.dead_at IS NOT NULL
   AND o.discarded_at IS NULL
RETURNING o.seq
