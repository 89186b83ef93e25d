-- What is called `outboxes`, one row: its kind and partition key (NULL: there is none), whether it has a DEFAULT
-- partition, whether something else has the name of ours, whether its lanes are those of the former shape, which took them
-- from md5, and whether an order of events was chosen.
SELECT c.relkind::text,
       pg_get_partkeydef(c.oid),
       coalesce((SELECT partdefid <> 0 FROM pg_partitioned_table WHERE partrelid = c.oid), false),
       to_regclass('outboxes_default') IS NOT NULL
           AND NOT EXISTS (SELECT FROM pg_inherits WHERE inhrelid = to_regclass('outboxes_default') AND inhparent = c.oid),
       coalesce(pg_get_function_sqlbody(to_regprocedure('outbox_lane(text, jsonb)')) LIKE '%md5(%', false),
       to_regprocedure('outbox_key(text, jsonb)') IS NOT NULL
  FROM (SELECT to_regclass('outboxes') AS oid) AS named
  LEFT JOIN pg_class c USING (oid)
