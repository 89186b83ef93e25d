-- The busiest topics: topic, events pending (those in retry included), in retry, and dead. Looks at up to 100,000
-- events of each kind, so that a large backlog is a sample and costs no more.
--
-- $1 bigint: how many topics.
SELECT topic::text, sum(pending)::bigint, sum(retrying)::bigint, sum(dead)::bigint
  FROM ((SELECT topic, 1, 0, 0 FROM outboxes
          WHERE published_at IS NULL AND dead_at IS NULL AND next_attempt_at IS NULL LIMIT 100000)
        UNION ALL
        (SELECT topic, 1, 1, 0 FROM outboxes
          WHERE published_at IS NULL AND dead_at IS NULL AND next_attempt_at IS NOT NULL LIMIT 100000)
        UNION ALL
        (SELECT topic, 0, 0, 1 FROM outboxes
          WHERE published_at IS NULL AND dead_at IS NOT NULL AND discarded_at IS NULL
          LIMIT 100000)) AS found(topic, pending, retrying, dead)
 GROUP BY topic
 ORDER BY 2 DESC, 4 DESC, 1
 LIMIT $1
