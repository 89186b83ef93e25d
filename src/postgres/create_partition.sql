-- Makes the partition of a month, with what has fallen into DEFAULT moved into it, and returns its name.
--
-- $1 text: a day of the month, as YYYY-MM-DD.
SELECT outbox_create_partition($1::text::date)
