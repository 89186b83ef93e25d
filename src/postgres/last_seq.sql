-- The last value drawn of the sequence behind outboxes.seq, 0 before the first; NULL where cursors cannot be had, as
-- there is no such sequence, or sessions draw values in advance (CACHE) and use them in later transactions.
SELECT CASE WHEN s.seqcache = 1 THEN coalesce(pg_sequence_last_value(s.seqrelid), 0) END
  FROM (SELECT pg_get_serial_sequence('outboxes', 'seq')::regclass AS seqrelid) AS own
  LEFT JOIN pg_sequence AS s USING (seqrelid)
