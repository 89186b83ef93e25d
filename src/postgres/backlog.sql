-- About how many events are pending, and how many in retry and dead, and how old the oldest pending one is, in microseconds;
-- and how many lanes have no row.
--
-- Pending ones are counted lane by lane above the lane's mark, so that what was published costs nothing, and up to $2
-- entries of each lane's index (some 2 us each). Where a lane has more, the rest is estimated: as many entries for the numbers
-- up to the last one drawn as were walked over, and as many of them pending as of 16 that are looked up in between. (Marks may be
-- far behind, as after an adoption: then all that was walked over is published, and what is pending comes last.) Retries
-- and dead letters are counted in their own indexes. A created_at in the future or at infinity counts as now.
--
-- $1 bigint[]: where each lane begins, by lane, as this instance knows it; empty: at the shared mark. $2 bigint: entries of a
-- lane at most.
  WITH walks AS MATERIALIZED (
       SELECT l.lane, m.lane IS NULL AS missing, w.*, s.last_value AS until, (s.last_value - w.last) / 16.0 AS stride
         FROM outbox_sequence() AS s
        CROSS JOIN generate_series(0, 63) AS l(lane)
         LEFT JOIN outbox_lanes AS m ON m.lane = l.lane
        CROSS JOIN LATERAL (
              SELECT count(*) AS walked, count(*) FILTER (WHERE walked.fresh) AS fresh,
                     min(walked.seq) AS first, max(walked.seq) AS last,
                     min(walked.created_at) FILTER (WHERE walked.fresh AND isfinite(walked.created_at)) AS oldest
                FROM (SELECT o.seq, o.created_at,
                             o.published_at IS NULL AND o.dead_at IS NULL AND o.next_attempt_at IS NULL AS fresh
                        FROM outboxes AS o
                       WHERE outbox_lane(o.topic, o.metadata) = l.lane
                         AND o.seq > greatest(($1::bigint[])[l.lane + 1],
                                              CASE WHEN m.sequence_file = s.file AND m.settled_to <= s.last_value
                                                   THEN m.settled_to ELSE -9223372036854775808 END)
                       ORDER BY o.seq
                       LIMIT $2::bigint) AS walked) AS w),
       rests AS MATERIALIZED (
       SELECT walks.walked::float8 / (walks.last - walks.first + 1) * (walks.until - walks.last)
                  * count(*) FILTER (WHERE found.fresh) / 16 AS fresh,
              min(found.created_at) FILTER (WHERE found.fresh AND isfinite(found.created_at)) AS oldest
         FROM walks
        CROSS JOIN generate_series(0, 15) AS n
         LEFT JOIN LATERAL (
              SELECT o.created_at, o.published_at IS NULL AND o.dead_at IS NULL AND o.next_attempt_at IS NULL AS fresh
                FROM outboxes AS o
               WHERE outbox_lane(o.topic, o.metadata) = walks.lane
                 AND o.seq > walks.last + floor(walks.stride * n)::bigint
                 AND o.seq <= walks.last + ceil(walks.stride * (n + 1))::bigint
               ORDER BY o.seq
               LIMIT 1) AS found ON true
        WHERE walks.walked >= $2::bigint AND walks.until > walks.last
        GROUP BY walks.lane, walks.walked, walks.first, walks.last, walks.until)
SELECT (counted.n + retrying.n)::bigint AS pending,
       retrying.n AS retrying,
       dead.n AS dead,
       (extract(epoch FROM now() - least(now(), counted.oldest, first_retry.oldest)) * 1000000)::bigint AS lag_us,
       (SELECT count(*) FROM walks WHERE missing) AS missing_lanes
  FROM (SELECT coalesce(round(sum(fresh)), 0) AS n, min(oldest) AS oldest
          FROM (SELECT fresh::float8, oldest FROM walks UNION ALL SELECT fresh, oldest FROM rests) AS parts) AS counted
 CROSS JOIN (SELECT count(*) AS n FROM outboxes
              WHERE next_attempt_at IS NOT NULL AND published_at IS NULL AND dead_at IS NULL) AS retrying
 CROSS JOIN (SELECT count(*) AS n FROM outboxes
              WHERE dead_at IS NOT NULL AND discarded_at IS NULL AND published_at IS NULL) AS dead
 CROSS JOIN (SELECT min(created_at) FILTER (WHERE isfinite(created_at)) AS oldest
               FROM (SELECT created_at FROM outboxes
                      WHERE next_attempt_at IS NOT NULL AND published_at IS NULL AND dead_at IS NULL
                      LIMIT 10000) AS retries) AS first_retry
