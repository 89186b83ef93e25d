-- Which outbox this is, in words that no other one has: the server by its start, the database, and the table.
SELECT concat_ws(' ', extract(epoch FROM pg_postmaster_start_time()), current_database(), 'outboxes'::regclass::oid)
