-- The partitions of the outbox in the order of their months, the DEFAULT partition last: name, and what is the same for as long
-- as nothing was written in it. That is made of the server's counts of rows inserted, updated and deleted, and of what
-- says that they began anew; NULL where the server does not count.
SELECT p.partition::text,
       CASE WHEN current_setting('track_counts')::boolean
            THEN concat_ws(' ', c.oid, pg_stat_get_tuples_inserted(c.oid), pg_stat_get_tuples_updated(c.oid),
                           pg_stat_get_tuples_deleted(c.oid), extract(epoch FROM d.stats_reset),
                           extract(epoch FROM pg_postmaster_start_time()),
                           extract(epoch FROM pg_stat_get_bgwriter_stat_reset_time())) END AS written
  FROM outbox_partitions() AS p
  JOIN pg_class AS c ON c.relname = p.partition
  JOIN pg_inherits AS i ON i.inhrelid = c.oid AND i.inhparent = 'outboxes'::regclass
  LEFT JOIN pg_stat_database AS d ON d.datname = current_database()
 ORDER BY p.is_default, p.lower_bound, p.partition
