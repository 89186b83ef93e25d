-- Due retries first, then fresh events that nothing holds back.
       (SELECT *
          FROM (SELECT * FROM outboxes p
                 WHERE outbox_lane(p.topic, p.metadata) = l.lane
                   AND p.published_at IS NULL AND p.dead_at IS NULL AND p.next_attempt_at <= now()
                   AND (SELECT by_retry FROM held)
                UNION ALL
                SELECT * FROM outboxes p
                 WHERE outbox_lane(p.topic, p.metadata) = l.lane
                   AND p.published_at IS NULL AND p.dead_at IS NULL
                   AND p.next_attempt_at > now() + $5::bigint * interval '1 ms'
                   AND (SELECT by_retry FROM held)
                 ORDER BY seq
                OFFSET 0) AS o
         WHERE NOT ($3::bool AND EXISTS (
               SELECT FROM outboxes r
                WHERE md5(outbox_key(r.topic, r.metadata)) = md5(outbox_key(o.topic, o.metadata)) AND r.seq < o.seq
                  AND r.published_at IS NULL AND r.dead_at IS NULL AND isfinite(r.next_attempt_at) IS NOT NULL
                  AND coalesce(r.next_attempt_at > now()
                               AND r.next_attempt_at <= now() + $5::bigint * interval '1 ms', false)))
           AND NOT ((SELECT by_dead FROM held) AND EXISTS (
               SELECT FROM outboxes d
                WHERE md5(outbox_key(d.topic, d.metadata)) = md5(outbox_key(o.topic, o.metadata)) AND d.seq < o.seq
                  AND d.published_at IS NULL AND d.dead_at IS NOT NULL AND d.discarded_at IS NULL))
         ORDER BY o.seq
         LIMIT ($2::int + cardinality($1) - l.turn) / cardinality($1))
       UNION ALL
       (SELECT *
          FROM outboxes o
         WHERE outbox_lane(o.topic, o.metadata) = l.lane
           AND o.published_at IS NULL AND o.dead_at IS NULL AND o.next_attempt_at IS NULL AND o.seq > l.cursor
           AND NOT ($3::bool AND (SELECT by_retry FROM held) AND EXISTS (
               SELECT FROM outboxes r
                WHERE md5(outbox_key(r.topic, r.metadata)) = md5(outbox_key(o.topic, o.metadata)) AND r.seq < o.seq
                  AND r.published_at IS NULL AND r.dead_at IS NULL AND isfinite(r.next_attempt_at) IS NOT NULL))
           AND NOT ((SELECT by_dead FROM held) AND EXISTS (
               SELECT FROM outboxes d
                WHERE md5(outbox_key(d.topic, d.metadata)) = md5(outbox_key(o.topic, o.metadata)) AND d.seq < o.seq
                  AND d.published_at IS NULL AND d.dead_at IS NOT NULL AND d.discarded_at IS NULL))
         ORDER BY o.seq
         LIMIT ($2::int + cardinality($1) - l.turn) / cardinality($1))
       LIMIT ($2::int + cardinality($1) - l.turn) / cardinality($1)
