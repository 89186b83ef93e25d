-- Marks events published by their primary key, wherever they are now; returns how many rows changed. For claims of which
-- settle_published.sql did not find every row: VACUUM FULL, an update by hand or a partition's move gave it another place. A row
-- that is no longer pending stays as it is.
--
-- $1 timestamptz[], $2 uuid[]: created_at and id of each event.
UPDATE outboxes AS o
   SET published_at = statement_timestamp(),
       attempts = least(coalesce(o.attempts, 0), 2147483646) + 1,
       last_error = NULL,
       next_attempt_at = NULL
  FROM unnest($1::timestamptz[], $2::uuid[]) AS e(created_at, id)
 WHERE o.id = e.id
   AND o.created_at = e.created_at
   AND o.published_at IS NULL
   AND o.dead_at IS NULL
