-- Reads the events in retry of the lanes $1, which this transaction has locked, that are due and have no retry ahead of them in
-- their key that is not: of each lane up to its share of $3, in the order of their seq.
--
-- A lane may have a million events in retry: it looks at up to $2 of each lane, those that are due first. `behind` is the
-- event in retry that comes right before this one in its key: whoever reads the rows takes none that is behind an event that
-- it has not taken. An event whose stored size, with that of the events before it, is over the lane's share of $5 comes without its
-- texts, but for the first one; otherwise texts are cut as in read.sql.
--
-- $1 int[]: lanes. $2 bigint: events of a lane to look at. $3 int: events at most. $4 bigint: longest backoff in ms; a retry further off
-- than that is due, as clocks jump. $5 bigint: bytes of payload and metadata that the claim may hold. $6 bigint: bytes
-- that an event has at most. $7 bool: events wait for earlier retries of their key. $8 bool: events wait for
-- earlier dead letters of their key. $9 bool: as in read.sql.
SELECT l.lane, e.ctid, e.id, e.seq, e.created_at, e.topic, e.key_hash, e.attempts, true AS fresh,
       CASE WHEN e.bytes <= $6::bigint AND (e.bytes <= $5::bigint OR $9::bool) THEN e.metadata END AS metadata,
       CASE WHEN e.bytes <= $6::bigint AND (e.bytes <= $5::bigint OR $9::bool) THEN e.payload END AS payload,
       CASE WHEN e.bytes > $6::bigint THEN e.bytes END AS oversize,
       CASE WHEN $7::bool THEN (
            SELECT r.seq
              FROM outboxes AS r
             WHERE outbox_key_hash(r.topic, r.metadata) = e.key_hash AND r.seq < e.seq
               AND isfinite(r.next_attempt_at) IS NOT NULL AND r.published_at IS NULL AND r.dead_at IS NULL
             ORDER BY r.seq DESC
             LIMIT 1) END AS behind
  FROM unnest($1::int[]) WITH ORDINALITY AS l(lane, turn)
 CROSS JOIN LATERAL (
       SELECT texts.*, (octet_length(texts.payload) + coalesce(octet_length(texts.metadata), 0))::bigint AS bytes
         FROM (
       SELECT sized.ctid, sized.id, sized.seq, sized.created_at, sized.key_hash, sized.attempts,
              CASE WHEN $6::bigint IS NOT NULL THEN sized.topic ELSE '' END AS topic,
              CASE WHEN $6::bigint IS NOT NULL AND (sized.stored_so_far <= $5::bigint / cardinality($1) OR sized.stored_so_far = sized.stored)
                   THEN sized.metadata::text END AS metadata,
              CASE WHEN $6::bigint IS NOT NULL AND (sized.stored_so_far <= $5::bigint / cardinality($1) OR sized.stored_so_far = sized.stored)
                   THEN sized.payload::text END AS payload
         FROM (
       SELECT first.*, sum(first.stored) OVER (ROWS UNBOUNDED PRECEDING) AS stored_so_far
         FROM (
       SELECT o.*, pg_column_size(o.payload) * CASE WHEN pg_column_compression(o.payload) IS NULL THEN 1 ELSE 4 END
                       + coalesce(pg_column_size(o.metadata)
                                  * CASE WHEN pg_column_compression(o.metadata) IS NULL THEN 1 ELSE 4 END, 0) AS stored
         FROM (
       (SELECT o.ctid, o.id, o.seq, o.created_at, o.topic, o.metadata, o.payload, coalesce(o.attempts, 0) AS attempts,
               outbox_key_hash(o.topic, o.metadata) AS key_hash
          FROM outboxes AS o
         WHERE outbox_lane(o.topic, o.metadata)::int2 = l.lane::int2 AND o.next_attempt_at <= now()
           AND o.published_at IS NULL AND o.dead_at IS NULL
         ORDER BY o.next_attempt_at, o.seq
         LIMIT $2::bigint)
       UNION ALL
       (SELECT o.ctid, o.id, o.seq, o.created_at, o.topic, o.metadata, o.payload, coalesce(o.attempts, 0) AS attempts,
               outbox_key_hash(o.topic, o.metadata) AS key_hash
          FROM outboxes AS o
         WHERE outbox_lane(o.topic, o.metadata)::int2 = l.lane::int2
           AND o.next_attempt_at > now() + $4::bigint * interval '1 ms'
           AND o.published_at IS NULL AND o.dead_at IS NULL
         ORDER BY o.next_attempt_at, o.seq
         LIMIT $2::bigint)) AS o
        WHERE NOT ($7::bool AND EXISTS (
              SELECT FROM outboxes AS r
               WHERE outbox_key_hash(r.topic, r.metadata) = o.key_hash AND r.seq < o.seq
                 AND isfinite(r.next_attempt_at) IS NOT NULL AND r.published_at IS NULL AND r.dead_at IS NULL
                 AND coalesce(r.next_attempt_at > now() AND r.next_attempt_at <= now() + $4::bigint * interval '1 ms', false)))
          AND NOT ($8::bool AND EXISTS (
              SELECT FROM outboxes AS d
               WHERE outbox_key_hash(d.topic, d.metadata) = o.key_hash AND d.seq < o.seq
                 AND d.dead_at IS NOT NULL AND d.discarded_at IS NULL AND d.published_at IS NULL))
        ORDER BY o.seq
        LIMIT ($3::int + cardinality($1) - l.turn) / cardinality($1)) AS first) AS sized
        LIMIT ALL OFFSET 0) AS texts) AS e
