-- Discards dead letters, and returns the seq of each. They stay where they are, and hold nothing back any more. What is
-- no dead letter any more stays as it is. The lanes must be locked.
--
-- $1 uuid[], $2 timestamptz[]: id and created_at of each event. $3 text: who does it. $4 text: why.
UPDATE outboxes o
   SET discarded_at = statement_timestamp(),
       discarded_by = $3,
       discard_reason = $4
  FROM unnest($1::uuid[], $2::timestamptz[]) AS e(id, created_at)
 WHERE o.id = e.id
   AND o.created_at = e.created_at
   AND o.published_at IS NULL
   AND o.dead_at IS NOT NULL
   AND o.discarded_at IS NULL
RETURNING o.seq
