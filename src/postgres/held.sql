-- What may hold events back, found out once a statement: a retry anywhere, or, where $4 says that it matters, a dead
-- letter. What follows are find_fresh.sql, find_lanes.sql or read_before.sql.
  WITH held AS MATERIALIZED (
       SELECT EXISTS (SELECT FROM outboxes
                       WHERE published_at IS NULL AND dead_at IS NULL AND next_attempt_at IS NOT NULL) AS by_retry,
              $4::bool AND EXISTS (SELECT FROM outboxes
                                    WHERE published_at IS NULL AND dead_at IS NOT NULL
                                      AND discarded_at IS NULL) AS by_dead)
