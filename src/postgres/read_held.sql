 UNION ALL
-- A row of NULLs: something may hold events back, and nothing was read.
SELECT NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, true, NULL
  FROM held
 WHERE by_retry OR by_dead
