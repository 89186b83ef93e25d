-- How far the session $1 has come with building an index: what it does, and how much of it is done in percent.
SELECT phase,
       round(100.0 * greatest(blocks_done::numeric / nullif(blocks_total, 0), tuples_done::numeric / nullif(tuples_total, 0)))::int
  FROM pg_stat_progress_create_index
 WHERE pid = $1
