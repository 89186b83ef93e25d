-- Locks a lane, as a claim does: until this transaction ends, nobody publishes or settles an event of its keys. Waits
-- for the claim that has it now.
--
-- $1 int: the lane.
SELECT lane
  FROM outbox_lanes
 WHERE lane = $1
   FOR UPDATE
