-- The dead letters of a selection, in the order of their seq, without their payload and metadata: id, created_at, seq,
-- topic, key (its first 1,000 characters), lane, attempts, why they died, when, how many seconds ago that was, and how
-- many seconds ago another row with the same id was published (NULL: none was).
--
-- One pass over the index of dead letters, whatever is asked for. What is NULL selects all.
--
-- $1 uuid[]: these ids. $2 text: topics, as a regular expression. $3 text: this key. $4 bigint, $5 bigint: died at or
-- after, and before; in milliseconds since 1970, or from now if not above 0. $6 text: a part of why, in any case of
-- letters. $7 bigint: how many at most.
SELECT o.id, o.created_at, o.seq, o.topic::text, left(outbox_key(o.topic, o.metadata), 1000), outbox_lane(o.topic, o.metadata),
       coalesce(o.attempts, 0), coalesce(o.last_error, ''),
       coalesce(to_char(o.dead_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'), o.dead_at::text),
       CASE WHEN isfinite(o.dead_at) THEN extract(epoch FROM now() - o.dead_at)::float8 END,
       (SELECT extract(epoch FROM now() - max(copy.published_at))::float8
          FROM outboxes AS copy
         WHERE copy.id = o.id AND copy.created_at <> o.created_at AND isfinite(copy.published_at))
  FROM outboxes AS o
 WHERE o.published_at IS NULL AND o.dead_at IS NOT NULL AND o.discarded_at IS NULL
   AND ($1::uuid[] IS NULL OR o.id = ANY ($1))
   AND ($2::text IS NULL OR o.topic COLLATE "C" ~ $2)
   AND ($3::text IS NULL OR outbox_key(o.topic, o.metadata) = $3)
   AND ($4::bigint IS NULL OR o.dead_at >= CASE WHEN $4 > 0 THEN to_timestamp($4 / 1000.0)
                                                ELSE now() + $4 * interval '1 ms' END)
   AND ($5::bigint IS NULL OR o.dead_at < CASE WHEN $5 > 0 THEN to_timestamp($5 / 1000.0)
                                               ELSE now() + $5 * interval '1 ms' END)
   AND ($6::text IS NULL OR position(lower($6) IN lower(o.last_error)) > 0)
 ORDER BY o.seq
 LIMIT $7::bigint
