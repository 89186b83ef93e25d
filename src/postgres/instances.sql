-- The instances that are connected: name, connections, how many of these have a transaction open, and lanes held. A
-- lane is held by the transaction that its row's xmax names, for as long as that one holds the lock on itself: to see
-- it takes no lock, so no claim is disturbed. Sessions of other roles show no transaction without pg_read_all_stats.
SELECT substr(a.application_name, 11), count(*), count(*) FILTER (WHERE a.xact_start IS NOT NULL),
       coalesce(sum(held.lanes), 0)::bigint
  FROM pg_stat_activity AS a
  LEFT JOIN (SELECT k.pid, count(*) AS lanes
               FROM outbox_lanes AS l
               JOIN pg_locks AS k ON k.locktype = 'transactionid' AND k.transactionid = l.xmax AND k.granted
              GROUP BY k.pid) AS held ON held.pid = a.pid
 WHERE a.datname = current_database() AND a.application_name LIKE 'pg-outbox/%' AND a.pid <> pg_backend_pid()
   AND a.application_name <> 'pg-outbox/status'
 GROUP BY 1
 ORDER BY 1
