-- Looks into the lanes $1, without locking anything, and returns each, in their order, with its first fresh event above
-- its cursor. Only while no event is in retry and no dead letter holds its key; else nothing, and find_lanes.sql says
-- more. What that has beyond this costs a look 0.2 of 0.4 ms, though it finds nothing: so many more searches are set up.
--
-- $1 int[]: lanes. $2 bigint[]: their cursors. $3, $4, $5: as in find_lanes.sql.
SELECT l.lane, (
       SELECT o.seq
         FROM outboxes o
        WHERE outbox_lane(o.topic, o.metadata) = l.lane
          AND o.published_at IS NULL AND o.dead_at IS NULL AND o.next_attempt_at IS NULL AND o.seq > l.cursor
        ORDER BY o.seq
        LIMIT 1) AS first_fresh
  FROM unnest($1::int[], $2::bigint[]) WITH ORDINALITY AS l(lane, cursor, turn)
 WHERE NOT (SELECT by_retry OR by_dead FROM held)
 ORDER BY turn
