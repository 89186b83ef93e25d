-- How many events were ever written, those of transactions that were rolled back included.
SELECT coalesce(pg_sequence_last_value(pg_get_serial_sequence('outboxes', 'seq')::regclass), 0)
