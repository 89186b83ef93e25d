-- Finds published events to send again, in the order of their seq: id, created_at, seq, topic, and about how many bytes
-- each takes. As a cursor that outlives its transaction: PostgreSQL keeps the list, neither a snapshot nor a lock stays,
-- and pages of it cost no second search. What is NULL selects all; of the partitions, those within the time are read.
--
-- $1 uuid[]: these ids. $2 text: topics, as a regular expression. $3 text: this key. $4 bigint, $5 bigint: written at or
-- after, and before; in milliseconds since 1970, or from now if not above 0. $6 bigint: seqs above this. $7 bigint: how
-- many at most.
DECLARE replay SCROLL CURSOR WITH HOLD FOR
SELECT id, created_at, seq, topic::text,
       (pg_column_size(payload) * CASE WHEN pg_column_compression(payload) IS NULL THEN 1 ELSE 4 END
           + coalesce(pg_column_size(metadata), 0))::bigint
  FROM outboxes
 WHERE published_at IS NOT NULL
   AND ($1::uuid[] IS NULL OR id = ANY ($1))
   AND ($2::text IS NULL OR topic COLLATE "C" ~ $2)
   AND ($3::text IS NULL OR outbox_key(topic, metadata) = $3)
   AND created_at >= coalesce(CASE WHEN $4::bigint > 0 THEN to_timestamp($4 / 1000.0)
                                   ELSE now() + $4 * interval '1 ms' END, '-infinity')
   AND created_at < coalesce(CASE WHEN $5::bigint > 0 THEN to_timestamp($5 / 1000.0)
                                  ELSE now() + $5 * interval '1 ms' END, 'infinity')
   AND seq > coalesce($6::bigint, -9223372036854775808)
 ORDER BY seq
 LIMIT $7::bigint
