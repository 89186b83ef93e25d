-- The busiest topics: topic, events pending (those in retry included), in retry, and dead. Looks at the first and the last 1,000
-- entries of each lane above its mark, and at up to 100,000 events in retry and dead, so that a large backlog is a sample and
-- costs no more. (The last ones, as marks may be far behind, and what is pending comes last.)
--
-- $1 bigint: how many topics.
SELECT topic::text, sum(pending)::bigint, sum(retrying)::bigint, sum(dead)::bigint
  FROM ((SELECT ends.topic, 1, 0, 0
           FROM outbox_sequence() AS s
          CROSS JOIN generate_series(0, 63) AS l(lane)
           LEFT JOIN outbox_lanes AS m ON m.lane = l.lane
          CROSS JOIN LATERAL (
                SELECT CASE WHEN m.sequence_file = s.file AND m.settled_to <= s.last_value
                            THEN m.settled_to ELSE -9223372036854775808 END AS mark) AS above
          CROSS JOIN LATERAL (
                (SELECT o.seq, o.id, o.topic, o.published_at IS NULL AND o.dead_at IS NULL AND o.next_attempt_at IS NULL AS fresh
                   FROM outboxes AS o
                  WHERE outbox_lane(o.topic, o.metadata) = l.lane AND o.seq > above.mark
                  ORDER BY o.seq
                  LIMIT 1000)
                UNION
                (SELECT o.seq, o.id, o.topic, o.published_at IS NULL AND o.dead_at IS NULL AND o.next_attempt_at IS NULL AS fresh
                   FROM outboxes AS o
                  WHERE outbox_lane(o.topic, o.metadata) = l.lane AND o.seq > above.mark
                  ORDER BY o.seq DESC
                  LIMIT 1000)) AS ends
          WHERE ends.fresh)
        UNION ALL
        (SELECT topic, 1, 1, 0 FROM outboxes
          WHERE next_attempt_at IS NOT NULL AND published_at IS NULL AND dead_at IS NULL LIMIT 100000)
        UNION ALL
        (SELECT topic, 0, 0, 1 FROM outboxes
          WHERE dead_at IS NOT NULL AND discarded_at IS NULL AND published_at IS NULL
          LIMIT 100000)) AS found(topic, pending, retrying, dead)
 GROUP BY topic
 ORDER BY 2 DESC, 4 DESC, 1
 LIMIT $1
