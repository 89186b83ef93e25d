-- Looks into the lanes $1, without locking anything: returns each, whether a claim of it would find a fresh event or reach its
-- bound, whether anything at all is in retry, and what tells one life of the server and the sequence from another.
--
-- It walks over $4 entries of a lane's index at most. Where it found nothing in so many, a claim goes on from there.
--
-- A lane begins where its next claim would: at the higher of its shared mark and the mark $2, which counts for nothing if the sweep
-- has found something since.
--
-- $1 int[]: lanes. $2 bigint[]: this instance's marks. $3 int[]: how often the sweep had found something in each, as far as
-- this instance knows; -1 where it does not. $4 bigint: entries at most.
SELECT l.lane,
       (SELECT true
          FROM (SELECT walked.fresh, row_number() OVER (ROWS UNBOUNDED PRECEDING) AS place
                  FROM (SELECT o.published_at IS NULL AND o.dead_at IS NULL AND o.next_attempt_at IS NULL AS fresh
                          FROM outboxes AS o
                         WHERE outbox_lane(o.topic, o.metadata) = l.lane AND o.seq > l.start
                         ORDER BY o.seq
                         LIMIT $4::bigint) AS walked) AS walk
         WHERE walk.fresh OR walk.place = $4::bigint
         LIMIT 1) IS NOT NULL AS claimable,
       (SELECT EXISTS (SELECT FROM outboxes WHERE next_attempt_at IS NOT NULL)) AS any_in_retry,
       pg_postmaster_start_time() AS started, pg_stat_get_bgwriter_stat_reset_time() AS recovered, s.file
  FROM outbox_sequence() AS s
 CROSS JOIN LATERAL (
       SELECT known.lane,
              CASE WHEN m.sweeps = known.sweeps THEN greatest(known.mark, shared.mark) ELSE shared.mark END AS start
         FROM unnest($1::int[], $2::bigint[], $3::int[]) AS known(lane, mark, sweeps)
         LEFT JOIN outbox_lanes AS m ON m.lane = known.lane
        CROSS JOIN LATERAL (
              SELECT CASE WHEN m.sequence_file = s.file AND m.settled_to <= s.last_value THEN m.settled_to
                          ELSE -9223372036854775808 END AS mark) AS shared
       OFFSET 0) AS l
