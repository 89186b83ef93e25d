-- Marks events published, each where it was read; returns how many rows changed. A row that has moved since, or is no longer
-- pending, stays as it is.
--
-- The place (ctid) spares the search in the primary key, and created_at prunes the other partitions while it runs: 19.5 us of
-- PostgreSQL's time for reading and settling an event, 24.6 by the primary key. No index mentions what is changed, so the new
-- version stays on the row's page.
--
-- $1 tid[], $2 timestamptz[], $3 uuid[]: place, created_at and id of each event.
UPDATE outboxes AS o
   SET published_at = statement_timestamp(),
       attempts = least(coalesce(o.attempts, 0), 2147483646) + 1,
       last_error = NULL,
       next_attempt_at = NULL
  FROM unnest($1::tid[], $2::timestamptz[], $3::uuid[]) AS e(place, created_at, id)
 WHERE o.ctid = e.place
   AND o.created_at = e.created_at
   AND o.id = e.id
   AND o.published_at IS NULL
   AND o.dead_at IS NULL
