-- Looks for events that are pending although a mark of their lane has passed them, in some blocks of a partition: lane, seq and
-- the hash of the key of each, as three arrays; how many events are fresh in these blocks; and the block to go on
-- from, NULL at the end.
--
-- $1 text: name of the partition. $2 bigint: the block to begin with. $3 int: blocks. $4 bigint[]: where this instance's reads of each
-- lane begin, by lane. $5 bool: events wait for earlier retries of their key. $6 bool: events wait for earlier dead
-- letters of their key.
SELECT coalesce(lanes, '{}'), coalesce(seqs, '{}'), coalesce(key_hashes, '{}'), fresh, next_block
  FROM outbox_sweep_partition($1::text::name, $2, $3, $4, $5, $6)
