-- The months that want a partition, by their first day.
--
-- $1 int: how many months after this one.
SELECT to_char(month, 'YYYY-MM-DD')
  FROM outbox_missing_partitions($1) AS month
 ORDER BY month
