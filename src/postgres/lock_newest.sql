-- Locks the lanes, of $1, of fresh events above $2, and returns what lock_lanes.sql returns, a row for each event: of $3
-- events at most, and none of a lane that another claim has locked.
--
-- For a claimer that was just woken, as a few events have come: a look searches every lane in every partition, and lock_lanes.sql
-- then locks what was found. This goes through each partition's index once, and is a round trip less. It is a hint: it
-- does not ask what may hold events back, and begins at the lowest of the lanes' marks, which must be near.
--
-- $1 int[]: lanes. $2 bigint: the lowest of their marks. $3 int: events at most.
SELECT locked.lane,
       CASE WHEN locked.sequence_file = s.file AND locked.settled_to <= s.last_value THEN locked.settled_to
            ELSE -9223372036854775808 END AS settled_to,
       locked.sweeps,
       locked.marked_at < statement_timestamp() - interval '10 s' AS may_mark,
       pg_postmaster_start_time() AS started, pg_stat_get_bgwriter_stat_reset_time() AS recovered, s.file,
       (SELECT coalesce(max(version), 0) FROM outbox_schema) AS version
  FROM outbox_sequence() AS s
 CROSS JOIN (
       SELECT outbox_lane(o.topic, o.metadata) AS lane
         FROM outboxes AS o
        WHERE outbox_lane(o.topic, o.metadata) = ANY ($1::int[]) AND o.seq > $2::bigint
          AND o.published_at IS NULL AND o.dead_at IS NULL AND o.next_attempt_at IS NULL
        LIMIT $3::int) AS found
 CROSS JOIN LATERAL (
       SELECT lanes.*
         FROM outbox_lanes AS lanes
        WHERE lanes.lane = found.lane
          FOR UPDATE SKIP LOCKED) AS locked
