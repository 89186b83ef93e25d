-- The transaction that has kept vacuum from the outbox for longest, if there is one: what it is, the application's and
-- the role's name, its state, and its age in seconds. What it runs is left out: statements hold payloads. Sessions of
-- other roles are seen only with the rights of pg_read_all_stats; prepared transactions always. An autovacuum keeps no
-- other from its work.
SELECT what, application, role, state, seconds
  FROM (SELECT 'session ' || pid, coalesce(application_name, ''), coalesce(usename::text, ''), coalesce(state, ''),
               extract(epoch FROM clock_timestamp() - xact_start)::float8
          FROM pg_stat_activity
         WHERE datname = current_database() AND pid <> pg_backend_pid()
           AND backend_type IS DISTINCT FROM 'autovacuum worker'
           AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL)
        UNION ALL
        SELECT 'prepared transaction ' || gid, '', owner::text, 'prepared',
               extract(epoch FROM clock_timestamp() - prepared)::float8
          FROM pg_prepared_xacts
         WHERE database = current_database()) AS held(what, application, role, state, seconds)
 WHERE seconds IS NOT NULL
 ORDER BY seconds DESC
 LIMIT 1
