-- Fresh events, while none is in retry and no dead letter holds its key; else nothing, and read_held.sql says so. What
-- read_any.sql has beyond this costs a claim half a millisecond, though it finds nothing: so many more searches are set
-- up, each in every partition.
       (SELECT *
          FROM outboxes o
         WHERE outbox_lane(o.topic, o.metadata) = l.lane
           AND o.published_at IS NULL AND o.dead_at IS NULL AND o.next_attempt_at IS NULL AND o.seq > l.cursor
           AND NOT (SELECT by_retry OR by_dead FROM held)
         ORDER BY o.seq
         LIMIT ($2::int + cardinality($1) - l.turn) / cardinality($1)
       )
