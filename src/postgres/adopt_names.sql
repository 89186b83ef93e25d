-- Names around the table to adopt, by kind: checks, indexes of the whole, columns of the primary key, functions that are
-- called as two of ours, and indexes, of the whole or of one partition alone, that mention a column which every settle changes.
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
UNION ALL
SELECT DISTINCT 'touched', i.indexrelid::regclass::text
  FROM pg_partition_tree(to_regclass('outboxes')) AS part
  JOIN pg_index AS i ON i.indrelid = part.relid
  JOIN pg_class AS c ON c.oid = i.indexrelid AND NOT c.relispartition
  JOIN pg_depend AS d ON d.classid = 'pg_class'::regclass AND d.objid = i.indexrelid
                     AND d.refclassid = 'pg_class'::regclass AND d.refobjid = i.indrelid
  JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = d.refobjsubid
 WHERE a.attname IN ('published_at', 'attempts', 'last_error')
