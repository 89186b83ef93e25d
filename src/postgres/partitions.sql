-- The partitions of the outbox in the order of their months, the DEFAULT partition last: name, the days on which they
-- begin and end (NULL: no bound), whether it is DEFAULT, bytes on disk with indexes, rows by PostgreSQL's estimate
-- (NULL: none yet), what keeps it from being dropped, whether it is as a whole older than the retention, and whether it
-- may have older events at all.
--
-- The table itself is locked first, by being named: whoever wants all of it for himself waits here, and cannot come
-- between the partitions, which are looked into one by one, for a deadlock.
--
-- $1 bigint: the retention in seconds; NULL: nothing is too old.
  WITH parent AS (SELECT FROM outboxes LIMIT 0)
SELECT p.partition::text,
       to_char(nullif(p.lower_bound, '-infinity') AT TIME ZONE 'UTC', 'YYYY-MM-DD'),
       to_char(nullif(p.upper_bound, 'infinity') AT TIME ZONE 'UTC', 'YYYY-MM-DD'),
       p.is_default,
       pg_total_relation_size(c.oid),
       nullif(c.reltuples, -1)::bigint,
       coalesce(outbox_partition_holds(p.partition),
                CASE WHEN EXISTS (SELECT FROM outboxes AS o
                                   WHERE o.created_at >= p.lower_bound AND o.created_at < p.upper_bound
                                     AND o.discarded_at > now() - $1::bigint * interval '1 second')
                     THEN 'discarded' END),
       coalesce(p.upper_bound <= now() - $1::bigint * interval '1 second', false),
       coalesce(p.is_default OR p.lower_bound < now() - $1::bigint * interval '1 second', false)
  FROM outbox_partitions() AS p
  JOIN pg_class AS c ON c.relname = p.partition
  JOIN pg_inherits AS i ON i.inhrelid = c.oid AND i.inhparent = 'outboxes'::regclass
 ORDER BY p.is_default, p.lower_bound, p.partition
