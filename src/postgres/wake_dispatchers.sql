-- Wakes the dispatchers that listen, once this transaction commits.
SELECT pg_notify('outbox_events', '')
