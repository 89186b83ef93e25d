-- Deletes published events that are older than the retention from some blocks of a partition. Returns how many, and
-- the block to go on from, NULL at the end. Never a pending event or a dead letter.
--
-- $1 text: name of the partition. $2 bigint: the block to begin with. $3 bigint: the retention in seconds.
SELECT deleted, next_block
  FROM outbox_clean_partition($1::text::name, $2, $3::bigint * interval '1 second')
