-- The partitions of the table to adopt, and their indexes, one row each (NULL: a partition without any).
SELECT quote_ident(n.nspname), p.relname::text, p.relkind = 'r', pg_size_pretty(pg_table_size(p.oid)),
       EXISTS (SELECT FROM unnest(p.reloptions) AS option WHERE option LIKE 'fillfactor=%'),
       x.relname::text, coalesce(i.indisvalid, false), whole.relname::text
  FROM pg_inherits AS part
  JOIN pg_class AS p ON p.oid = part.inhrelid
  JOIN pg_namespace AS n ON n.oid = p.relnamespace
  LEFT JOIN pg_index AS i ON i.indrelid = p.oid
  LEFT JOIN pg_class AS x ON x.oid = i.indexrelid
  LEFT JOIN pg_inherits AS attached ON attached.inhrelid = i.indexrelid
  LEFT JOIN pg_class AS whole ON whole.oid = attached.inhparent
 WHERE part.inhparent = to_regclass('outboxes')
 ORDER BY p.relname, p.oid
