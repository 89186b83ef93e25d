-- Locks those of the lanes $1 that no other claim has locked, at most $2, and returns each with its shared mark, how often
-- the sweep has found something in it, whether its mark may be written again (once in 10 s), the three facts that
-- tell one life of the server and the sequence from another, and the version of the schema.
--
-- Lanes that another claim has locked are skipped, never waited for. What is returned of a row is its newest version. A mark that
-- was written with another file of the sequence, or that is above all numbers drawn, counts for nothing. It locks and
-- nothing more: what holds events back, and the events, are asked for by statements of their own, whose snapshots are taken
-- after the locks. A statement that locked and read at once could lock a lane that was settled a moment ago, and still see
-- its events as pending.
--
-- $1 int[]: lanes, in the order to try. $2 int: lanes at most.
SELECT locked.lane,
       CASE WHEN locked.sequence_file = s.file AND locked.settled_to <= s.last_value THEN locked.settled_to
            ELSE -9223372036854775808 END AS settled_to,
       locked.sweeps,
       locked.marked_at < statement_timestamp() - interval '10 s' AS may_mark,
       pg_postmaster_start_time() AS started, pg_stat_get_bgwriter_stat_reset_time() AS recovered, s.file,
       (SELECT coalesce(max(version), 0) FROM outbox_schema) AS version
  FROM outbox_sequence() AS s
 CROSS JOIN unnest($1::int[]) WITH ORDINALITY AS l(lane, turn)
 CROSS JOIN LATERAL (
       SELECT lanes.*
         FROM outbox_lanes AS lanes
        WHERE lanes.lane = l.lane
          FOR UPDATE SKIP LOCKED) AS locked
 LIMIT $2::int
