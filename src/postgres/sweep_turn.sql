-- Whether it is this transaction's turn to sweep, of all that ask at the same time. The turn lasts until the transaction
-- ends. See upkeep_turn.sql for the lock's name.
SELECT pg_try_advisory_xact_lock(1869968486, 'outboxes'::regclass::oid::bigint::bit(32)::int)
