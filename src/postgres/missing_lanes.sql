-- How many of the 64 lanes have no row: events of those would never be claimed.
SELECT 64 - count(*)
  FROM outbox_lanes
