-- Names around the table to adopt, by kind: checks, indexes of the whole, columns of the primary key, and functions that
-- are called as two of ours.
SELECT 'check', conname::text
  FROM pg_constraint
 WHERE conrelid = to_regclass('outboxes') AND contype = 'c'
UNION ALL
SELECT 'index', c.relname::text
  FROM pg_index i
  JOIN pg_class c ON c.oid = i.indexrelid
 WHERE i.indrelid = to_regclass('outboxes')
UNION ALL
SELECT 'key', a.attname::text
  FROM pg_index i
  JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)
 WHERE i.indrelid = to_regclass('outboxes') AND i.indisprimary
UNION ALL
SELECT 'function', oid::regprocedure::text
  FROM pg_proc
 WHERE pronamespace = quote_ident(current_schema())::regnamespace
   AND proname IN ('create_monthly_partition', 'cleanup_old_outbox_events')
