-- Names what the schema lacks of what pg-outbox needs, one row each: what is wrong, and whether `migrate --adopt` is what
-- mends it. No row when all of it is there. The wake-up trigger is not asked for: without it pg-outbox polls.
WITH needed(kind, name, adopting, present) AS (
    SELECT 'table', name, false, to_regclass(name) IS NOT NULL
      FROM unnest(ARRAY['outboxes', 'outbox_lanes', 'outbox_schema']) AS name
    UNION ALL
    SELECT 'column', 'outboxes.' || name, true, EXISTS (
           SELECT FROM pg_attribute
            WHERE attrelid = to_regclass('outboxes') AND attname = name AND NOT attisdropped)
      FROM unnest(ARRAY['id', 'seq', 'created_at', 'topic', 'metadata', 'payload', 'published_at', 'attempts',
                        'last_error', 'next_attempt_at', 'dead_at', 'discarded_at', 'discarded_by',
                        'discard_reason']) AS name
    UNION ALL
    SELECT 'column', 'outbox_lanes.' || name, false, EXISTS (
           SELECT FROM pg_attribute
            WHERE attrelid = to_regclass('outbox_lanes') AND attname = name AND NOT attisdropped)
      FROM unnest(ARRAY['settled_to', 'sequence_file', 'marked_at', 'sweeps']) AS name
    UNION ALL
    SELECT 'function', name, false, to_regprocedure(name) IS NOT NULL
      FROM unnest(ARRAY['outbox_key(text, jsonb)', 'outbox_key_hash(text, jsonb)', 'outbox_lane(text, jsonb)',
                        'outbox_sequence()', 'outbox_mend_lanes()']) AS name
    UNION ALL
    SELECT 'index', name, true, EXISTS (
           SELECT FROM pg_index
            WHERE indexrelid = to_regclass(name) AND indrelid = to_regclass('outboxes') AND indisvalid)
      FROM unnest(ARRAY['outboxes_by_lane', 'outboxes_retry_by_lane', 'outboxes_retry_by_key',
                        'outboxes_dead_by_key', 'outboxes_discarded_by_time']) AS name
    UNION ALL
    SELECT 'primary key of table', 'outboxes', false, EXISTS (
           SELECT FROM pg_index WHERE indrelid = to_regclass('outboxes') AND indisprimary AND indisvalid)
    UNION ALL
    SELECT 'DEFAULT partition of table', 'outboxes', true, EXISTS (
           SELECT FROM pg_partitioned_table WHERE partrelid = to_regclass('outboxes') AND partdefid <> 0)
)
SELECT kind || ' ' || name || ' is missing' AS problem, adopting
  FROM needed
 WHERE NOT present
