-- Names what the schema lacks of what pg-outbox needs, one row each; no row when all of it is there. The
-- wake-up trigger is not asked for: without it pg-outbox polls.
WITH needed(kind, name, present) AS (
    SELECT 'table', name, to_regclass(name) IS NOT NULL
      FROM unnest(ARRAY['outboxes', 'outbox_lanes']) AS name
    UNION ALL
    SELECT 'column', 'outboxes.' || name, EXISTS (
           SELECT FROM pg_attribute
            WHERE attrelid = to_regclass('outboxes') AND attname = name AND NOT attisdropped)
      FROM unnest(ARRAY['id', 'seq', 'created_at', 'topic', 'metadata', 'payload', 'published_at', 'attempts',
                        'last_error', 'next_attempt_at', 'dead_at', 'discarded_at', 'discarded_by',
                        'discard_reason']) AS name
    UNION ALL
    SELECT 'function', name, to_regprocedure(name) IS NOT NULL
      FROM unnest(ARRAY['outbox_key(text, jsonb)', 'outbox_lane(text, jsonb)']) AS name
    UNION ALL
    SELECT 'index', name, EXISTS (
           SELECT FROM pg_index
            WHERE indexrelid = to_regclass(name) AND indrelid = to_regclass('outboxes') AND indisvalid)
      FROM unnest(ARRAY['outboxes_fresh_by_lane', 'outboxes_retry_by_lane', 'outboxes_retry_by_key',
                        'outboxes_dead_by_key', 'outboxes_discarded_by_time']) AS name
    UNION ALL
    SELECT 'primary key of table', 'outboxes', EXISTS (
           SELECT FROM pg_index WHERE indrelid = to_regclass('outboxes') AND indisprimary AND indisvalid)
    UNION ALL
    SELECT 'DEFAULT partition of table', 'outboxes', EXISTS (
           SELECT FROM pg_partitioned_table WHERE partrelid = to_regclass('outboxes') AND partdefid <> 0)
)
SELECT kind || ' ' || name AS missing
  FROM needed
 WHERE NOT present
