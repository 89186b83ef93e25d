-- Puts missing rows of outbox_lanes back and returns how many, and wakes the dispatchers if there were any. Two that do it at
-- once have each what they put back.
SELECT m.mended, CASE WHEN m.mended > 0 THEN pg_notify('outbox_events', '')::text END
  FROM (SELECT outbox_mend_lanes() AS mended OFFSET 0) AS m
