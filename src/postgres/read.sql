-- Reads the fresh events of the lanes $1, which this transaction has locked, in the order of their seq: of each up to its share
-- of $3 events, and walking over up to $4 entries of its index, published ones included.
--
-- The index has an entry for every event, so a lane's read begins where $2 says. Rows come lane by lane; each lane has at
-- least one. A row without an id says how the lane ended: without a seq, it has nothing above its beginning; with one, it was
-- read up to there, the last of $4 entries (which is asked only where so many numbers were drawn). What holds events back
-- (retries and dead letters in these lanes) is said by `held`, and so is which of the writers $7 are over, at this statement's
-- own snapshot, by `over`.
--
-- An event whose stored size, which costs nothing to know (compressed values count four times), is over $10 comes without its
-- texts, which are then neither detoasted nor made; `stored` tells whoever reads the rows what to ask for instead. The stored
-- size says little of a text: a number such as 1e131071 takes 12 bytes and prints as 131,072. So he counts on. A
-- text is made once (LIMIT keeps the planner from making it again); an event with one over $6 bytes can be no message, and
-- comes without it, with its size.
--
-- $1 int[]: lanes. $2 bigint[]: where each begins. $3 int: events at most. $4 bigint: entries of a lane at most. $5 bigint:
-- bytes of payload and metadata that the claim may hold. $6 bigint: bytes that an event has at most; NULL: no texts. $7 bigint[]:
-- ids of writers. $8 bool: dead letters hold their keys. $9 bool: an event comes though it is alone larger than $5 or $10.
-- $10 bigint: bytes stored of an event at most.
SELECT l.lane, e.ctid, e.id, e.seq, e.created_at, e.topic, e.key_hash, e.attempts, e.id IS NOT NULL AS fresh,
       CASE WHEN e.bytes <= $6::bigint AND (e.bytes <= $5::bigint OR $9::bool) THEN e.metadata END AS metadata,
       CASE WHEN e.bytes <= $6::bigint AND (e.bytes <= $5::bigint OR $9::bool) THEN e.payload END AS payload,
       CASE WHEN e.bytes > $6::bigint THEN e.bytes END AS oversize,
       (SELECT CASE WHEN EXISTS (SELECT FROM outboxes AS r
                                  WHERE outbox_lane(r.topic, r.metadata)::int2 = ANY ($1::int2[])
                                    AND r.next_attempt_at IS NOT NULL AND r.published_at IS NULL AND r.dead_at IS NULL)
                    THEN true
                    WHEN $8::bool THEN EXISTS (SELECT FROM outboxes AS d
                                                WHERE d.dead_at IS NOT NULL AND d.discarded_at IS NULL)
                    ELSE false END) AS held,
       (SELECT array_agg(xid) FROM unnest($7::bigint[]) AS asked(xid)
         WHERE pg_visible_in_snapshot(xid::text::xid8, pg_current_snapshot())) AS over,
       e.stored
  FROM unnest($1::int[], $2::bigint[]) WITH ORDINALITY AS l(lane, start, turn)
  LEFT JOIN LATERAL (
       SELECT texts.*, (octet_length(texts.payload) + coalesce(octet_length(texts.metadata), 0))::bigint AS bytes
         FROM (
       (SELECT walk.ctid, walk.id, walk.seq, walk.created_at, walk.stored,
               CASE WHEN $6::bigint IS NOT NULL THEN walk.topic::text ELSE '' END AS topic,
               outbox_key_hash(walk.topic, walk.metadata) AS key_hash, coalesce(walk.attempts, 0) AS attempts,
               CASE WHEN $6::bigint IS NOT NULL AND (walk.stored <= $10::bigint OR $9::bool) THEN walk.metadata::text END
                   AS metadata,
               CASE WHEN $6::bigint IS NOT NULL AND (walk.stored <= $10::bigint OR $9::bool) THEN walk.payload::text END
                   AS payload
          FROM (
        SELECT o.ctid, o.id, o.seq, o.created_at, o.topic, o.metadata, o.payload, o.attempts,
               o.published_at IS NULL AND o.dead_at IS NULL AND o.next_attempt_at IS NULL AS fresh,
               pg_column_size(o.payload)::bigint * CASE WHEN pg_column_compression(o.payload) IS NULL THEN 1 ELSE 4 END
                   + coalesce(pg_column_size(o.metadata)::bigint
                              * CASE WHEN pg_column_compression(o.metadata) IS NULL THEN 1 ELSE 4 END, 0) AS stored
          FROM outboxes AS o
         WHERE outbox_lane(o.topic, o.metadata) = l.lane AND o.seq > l.start
         ORDER BY o.seq
         LIMIT $4::bigint) AS walk
         WHERE walk.fresh)
       UNION ALL
       (SELECT NULL, NULL, bound.seq, NULL, NULL, NULL, NULL, NULL, NULL, NULL
          FROM (
        SELECT o.seq
          FROM outboxes AS o
         WHERE outbox_lane(o.topic, o.metadata) = l.lane AND o.seq > l.start
         ORDER BY o.seq
        OFFSET $4::bigint - 1
         LIMIT 1) AS bound
         WHERE (SELECT s.last_value FROM outbox_sequence() AS s) - $4::bigint >= l.start)
         LIMIT ($3::int + cardinality($1) - l.turn) / cardinality($1)) AS texts) AS e ON true
