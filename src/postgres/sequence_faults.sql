-- What is wrong with the sequence behind outboxes.seq, one row each: the fault, in words that adoption.rs knows, and the
-- sequence's name (NULL: there is none). No row when reads can rely on it.
--
-- Where a read begins rests on the last number drawn and on the lock that drawing takes (lane/writers.rs). So numbers must come
-- from the table's own sequence, rise, and be drawn one by one: with CACHE a session draws some in advance and uses
-- them in later transactions.
  WITH own AS (
       SELECT a.attrelid, a.attnum, a.attidentity,
              pg_get_serial_sequence(a.attrelid::regclass::text, 'seq')::regclass AS sequence,
              (SELECT d.refobjid::regclass
                 FROM pg_attrdef AS f
                 JOIN pg_depend AS d ON d.classid = 'pg_attrdef'::regclass AND d.objid = f.oid
                 JOIN pg_class AS s ON d.refclassid = 'pg_class'::regclass AND s.oid = d.refobjid AND s.relkind = 'S'
                WHERE f.adrelid = a.attrelid AND f.adnum = a.attnum
                LIMIT 1) AS default_sequence
         FROM pg_attribute AS a
        WHERE a.attrelid = to_regclass('outboxes') AND a.attname = 'seq' AND NOT a.attisdropped)
SELECT fault.name, coalesce(own.sequence, own.default_sequence)::text AS sequence
  FROM own
  LEFT JOIN pg_sequence AS s ON s.seqrelid = own.sequence
 CROSS JOIN LATERAL (VALUES
       ('missing', own.sequence IS NULL),
       ('elsewhere', own.sequence IS NOT NULL AND own.attidentity = '' AND own.default_sequence IS DISTINCT FROM own.sequence),
       ('falling', s.seqincrement < 0),
       ('cached', s.seqcache <> 1),
       ('cycling', s.seqcycle)) AS fault(name, is_so)
 WHERE fault.is_so
