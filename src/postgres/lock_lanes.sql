-- Locks those of the lanes $1 that no other claim has locked, at most $2, and returns them with the two times that
-- tell one life of the server from another (see server_life in postgres.rs).
--
-- Lanes that another claim has locked are skipped, never waited for. It locks and nothing more: the events are read
-- by a statement of its own (read_before.sql), whose snapshot is taken after the locks.
--
-- $1 int[]: lanes, in the order to try. $2 int: lanes at most.
SELECT locked.lane, pg_postmaster_start_time() AS started, pg_stat_get_bgwriter_stat_reset_time() AS recovered
  FROM unnest($1::int[]) WITH ORDINALITY AS l(lane, turn)
 CROSS JOIN LATERAL (
       SELECT lanes.lane
         FROM outbox_lanes AS lanes
        WHERE lanes.lane = l.lane
          FOR UPDATE SKIP LOCKED) AS locked
 LIMIT $2::int
