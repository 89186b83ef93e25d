-- Writes the shared marks of lanes that nobody has claimed, as they were when their last claims ended; returns how many rows
-- changed. For an instance that stops: the next one begins there. A mark of another life of the server or the sequence, or
-- from before a find of the sweep, is not written, and none falls.
--
-- $1 int[], $2 bigint[], $3 int[]: lanes, the mark of each, and how often the sweep had found something in it. $4 bigint: the
-- file of the sequence. $5 timestamptz, $6 timestamptz: when the server was started, and its statistics began.
UPDATE outbox_lanes AS l
   SET settled_to = m.settled_to,
       sequence_file = $4::bigint,
       marked_at = statement_timestamp()
  FROM unnest($1::int[], $2::bigint[], $3::int[]) AS m(lane, settled_to, sweeps)
 CROSS JOIN outbox_sequence() AS s
 WHERE l.lane = m.lane
   AND l.lane IN (SELECT free.lane FROM outbox_lanes AS free WHERE free.lane = ANY ($1::int[]) FOR UPDATE SKIP LOCKED)
   AND l.sweeps = m.sweeps
   AND (l.settled_to < m.settled_to OR l.sequence_file <> $4::bigint)
   AND s.file = $4::bigint
   AND pg_postmaster_start_time() = $5::timestamptz
   AND pg_stat_get_bgwriter_stat_reset_time() IS NOT DISTINCT FROM $6::timestamptz
