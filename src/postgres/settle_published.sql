-- Marks events published; returns how many rows changed. A row that is no longer pending stays as it is:
-- somebody else has settled, buried or deleted it meanwhile.
--
-- An operator who reads a published row should not find the error of an attempt before it: last_error goes.
-- statement_timestamp(), as now() is when the claim began.
--
-- $1 uuid[], $2 timestamptz[]: id and created_at of each event.
UPDATE outboxes o
   SET published_at = statement_timestamp(),
       attempts = least(coalesce(o.attempts, 0), 2147483646) + 1,
       last_error = NULL,
       next_attempt_at = NULL
  FROM unnest($1::uuid[], $2::timestamptz[]) AS e(id, created_at)
 WHERE o.id = e.id
   AND o.created_at = e.created_at
   AND o.published_at IS NULL
   AND o.dead_at IS NULL
