-- The first half of a sample: what tells one life of the server and the sequence from another, the last number drawn, the
-- version of the schema, how many lanes there are, and what the ids of transactions count from. open_writers.sql is
-- the second, run after it: see lane/writers.rs.
SELECT pg_postmaster_start_time() AS started, pg_stat_get_bgwriter_stat_reset_time() AS recovered, s.file, s.last_value,
       (SELECT coalesce(max(version), 0) FROM outbox_schema) AS version, (SELECT count(*) FROM outbox_lanes) AS lanes,
       pg_snapshot_xmax(pg_current_snapshot())::text::bigint AS next_xid
  FROM outbox_sequence() AS s
