-- The highest version of the schema that is recorded; 0 while an adoption is not done.
SELECT coalesce(max(version), 0)
  FROM outbox_schema
