-- What is called `outboxes`, one row: its kind and partition key (NULL: there is none), whether it has a DEFAULT
-- partition, whether something else has the name of ours, and whether `seq` has a sequence of its own.
SELECT c.relkind::text,
       pg_get_partkeydef(c.oid),
       coalesce((SELECT partdefid <> 0 FROM pg_partitioned_table WHERE partrelid = c.oid), false),
       to_regclass('outboxes_default') IS NOT NULL
           AND NOT EXISTS (SELECT FROM pg_inherits WHERE inhrelid = to_regclass('outboxes_default') AND inhparent = c.oid),
       EXISTS (SELECT FROM pg_attribute a
                WHERE a.attrelid = c.oid AND a.attname = 'seq' AND NOT a.attisdropped
                  AND pg_get_serial_sequence(a.attrelid::regclass::text, 'seq') IS NOT NULL
                  AND (a.atthasdef OR a.attidentity <> ''))
  FROM (SELECT to_regclass('outboxes') AS oid) AS named
  LEFT JOIN pg_class c USING (oid)
