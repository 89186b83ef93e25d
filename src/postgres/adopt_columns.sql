-- The columns of the table to adopt: name, type, NOT NULL, and whether a value comes by itself.
SELECT attname::text, format_type(atttypid, atttypmod), attnotnull, atthasdef OR attidentity <> ''
  FROM pg_attribute
 WHERE attrelid = to_regclass('outboxes') AND attnum > 0 AND NOT attisdropped
 ORDER BY attnum
