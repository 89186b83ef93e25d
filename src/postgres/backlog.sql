-- How many events are pending, in retry and dead, and how old the oldest pending one is, in microseconds.
--
-- The counts are index-only scans of the partial indexes, so what was published costs nothing; a pending
-- event costs about 0.2 us where vacuum has been, up to 1 us where it has not. The oldest event is looked
-- for among the heads of the lanes, as seq follows time closely enough. A created_at in the future or at
-- infinity counts as now.
SELECT fresh.n + retrying.n AS pending,
       retrying.n AS retrying,
       dead.n AS dead,
       (extract(epoch FROM now() - least(now(), head.oldest)) * 1000000)::bigint AS lag_us
  FROM (SELECT count(*) AS n FROM outboxes
         WHERE published_at IS NULL AND dead_at IS NULL AND next_attempt_at IS NULL) AS fresh
 CROSS JOIN (SELECT count(*) AS n FROM outboxes
              WHERE published_at IS NULL AND dead_at IS NULL AND next_attempt_at IS NOT NULL) AS retrying
 CROSS JOIN (SELECT count(*) AS n FROM outboxes
              WHERE published_at IS NULL AND dead_at IS NOT NULL AND discarded_at IS NULL) AS dead
 CROSS JOIN (
       SELECT min(first.created_at) FILTER (WHERE isfinite(first.created_at)) AS oldest
         FROM outbox_lanes AS l
        CROSS JOIN LATERAL (
              (SELECT o.created_at
                 FROM outboxes o
                WHERE outbox_lane(o.topic, o.metadata) = l.lane
                  AND o.published_at IS NULL AND o.dead_at IS NULL AND o.next_attempt_at IS NULL
                ORDER BY o.seq
                LIMIT 1)
              UNION ALL
              (SELECT min(o.created_at)
                 FROM outboxes o
                WHERE outbox_lane(o.topic, o.metadata) = l.lane
                  AND o.published_at IS NULL AND o.dead_at IS NULL AND o.next_attempt_at IS NOT NULL)) AS first) AS head
