-- The transactions that hold the lock on the sequence that nextval takes before it draws: name, and the id of the whole
-- transaction, if it has one. The ids of its savepoints are locked as well; the whole one's is the oldest. A name that ends in /0
-- is of a transaction that is over and whose locks are just being released; one that begins with -1/ is prepared.
--
-- Must be a statement of its own, run after sample.sql: see lane/writers.rs.
SELECT virtualtransaction,
       (array_agg(transactionid ORDER BY age(transactionid) DESC)
            FILTER (WHERE locktype = 'transactionid' AND mode = 'ExclusiveLock'))[1]::text::bigint AS xid
  FROM pg_locks
 WHERE granted AND virtualtransaction NOT LIKE '%/0'
 GROUP BY virtualtransaction
HAVING bool_or(locktype = 'relation' AND mode = 'RowExclusiveLock'
               AND relation = pg_get_serial_sequence('outboxes', 'seq')::regclass
               AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))
