-- Sets the shared mark of a lane back before the first of the events $2 that is still fresh although a mark has passed it, and
-- counts that in sweeps, so that every instance begins there once. Returns how many are, and the seq of the first; no
-- row when none is.
--
-- Must be a statement of its own, run after the lane was locked: its snapshot then sees how the last claim ended. An
-- event that an earlier one of its key holds waits, and is left as it is.
--
-- $1 int: the lane. $2 bigint[]: seqs. $3 bigint: where this instance's reads of the lane begin. $4 bool: events wait for earlier
-- retries of their key. $5 bool: events wait for earlier dead letters of their key. $6 int: the count of sweeps for which $3
-- holds. With another one this instance begins at the shared mark: what somebody else has just found is no find of ours.
UPDATE outbox_lanes AS l
   SET settled_to = least(l.settled_to, greatest(found.first, -9223372036854775807) - 1),
       sweeps = l.sweeps + 1
  FROM (SELECT count(*) AS events, min(o.seq) AS first
          FROM outbox_sequence() AS s
         CROSS JOIN outbox_lanes AS m
         CROSS JOIN outboxes AS o
         WHERE m.lane = $1::int AND outbox_lane(o.topic, o.metadata) = $1::int AND o.seq = ANY ($2::bigint[])
           AND o.published_at IS NULL AND o.dead_at IS NULL AND o.next_attempt_at IS NULL
           AND o.seq <= greatest(CASE WHEN m.sweeps = $6::int THEN $3::bigint END,
                                 CASE WHEN m.sequence_file = s.file AND m.settled_to <= s.last_value
                                      THEN m.settled_to END)
           AND NOT ($4::bool AND EXISTS (
               SELECT FROM outboxes AS r
                WHERE outbox_key_hash(r.topic, r.metadata) = outbox_key_hash(o.topic, o.metadata) AND r.seq < o.seq
                  AND isfinite(r.next_attempt_at) IS NOT NULL AND r.published_at IS NULL AND r.dead_at IS NULL))
           AND NOT ($5::bool AND EXISTS (
               SELECT FROM outboxes AS d
                WHERE outbox_key_hash(d.topic, d.metadata) = outbox_key_hash(o.topic, o.metadata) AND d.seq < o.seq
                  AND d.dead_at IS NOT NULL AND d.discarded_at IS NULL AND d.published_at IS NULL))) AS found
 WHERE l.lane = $1::int AND found.events > 0
RETURNING found.events, found.first
