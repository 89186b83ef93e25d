-- Whether it is this transaction's turn to keep the partitions up, of all that ask at the same time. The turn lasts
-- until the transaction ends. The lock is the outbox's own: a database may have several. Its
-- first half is that of no other lock of ours: ...482 is taken while a partition is made, ...483 is the sleep lock.
SELECT pg_try_advisory_xact_lock(1869968484, 'outboxes'::regclass::oid::bigint::bit(32)::int)
