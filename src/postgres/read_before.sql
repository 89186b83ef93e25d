-- Reads the events of the lanes $1, which this transaction has locked. Between this file and read_after.sql stands
-- what picks them: read_any.sql or read_fresh.sql.
--
-- Each of the k lanes gives up to its share of $2 events, $2 / k, in seq order, so that what is left out of a key is
-- always its tail. Together they stay within $6 bytes of payload and metadata, but for the very first event ($9). Where
-- bytes cut a lane or the claim short, the first event left out comes as a row with a NULL payload.
--
-- Bytes are cut twice. Each lane first (`sized`), by the stored size, which costs nothing to know
-- (compressed values count four times): what does not fit the lane's share of $6 is neither detoasted nor
-- made text. Then all of them (`counted`), by the exact size of the text, which is made once: OFFSET 0
-- keeps the planner from making it again. The stored size says little of the text: a number such as 1e131071 takes
-- 12 bytes and prints as 131,072. So an event of which the text is over $8 stays behind, whole but for its size, which
-- is all that is needed to refuse it; and a key is read as its md5 where it is long.
--
-- For 1,000 events of 450 B: 5 ms; 14 ms while some event is in retry, as each one's key is looked up.
--
-- Fresh events are read from above their lane's cursor. Where held is true, an event may have been passed over
-- because a retry or a dead letter holds its key; left_out.sql finds the first of them.
--
-- $1 int[]: lanes. $2 int: events at most. $3, $4, $5: as in find_lanes.sql. $6 bigint: bytes at most. $7 bigint[]:
-- the lanes' cursors. $8 bigint: bytes that a payload, or a metadata, has at most; NULL: no texts at all. $9 bool: the
-- very first event comes whatever its size; else it is left out like any other that does not fit.
SELECT lane, id, seq, created_at, topic, key, attempts, in_retry,
       CASE WHEN bytes_so_far <= $6 OR place = 1 AND $9 THEN metadata END AS metadata,
       CASE WHEN bytes_so_far <= $6 OR place = 1 AND $9 THEN payload END AS payload,
       (SELECT by_retry OR by_dead FROM held) AS held,
       CASE WHEN bytes_so_far <= $6 OR place = 1 AND $9 THEN oversize END AS oversize
  FROM (
SELECT texts.*,
       sum(bytes) OVER (ROWS UNBOUNDED PRECEDING) AS bytes_so_far,
       row_number() OVER (ROWS UNBOUNDED PRECEDING) AS place
  FROM (
SELECT lane, id, seq, created_at, topic, attempts, in_retry,
       CASE WHEN octet_length(key) <= 255 THEN key ELSE md5(key) END AS key,
       CASE WHEN fits THEN metadata END AS metadata,
       CASE WHEN fits THEN payload END AS payload,
       CASE WHEN fits THEN coalesce(octet_length(payload), 0) + coalesce(octet_length(metadata), 0) ELSE 0 END AS bytes,
       CASE WHEN NOT fits THEN octet_length(payload)::bigint + coalesce(octet_length(metadata), 0) END AS oversize
  FROM (
SELECT printed.*, greatest(octet_length(payload), octet_length(metadata), 0) <= $8::bigint AS fits
  FROM (
SELECT l.lane, e.id, e.seq, e.created_at, coalesce(e.attempts, 0) AS attempts,
       e.next_attempt_at IS NOT NULL AS in_retry, CASE WHEN $8::bigint IS NOT NULL THEN e.topic ELSE '' END AS topic,
       CASE WHEN $8::bigint IS NOT NULL THEN outbox_key(e.topic, e.metadata) ELSE '' END AS key,
       CASE WHEN $8::bigint IS NOT NULL AND (e.stored_so_far <= $6::bigint / cardinality($1) OR e.place = 1)
            THEN e.metadata::text END AS metadata,
       CASE WHEN $8::bigint IS NOT NULL AND (e.stored_so_far <= $6::bigint / cardinality($1) OR e.place = 1)
            THEN e.payload::text END AS payload
  FROM unnest($1::int[], $7::bigint[]) WITH ORDINALITY AS l(lane, cursor, turn)
 CROSS JOIN LATERAL (
SELECT sized.*,
       sum(stored) OVER (ROWS UNBOUNDED PRECEDING) AS stored_so_far,
       row_number() OVER (ROWS UNBOUNDED PRECEDING) AS place
  FROM (
SELECT picked.*,
       pg_column_size(payload) * CASE WHEN pg_column_compression(payload) IS NULL THEN 1 ELSE 4 END
           + coalesce(pg_column_size(metadata) * CASE WHEN pg_column_compression(metadata) IS NULL THEN 1 ELSE 4 END, 0)
           AS stored
  FROM (
