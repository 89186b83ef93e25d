-- Drops a partition that is as a whole older than the retention and holds no pending or dead event. Returns 'dropped'
-- or why not: 'young', 'pending', 'dead', 'unread', 'discarded', 'locked'.
--
-- $1 text: its name. $2 bigint: the retention in seconds.
SELECT outbox_drop_partition($1::text::name, $2::bigint * interval '1 second')
