-- Whether somebody else has a claim open. Should it be released, or its instance die, its events are there again.
--
-- Told by the lock on outbox_lanes that FOR UPDATE takes, which is there to see for every role, while row locks are not.
-- Databases made from one template give their tables the same oid, so it takes the database to tell them apart.
SELECT EXISTS (SELECT FROM pg_locks
                WHERE locktype = 'relation' AND relation = 'outbox_lanes'::regclass
                  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
                  AND mode = 'RowShareLock' AND granted AND pid <> pg_backend_pid())
