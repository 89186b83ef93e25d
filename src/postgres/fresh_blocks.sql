-- How many events of 2,048 blocks of a partition are fresh, wherever the marks stand, and the block to go on from, which is NULL at
-- the end.
--
-- $1 text: its name. $2 bigint: the block to begin with.
SELECT fresh, next_block
  FROM outbox_sweep_partition($1::text::name, $2, 2048, NULL, false, false)
