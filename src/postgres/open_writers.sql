-- The transactions that hold the lock that INSERT, UPDATE and DELETE take on the outbox or a partition, by a name that
-- no other transaction has. A prepared transaction's name begins with -1/ and is not the one it had before.
--
-- Must be a statement of its own, run after last_seq.sql: see lane/marks.rs.
SELECT DISTINCT virtualtransaction, virtualtransaction LIKE '-1/%' AS prepared
  FROM pg_locks
 WHERE locktype = 'relation' AND mode = 'RowExclusiveLock' AND granted
   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND relation IN (SELECT relid FROM pg_partition_tree('outboxes'))
