-- The instances that are connected to this database, whichever outbox of it they work on: name, and connections.
SELECT substr(application_name, 11), count(*)
  FROM pg_stat_activity
 WHERE datname = current_database() AND application_name LIKE 'pg-outbox/%'
   AND application_name NOT IN ('pg-outbox/migrate', 'pg-outbox/status')
 GROUP BY 1
 ORDER BY 1
