-- Writes the shared marks of lanes that this transaction has locked. In the claim's own transaction, so that a mark and the
-- settles that it tells of can never disagree, whatever crashes.
--
-- $1 int[], $2 bigint[]: lanes, and the mark of each. $3 bigint: the file of the sequence for which they count.
UPDATE outbox_lanes AS l
   SET settled_to = m.settled_to,
       sequence_file = $3::bigint,
       marked_at = statement_timestamp()
  FROM unnest($1::int[], $2::bigint[]) AS m(lane, settled_to)
 WHERE l.lane = m.lane
