-- The first fresh event of each of the lanes $1 that read_any.sql has passed over, where there is one.
--
-- It asks for what is there and was not read, for whatever reason, so that a cursor moves past nothing that this
-- claim does not know. The search ends at the first such event.
--
-- $1 int[]: lanes, which this transaction has locked. $2 bigint[]: their cursors. $3 bigint[]: up to which seq each
-- was read. $4 bigint[]: the seqs that were read, of all lanes.
SELECT l.lane, (SELECT o.seq
                  FROM outboxes o
                 WHERE outbox_lane(o.topic, o.metadata) = l.lane
                   AND o.published_at IS NULL AND o.dead_at IS NULL AND o.next_attempt_at IS NULL
                   AND o.seq > l.cursor AND o.seq <= l.read_to
                   AND o.seq <> ALL ($4::bigint[])
                 ORDER BY o.seq
                 LIMIT 1) AS seq
  FROM unnest($1::int[], $2::bigint[], $3::bigint[]) AS l(lane, cursor, read_to)
