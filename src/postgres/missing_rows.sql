-- What is missing of the rows that the schema came with: how many of the 64 lanes have none, whose events would never be claimed,
-- and whether no version is recorded, without which nothing is claimed.
SELECT 64 - count(*), NOT EXISTS (SELECT FROM outbox_schema)
  FROM outbox_lanes
