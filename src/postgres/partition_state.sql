-- For how many days from now there are partitions without a gap, and how many rows the DEFAULT partition has, counted
-- up to 100,000.
SELECT days_ahead, default_rows
  FROM outbox_partition_state()
