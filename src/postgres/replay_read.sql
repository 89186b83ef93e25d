-- Reads published events whole, in the order of their seq. One that was deleted since it was found is left out.
--
-- $1 uuid[], $2 timestamptz[]: id and created_at of each.
SELECT o.id, o.seq, o.created_at, o.topic::text, outbox_key_hash(o.topic, o.metadata), outbox_lane(o.topic, o.metadata),
       coalesce(o.attempts, 0), o.metadata::text, o.payload::text
  FROM unnest($1::uuid[], $2::timestamptz[]) AS e(id, created_at)
  JOIN outboxes AS o ON o.id = e.id AND o.created_at = e.created_at AND o.published_at IS NOT NULL
 ORDER BY o.seq
