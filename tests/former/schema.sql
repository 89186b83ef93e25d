-- The outbox as it was before the first release (version 1), for the tests that adopt it. Nothing else uses this.
-- The outbox: the table that applications insert into, the lanes that pg-outbox claims, and the functions
-- both use. Needs PostgreSQL 14 or later and a role that may create in the schema; everything lands in the
-- first schema of the search_path. Apply it with either of
--
--     psql -v ON_ERROR_STOP=1 -f schema/001_outbox.sql
--     pg-outbox migrate
--
-- The second run changes nothing and locks nothing, so that it can be part of every deployment; two runs at
-- once wait for each other. All of it happens in one transaction.
--
-- What an ordering key is, is decided here once, by the setting pg_outbox.order of the session that runs
-- this: 'key' (the default: the metadata field "ordering-key", else the topic), 'topic', or 'all' (one
-- order over every event). With psql: PGOPTIONS='-c pg_outbox.order=topic' psql ... -f ...

BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;

DO $check$
BEGIN
    IF current_setting('server_version_num')::int < 140000 THEN
        RAISE EXCEPTION 'pg-outbox needs PostgreSQL 14 or later; this server is %', current_setting('server_version')
            USING ERRCODE = 'feature_not_supported';
    END IF;
    IF current_schema() IS NULL THEN
        RAISE EXCEPTION 'no schema to create the outbox in: the search_path is %', current_setting('search_path')
            USING ERRCODE = 'invalid_schema_name',
                  HINT = 'Create the schema, or set search_path to one that exists.';
    END IF;
    -- Two migrations at once: the second waits here, and what follows finds the work done.
    PERFORM pg_advisory_xact_lock(8247343699905503587);
END
$check$;

DO $migration$
DECLARE
    ordering text := coalesce(nullif(current_setting('pg_outbox.order', true), ''), 'key');
    key_expression text;
    -- `pg-outbox migrate --adopt` runs this twice, around what it does to a table that is there: with 'prepare' it
    -- adds what the indexes need, with 'finish' everything else.
    adopting text := coalesce(nullif(current_setting('pg_outbox.adopt', true), ''), 'no');
BEGIN
    IF to_regclass(format('%I.outbox_schema', current_schema())) IS NOT NULL THEN
        IF EXISTS (SELECT FROM outbox_schema WHERE version = 1) THEN
            RETURN;
        END IF;
    END IF;

    IF adopting = 'no' AND to_regclass(format('%I.outboxes', current_schema())) IS NOT NULL THEN
        RAISE EXCEPTION 'schema % has a table outboxes that this migration did not create', current_schema()
            USING ERRCODE = 'duplicate_table',
                  HINT = 'If it is an outbox, pg-outbox migrate --adopt takes it over as it is (--dry-run shows how). '
                         'Otherwise rename it, or install the outbox into a schema of its own.';
    END IF;

    -- The body must not be a constant, also for 'all': an index on a constant cannot be searched by lane.
    key_expression := CASE ordering
        WHEN 'key' THEN $$coalesce(metadata OPERATOR(pg_catalog.->>) 'ordering-key', topic)$$
        WHEN 'topic' THEN 'topic'
        WHEN 'all' THEN $$pg_catalog.left(topic, 0)$$
    END;
    IF key_expression IS NULL THEN
        RAISE EXCEPTION 'pg_outbox.order is "%"; it must be key, topic or all', ordering
            USING ERRCODE = 'invalid_parameter_value';
    END IF;

    CREATE TABLE IF NOT EXISTS outbox_schema (
        version    int PRIMARY KEY,
        applied_at timestamptz NOT NULL DEFAULT now()
    );

    -- Key and lane ---------------------------------------------------------------------------------------
    --
    -- The planner puts the bodies in place of the calls, so an INSERT pays for an expression, not for a
    -- function. They name nothing outside pg_catalog: they run in the writer's session, whose search_path
    -- is anything, and in a restore, whose search_path is empty. The lane repeats the key's expression for
    -- that reason. md5, as hashtext may change with a major version, and a lane that changes hides events.

    -- An adoption that was interrupted has them already; what its indexes are built on must not change.
    IF to_regprocedure('outbox_key(text, jsonb)') IS NOT NULL THEN
        RETURN;
    END IF;

    EXECUTE format($sql$
        CREATE FUNCTION outbox_key(topic text, metadata jsonb) RETURNS text
        LANGUAGE sql IMMUTABLE PARALLEL SAFE
        RETURN %s
    $sql$, key_expression);

    EXECUTE format($sql$
        CREATE FUNCTION outbox_lane(topic text, metadata jsonb) RETURNS int
        LANGUAGE sql IMMUTABLE PARALLEL SAFE
        RETURN pg_catalog.get_byte(pg_catalog.decode(pg_catalog.md5(%s), 'hex'), 0) OPERATOR(pg_catalog.&) 63
    $sql$, key_expression);

    -- A time-ordered id (RFC 9562, version 7): neighbours in time are neighbours in the primary key, so a
    -- settle touches few of its pages. The text is 48 bits of milliseconds, the digit 7, 12 bits of the
    -- fraction of the millisecond, and the second half of a random id, which carries the variant.
    IF current_setting('server_version_num')::int < 180000 THEN
        CREATE FUNCTION outbox_uuid() RETURNS uuid
        LANGUAGE sql VOLATILE PARALLEL SAFE
        RETURN overlay(
            lpad(to_hex(floor(date_part('epoch', clock_timestamp()) * 4096000)::bigint), 15, '0')
                || right(encode(uuid_send(gen_random_uuid()), 'hex'), 16)
            PLACING '7' FROM 13 FOR 0
        )::uuid;
        COMMENT ON FUNCTION outbox_uuid() IS 'A time-ordered id (UUID version 7)';
        GRANT EXECUTE ON FUNCTION outbox_uuid() TO PUBLIC;
    END IF;

    -- Open to everybody, also where the default privileges are not: an INSERT calls them in the writer's name.
    GRANT EXECUTE ON FUNCTION outbox_key(text, jsonb), outbox_lane(text, jsonb) TO PUBLIC;
END
$migration$;

DO $table$
DECLARE
    default_id text := coalesce(to_regprocedure('outbox_uuid()')::text, 'pg_catalog.uuidv7()');
BEGIN
    -- There is one to adopt, or the one that this made.
    IF to_regclass(format('%I.outboxes', current_schema())) IS NOT NULL THEN
        RETURN;
    END IF;

    -- The table ------------------------------------------------------------------------------------------

    EXECUTE format($sql$
        CREATE TABLE outboxes (
            id              uuid         NOT NULL DEFAULT %s,
            seq             bigserial    NOT NULL,
            created_at      timestamptz  NOT NULL DEFAULT now(),
            topic           varchar(255) NOT NULL,
            metadata        jsonb,
            payload         jsonb        NOT NULL,
            published_at    timestamptz,
            attempts        int          DEFAULT 0,
            last_error      text,
            next_attempt_at timestamptz,
            dead_at         timestamptz,
            discarded_at    timestamptz,
            discarded_by    text,
            discard_reason  text,
            PRIMARY KEY (id, created_at),
            CONSTRAINT outboxes_metadata_is_object
                CHECK (jsonb_typeof(metadata) = 'object'),
            -- The collation makes the classes those of ASCII, which are the ones NATS looks at.
            CONSTRAINT outboxes_topic_is_literal_subject
                CHECK (topic COLLATE "C" ~ '^[^.*>[:space:][:cntrl:]]+([.][^.*>[:space:][:cntrl:]]+)*$')
        ) PARTITION BY RANGE (created_at)
    $sql$, default_id);

    -- What claims search. The planner must never have a choice: a claim's plan is kept for the life of its
    -- connection, and one made while a partition is empty would find any index as good as the other. So
    -- each search in a claim implies the predicate of one of these indexes and of no other; the odd form of
    -- the third one's is for that. None is on published_at, topic or attempts: it would cost every settle.
    --
    -- Fresh events, neither published nor dead nor in retry: the hot one. An event that is published at its
    -- first attempt is never in the others.
    CREATE INDEX outboxes_fresh_by_lane
        ON outboxes (outbox_lane(topic, metadata), seq)
        WHERE published_at IS NULL AND dead_at IS NULL AND next_attempt_at IS NULL;

    -- Events in retry by the time they are due.
    CREATE INDEX outboxes_retry_by_lane
        ON outboxes (outbox_lane(topic, metadata), next_attempt_at)
        WHERE published_at IS NULL AND dead_at IS NULL AND next_attempt_at IS NOT NULL;

    -- Events in retry by the key they hold. A key can be longer than an index entry; its md5 stands for it.
    CREATE INDEX outboxes_retry_by_key
        ON outboxes (md5(outbox_key(topic, metadata)), seq)
        WHERE published_at IS NULL AND dead_at IS NULL AND isfinite(next_attempt_at) IS NOT NULL;

    -- Dead letters by the key they hold, and for the operator who lists them. One that was discarded is none any
    -- more: it holds no key, and counts for nothing.
    CREATE INDEX outboxes_dead_by_key
        ON outboxes (md5(outbox_key(topic, metadata)), seq)
        WHERE published_at IS NULL AND dead_at IS NOT NULL AND discarded_at IS NULL;

    -- Discarded events by the time of that, for retention, and for the operator who asks what became of them.
    CREATE INDEX outboxes_discarded_by_time
        ON outboxes (discarded_at)
        WHERE discarded_at IS NOT NULL;

    -- Takes what no monthly partition takes, so that an insert never fails for want of one. Vacuum: an event
    -- is inserted once and updated once, and what the update leaves behind is what the next claim walks
    -- over, so it should go early, not when a fifth of a month is dead. fillfactor would not help: the
    -- settle changes a column that an index mentions, so no update of it can be HOT.
    CREATE TABLE outboxes_default PARTITION OF outboxes DEFAULT
        WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000,
              autovacuum_analyze_scale_factor = 0.05);

END
$table$;

DO $rest$
DECLARE
    adopting text := coalesce(nullif(current_setting('pg_outbox.adopt', true), ''), 'no');
    this_month date := (now() AT TIME ZONE 'UTC')::date;
    function text;
    commented record;
BEGIN
    IF adopting = 'prepare' OR EXISTS (SELECT FROM outbox_schema WHERE version = 1) THEN
        RETURN;
    END IF;

    -- Privileges: INSERT on the table is all that a writer needs; its number is everybody's.
    EXECUTE format('GRANT USAGE ON SEQUENCE %s TO PUBLIC', pg_get_serial_sequence('outboxes', 'seq'));

    -- The lanes ------------------------------------------------------------------------------------------
    --
    -- A claim locks rows of this table and never changes them.

    CREATE TABLE outbox_lanes (
        lane int PRIMARY KEY CHECK (lane BETWEEN 0 AND 63)
    );
    INSERT INTO outbox_lanes SELECT lane FROM generate_series(0, 63) AS lane;

    -- The wake-up ----------------------------------------------------------------------------------------
    --
    -- A transaction that notifies holds a lock of the whole database through its commit, which caps all writers
    -- together. So a statement on the table notifies only while a dispatcher sleeps. Who sleeps has an advisory
    -- lock for itself, or waits for it; here it is tried to share it, until the end of the transaction, which
    -- costs next to nothing and succeeds while nobody sleeps. A dispatcher that asks for the lock gets it once
    -- those who share it have ended, and looks for their events then, so that none is forgotten. The lock is
    -- named by a number of ours and the table's oid. Optional: without this trigger pg-outbox polls. (A
    -- transaction that notifies cannot be prepared for two-phase commit.)

    CREATE FUNCTION outbox_notify() RETURNS trigger
    LANGUAGE plpgsql AS $body$
    BEGIN
        IF NOT pg_catalog.pg_try_advisory_xact_lock_shared(1869968483, TG_RELID::int8::bit(32)::int4) THEN
            PERFORM pg_catalog.pg_notify('outbox_events', '');
        END IF;
        RETURN NULL;
    END
    $body$;

    CREATE TRIGGER outboxes_notify AFTER INSERT ON outboxes
        FOR EACH STATEMENT EXECUTE FUNCTION outbox_notify();

    -- Partitions and retention ---------------------------------------------------------------------------

    -- Takes all lanes for the rest of the transaction: when it returns, no claim is open, and none begins. Claims
    -- pass over lanes that are taken, so nobody queues behind this, and writers notice nothing. A claim that is open
    -- is waited for, 1 s for each at most (then: lock_not_available).
    CREATE FUNCTION outbox_hold_lanes() RETURNS void
    LANGUAGE plpgsql
    SET lock_timeout = '1s'
    AS $body$
    BEGIN
        PERFORM FROM outbox_lanes ORDER BY lane FOR UPDATE;
    END
    $body$;

    -- Makes the partition of the month that `month` lies in, and returns its name; does nothing when it is
    -- there. Months begin at midnight UTC whatever the session's time zone.
    --
    -- CREATE TABLE ... PARTITION OF would wait behind every open claim, with new claims queueing behind it.
    -- Here the table is made aside, and only the last step needs a lock that claims are in the way of (on
    -- the DEFAULT partition; inserts into other partitions never wait). So claims are waited for first. Then the
    -- lock is tried for 250 ms at a time with pauses in between, in which claims and writers go on, and given up
    -- with an error after 8 tries.
    --
    -- Rows of that month which are in the DEFAULT partition move in the same transaction. While they move,
    -- and while ATTACH reads the rest of DEFAULT to see that none is left, claims wait; a CHECK constraint
    -- could spare that reading, but adding it reads as much. DEFAULT is empty where partitions are made in
    -- time. A month that has begun is made under a lock that keeps writers waiting as well: a row that is on
    -- its way into DEFAULT would otherwise be refused, as DEFAULT no longer takes it.
    CREATE FUNCTION create_monthly_partition(parent text, month date) RETURNS text
    LANGUAGE plpgsql
    SET timezone = 'UTC'
    SET datestyle = 'ISO'
    SET lock_timeout = '250ms'
    AS $body$
    DECLARE
        tries CONSTANT int := 8;
        parent_table regclass := to_regclass(parent);
        parent_schema name;
        default_partition regclass;
        existing regclass;
        lower_bound timestamptz;
        upper_bound timestamptz;
        partition name;
        partition_of_schema text;
    BEGIN
        IF parent_table IS NULL THEN
            RAISE EXCEPTION 'table % does not exist', coalesce(quote_literal(parent), 'NULL')
                USING ERRCODE = 'undefined_table';
        END IF;
        IF month IS NULL OR NOT month BETWEEN '1970-01-01' AND '9999-11-30' THEN
            RAISE EXCEPTION 'month % is not between 1970-01-01 and 9999-11-30', coalesce(month::text, 'NULL')
                USING ERRCODE = 'invalid_parameter_value';
        END IF;
        -- The quotes are those of the setting quote_all_identifiers.
        IF replace(pg_get_partkeydef(parent_table), '"', '') IS DISTINCT FROM 'RANGE (created_at)' THEN
            RAISE EXCEPTION 'table % is not partitioned by RANGE (created_at)', parent_table
                USING ERRCODE = 'wrong_object_type';
        END IF;

        lower_bound := date_trunc('month', month::timestamp);
        upper_bound := lower_bound + interval '1 month';
        SELECT n.nspname, c.relname || to_char(lower_bound, '"_"YYYY"_"MM')
          INTO parent_schema, partition
          FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE c.oid = parent_table;
        partition_of_schema := format('%I.%I', parent_schema, partition);
        SELECT nullif(partdefid, 0) INTO default_partition
          FROM pg_partitioned_table WHERE partrelid = parent_table;

        -- Two callers at once: the second waits (for as long as lock_timeout allows) and finds it done.
        PERFORM pg_advisory_xact_lock(1869968482, parent_table::oid::bigint::bit(32)::int);
        existing := to_regclass(partition_of_schema);
        IF existing IS NOT NULL THEN
            IF EXISTS (SELECT FROM pg_inherits WHERE inhrelid = existing AND inhparent = parent_table) THEN
                RETURN partition;
            END IF;
            RAISE EXCEPTION 'table % exists and is not a partition of %', existing, parent_table
                USING ERRCODE = 'duplicate_table', HINT = 'Rename it, or attach it by hand.';
        END IF;

        FOR try IN 1 .. tries LOOP
            BEGIN
                IF parent_table = to_regclass('outboxes') THEN
                    PERFORM outbox_hold_lanes();
                END IF;
                IF default_partition IS NOT NULL THEN
                    IF lower_bound <= clock_timestamp() THEN
                        EXECUTE format('LOCK TABLE ONLY %s IN SHARE ROW EXCLUSIVE MODE', parent_table);
                    END IF;
                    EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', default_partition);
                END IF;
                EXECUTE format(
                    'CREATE TABLE %s (LIKE %s INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING INDEXES'
                    ' INCLUDING STORAGE INCLUDING COMPRESSION INCLUDING GENERATED)'
                    ' WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000,'
                    ' autovacuum_analyze_scale_factor = 0.05)',
                    partition_of_schema, parent_table);
                IF default_partition IS NOT NULL THEN
                    EXECUTE format('WITH moved AS (DELETE FROM %s WHERE created_at >= %L AND created_at < %L'
                                   ' RETURNING *) INSERT INTO %s SELECT * FROM moved',
                                   default_partition, lower_bound, upper_bound, partition_of_schema);
                END IF;
                EXECUTE format('ALTER TABLE %s ATTACH PARTITION %s FOR VALUES FROM (%L) TO (%L)',
                               parent_table, partition_of_schema, lower_bound, upper_bound);
                RETURN partition;
            EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
                IF try = tries THEN
                    RAISE EXCEPTION 'partition % not made: its locks were not free in % tries', partition, tries
                        USING ERRCODE = 'lock_not_available',
                              HINT = 'A transaction that reads or writes the outbox stays open; try again later.';
                END IF;
            END;
            PERFORM pg_sleep(0.1 * try);
        END LOOP;
    END
    $body$;

    -- Deletes events that were both created and published (or discarded) more than `days` days ago, at most
    -- 10,000 of them, and returns how many: call it until it returns less than 10,000. (A function cannot
    -- commit, and one big DELETE would hold back vacuum and replicas.) Pending events and dead letters
    -- stay, however old. created_at lets it read the old partitions alone.
    CREATE FUNCTION cleanup_old_outbox_events(days int DEFAULT 30) RETURNS bigint
    LANGUAGE plpgsql
    SET enable_hashjoin = off
    SET enable_mergejoin = off
    AS $body$
    DECLARE
        batch CONSTANT int := 10000;
        before timestamptz;
        deleted bigint;
    BEGIN
        IF days IS NULL OR days < 0 THEN
            RAISE EXCEPTION 'days is %; it must be 0 or more', coalesce(days::text, 'NULL')
                USING ERRCODE = 'invalid_parameter_value';
        END IF;
        before := now() - make_interval(days => days);
        WITH old AS MATERIALIZED (
            SELECT id, created_at
              FROM outboxes
             WHERE created_at < before AND (published_at < before OR discarded_at < before)
             LIMIT batch
               FOR UPDATE SKIP LOCKED
        )
        DELETE FROM outboxes o
         USING old
         WHERE o.id = old.id AND o.created_at = old.created_at
           AND (o.published_at < before OR o.discarded_at < before);
        GET DIAGNOSTICS deleted = ROW_COUNT;
        RETURN deleted;
    END
    $body$;

    -- Upkeep ---------------------------------------------------------------------------------------------
    --
    -- What pg-outbox does by itself, and `pg-outbox partitions` on demand. These functions run with the rights
    -- of whoever applied this file, so that the service's role needs to own nothing; for that reason they work
    -- on this schema's outbox alone, take values and never SQL, and only those may call them who were granted
    -- it. Times come from the server's clock. Each waits at most 100 ms for a lock, as everybody who wants to
    -- insert would wait with it.

    -- The partitions and their bounds; those of the DEFAULT partition are NULL. No backslash: with the setting
    -- standard_conforming_strings off it means something else.
    CREATE FUNCTION outbox_partitions(
        OUT partition name, OUT lower_bound timestamptz, OUT upper_bound timestamptz, OUT is_default boolean
    ) RETURNS SETOF record
    LANGUAGE sql STABLE
    SET timezone = 'UTC'
    SET datestyle = 'ISO'
    AS $body$
        SELECT c.relname,
               CASE WHEN b.bound LIKE 'FOR VALUES FROM (MINVALUE)%' THEN '-infinity'
                    ELSE substring(b.bound FROM '^FOR VALUES FROM [(]''([^'']+)''[)]')::timestamptz END,
               CASE WHEN b.bound LIKE '% TO (MAXVALUE)' THEN 'infinity'
                    ELSE substring(b.bound FROM ' TO [(]''([^'']+)''[)]$')::timestamptz END,
               b.bound = 'DEFAULT'
          FROM pg_inherits i
          JOIN pg_class c ON c.oid = i.inhrelid
         CROSS JOIN LATERAL (SELECT pg_get_expr(c.relpartbound, c.oid) AS bound) AS b
         WHERE i.inhparent = 'outboxes'::regclass
         ORDER BY 2 NULLS LAST, 1
    $body$;

    -- What keeps a partition from being dropped: 'pending', 'dead', or NULL when all its events are published or
    -- discarded.
    CREATE FUNCTION outbox_partition_holds(partition name) RETURNS text
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET enable_seqscan = off
    AS $body$
    DECLARE
        target regclass;
        pending boolean;
        dead boolean;
    BEGIN
        SELECT c.oid INTO target
          FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
         WHERE i.inhparent = 'outboxes'::regclass AND c.relname = outbox_partition_holds.partition;
        IF target IS NULL THEN
            RAISE EXCEPTION 'outboxes has no partition %', coalesce(quote_literal(partition), 'NULL')
                USING ERRCODE = 'undefined_table';
        END IF;
        -- One search for each partial index.
        EXECUTE format('SELECT EXISTS (SELECT FROM %1$s WHERE published_at IS NULL AND dead_at IS NULL'
                       ' AND next_attempt_at IS NULL)'
                       ' OR EXISTS (SELECT FROM %1$s WHERE published_at IS NULL AND dead_at IS NULL'
                       ' AND next_attempt_at IS NOT NULL),'
                       ' EXISTS (SELECT FROM %1$s WHERE published_at IS NULL AND dead_at IS NOT NULL'
                       ' AND discarded_at IS NULL)', target)
           INTO pending, dead;
        RETURN CASE WHEN pending THEN 'pending' WHEN dead THEN 'dead' END;
    END
    $body$;

    -- For how many days from now there are partitions without a gap (0: this month has none), and how many rows
    -- the DEFAULT partition has, counted up to 100,000.
    CREATE FUNCTION outbox_partition_state(OUT days_ahead float8, OUT default_rows bigint)
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    AS $body$
    DECLARE
        default_partition regclass;
    BEGIN
        WITH RECURSIVE ahead(until) AS (
            SELECT upper_bound FROM outbox_partitions() WHERE lower_bound <= now() AND now() < upper_bound
            UNION ALL
            SELECT p.upper_bound FROM ahead JOIN outbox_partitions() p ON p.lower_bound = ahead.until
        )
        -- A partition without an end is as good as a hundred years.
        SELECT coalesce(extract(epoch FROM least(max(until), now() + interval '100 years') - now()) / 86400, 0)
          INTO days_ahead FROM ahead;
        SELECT nullif(partdefid, 0) INTO default_partition
          FROM pg_partitioned_table WHERE partrelid = 'outboxes'::regclass;
        default_rows := 0;
        IF default_partition IS NOT NULL THEN
            EXECUTE format('SELECT count(*) FROM (SELECT FROM %s LIMIT 100000) AS found', default_partition)
               INTO default_rows;
        END IF;
    END
    $body$;

    -- The months that want a partition: this one, the `premake` months after it, and earlier ones of which the
    -- DEFAULT partition has rows. With more than 100,000 rows in DEFAULT, months that have any there are left
    -- out: moving them keeps writers waiting, so somebody should choose the time and call
    -- outbox_create_partition. What is partitioned otherwise than by month wants nothing where it overlaps.
    CREATE FUNCTION outbox_missing_partitions(premake int) RETURNS SETOF date
    LANGUAGE plpgsql STABLE SECURITY DEFINER
    SET timezone = 'UTC'
    AS $body$
    DECLARE
        most CONSTANT int := 100000;
        default_partition regclass;
        this_month timestamptz := date_trunc('month', now());
        end_of_months timestamptz;
        fallen date[] := '{}';
        are_few boolean := true;
    BEGIN
        IF premake IS NULL OR NOT premake BETWEEN 0 AND 120 THEN
            RAISE EXCEPTION 'premake is %; it must be 0 to 120', coalesce(premake::text, 'NULL')
                USING ERRCODE = 'invalid_parameter_value';
        END IF;
        end_of_months := this_month + make_interval(months => premake);
        SELECT nullif(partdefid, 0) INTO default_partition
          FROM pg_partitioned_table WHERE partrelid = 'outboxes'::regclass;
        IF default_partition IS NOT NULL THEN
            EXECUTE format('SELECT count(*) <= %2$s, coalesce(array_agg(DISTINCT date_trunc(''month'', created_at)::date)'
                           ' FILTER (WHERE created_at BETWEEN ''1970-01-01'' AND ''9999-11-30''), ''{}'')'
                           ' FROM (SELECT created_at FROM %1$s LIMIT %2$s + 1) AS found', default_partition, most)
               INTO are_few, fallen;
        END IF;
        RETURN QUERY
            SELECT m.month
              FROM (SELECT generate_series(this_month, end_of_months, '1 month')::date
                    UNION
                    SELECT unnest(fallen)) AS m(month)
             WHERE m.month <= end_of_months
               AND (are_few OR m.month <> ALL (fallen))
               AND NOT EXISTS (
                   SELECT FROM outbox_partitions() p
                    WHERE NOT p.is_default
                      AND p.lower_bound < m.month::timestamptz + interval '1 month' AND p.upper_bound > m.month::timestamptz)
             ORDER BY m.month;
    END
    $body$;

    -- Makes the partition of a month, as create_monthly_partition does, and returns its name.
    CREATE FUNCTION outbox_create_partition(month date) RETURNS text
    LANGUAGE sql SECURITY DEFINER
    AS $body$
        SELECT create_monthly_partition('outboxes', month)
    $body$;

    -- Detaches and drops a partition that is older than `retention` as a whole and has no pending event, no
    -- dead letter, and none that was discarded since. Returns 'dropped', or why not: 'young', 'pending', 'dead',
    -- 'discarded', or 'locked' when its locks were not free in 8 tries.
    --
    -- Detaching needs the whole table for an instant. (DETACH CONCURRENTLY would not, but is not allowed beside
    -- a DEFAULT partition.) Claims are waited for before that, which holds up nobody. A waiting request for the
    -- table holds up everybody who comes after it, so it is given up after 100 ms, and tried again after a pause
    -- in which others go on. What the partition holds is
    -- looked at under the lock, when no insert and no operator can change it any more.
    CREATE FUNCTION outbox_drop_partition(partition name, retention interval) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER
    SET lock_timeout = '100ms'
    AS $body$
    DECLARE
        tries CONSTANT int := 8;
        parent regclass := 'outboxes'::regclass;
        parent_schema name;
        target text;
        holds text;
        newly_discarded boolean;
    BEGIN
        IF retention IS NULL OR retention < interval '1 day' THEN
            RAISE EXCEPTION 'retention is %; it must be a day or more', coalesce(retention::text, 'NULL')
                USING ERRCODE = 'invalid_parameter_value';
        END IF;
        SELECT n.nspname INTO parent_schema
          FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = parent;
        target := format('%I.%I', parent_schema, partition);
        FOR try IN 1 .. tries LOOP
            -- Raises an error for what is no partition of ours.
            holds := outbox_partition_holds(partition);
            IF NOT EXISTS (SELECT FROM outbox_partitions() p
                            WHERE p.partition = outbox_drop_partition.partition AND p.upper_bound <= now() - retention) THEN
                RETURN 'young';
            ELSIF holds IS NOT NULL THEN
                RETURN holds;
            END IF;
            EXECUTE format('SELECT EXISTS (SELECT FROM %s WHERE discarded_at > now() - $1)', target)
               INTO newly_discarded USING retention;
            IF newly_discarded THEN
                RETURN 'discarded';
            END IF;
            BEGIN
                PERFORM outbox_hold_lanes();
                EXECUTE format('LOCK TABLE ONLY %s IN ACCESS EXCLUSIVE MODE', parent);
                EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', target);
                holds := outbox_partition_holds(partition);
                IF holds IS NULL THEN
                    EXECUTE format('ALTER TABLE %s DETACH PARTITION %s', parent, target);
                    EXECUTE format('DROP TABLE %s', target);
                    RETURN 'dropped';
                END IF;
                -- Lets go of the locks.
                RAISE EXCEPTION USING ERRCODE = 'lock_not_available';
            EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
                NULL;
            END;
            PERFORM pg_sleep(0.05 + random() * 0.2);
        END LOOP;
        RETURN 'locked';
    END
    $body$;

    -- Deletes the events of a partition that were created and published (or discarded) longer than `retention` ago,
    -- in its 256 blocks from `first_block` on: some thousand events, whatever their number, and no block is read
    -- twice in a pass. Returns how many, and the block to go on from, which is NULL at the end. Pending events and dead
    -- letters stay, however old.
    CREATE FUNCTION outbox_clean_partition(
        partition name, first_block bigint, retention interval, OUT deleted bigint, OUT next_block bigint
    )
    LANGUAGE plpgsql SECURITY DEFINER
    SET lock_timeout = '100ms'
    AS $body$
    DECLARE
        step CONSTANT bigint := 256;
        target regclass;
        before timestamptz := now() - retention;
    BEGIN
        IF retention IS NULL OR retention < interval '1 day' OR first_block IS NULL OR first_block < 0 THEN
            RAISE EXCEPTION 'retention is % and first_block %; they must be a day or more, and 0 or more',
                            coalesce(retention::text, 'NULL'), coalesce(first_block::text, 'NULL')
                USING ERRCODE = 'invalid_parameter_value';
        END IF;
        SELECT c.oid INTO target
          FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
         WHERE i.inhparent = 'outboxes'::regclass AND c.relname = outbox_clean_partition.partition;
        IF target IS NULL THEN
            RAISE EXCEPTION 'outboxes has no partition %', coalesce(quote_literal(partition), 'NULL')
                USING ERRCODE = 'undefined_table';
        END IF;
        EXECUTE format('DELETE FROM %s WHERE ctid >= ''(%s,0)'' AND ctid < ''(%s,0)'''
                       ' AND created_at < $1 AND (published_at < $1 OR discarded_at < $1)',
                       target, first_block, first_block + step)
          USING before;
        GET DIAGNOSTICS deleted = ROW_COUNT;
        next_block := first_block + step;
        IF next_block >= pg_relation_size(target) / current_setting('block_size')::bigint THEN
            next_block := NULL;
        END IF;
    END
    $body$;

    -- They work from any session, also where the schema is not on its search_path; and what runs with our
    -- rights cannot be given other functions to call.
    FOR function IN
        SELECT p.oid::regprocedure::text FROM pg_proc p
         WHERE p.pronamespace = quote_ident(current_schema())::regnamespace
           AND p.proname IN ('outbox_hold_lanes', 'create_monthly_partition', 'cleanup_old_outbox_events', 'outbox_partitions',
                             'outbox_partition_holds', 'outbox_partition_state', 'outbox_missing_partitions',
                             'outbox_create_partition', 'outbox_drop_partition', 'outbox_clean_partition')
    LOOP
        EXECUTE format('ALTER FUNCTION %s SET search_path = pg_catalog, %I, pg_temp', function, current_schema());
    END LOOP;
    REVOKE ALL ON FUNCTION outbox_partition_holds(name), outbox_partition_state(), outbox_missing_partitions(int),
        outbox_create_partition(date), outbox_drop_partition(name, interval),
        outbox_clean_partition(name, bigint, interval) FROM PUBLIC;

    -- A table that was adopted gets them from the first round of upkeep: here its writers would wait.
    FOR month IN 0 .. CASE adopting WHEN 'no' THEN 3 ELSE -1 END LOOP
        PERFORM create_monthly_partition('outboxes', (this_month + make_interval(months => month))::date);
    END LOOP;

    -- Comments -------------------------------------------------------------------------------------------

    COMMENT ON TABLE outboxes IS
        'Transactional outbox. Writers INSERT (topic, metadata, payload) in the transaction of their business rows; pg-outbox publishes each event to NATS and marks it published.';
    COMMENT ON COLUMN outboxes.id IS
        'Identity of the event, the Nats-Msg-Id it is deduplicated by; rows with the same id are the same event';
    COMMENT ON COLUMN outboxes.seq IS 'Order of the events of a key';
    COMMENT ON COLUMN outboxes.created_at IS 'Time of the writing transaction; decides the partition';
    COMMENT ON COLUMN outboxes.topic IS
        'What happened, as a literal NATS subject (user.created); the topic map may make another subject of it';
    COMMENT ON COLUMN outboxes.metadata IS
        'JSON object or NULL; its fields become NATS headers, and "ordering-key" is the event''s key';
    COMMENT ON COLUMN outboxes.payload IS 'Body of the message';
    COMMENT ON COLUMN outboxes.published_at IS 'When NATS had the event; NULL: not published';
    COMMENT ON COLUMN outboxes.attempts IS 'Publish attempts that NATS judged; an outage counts for none';
    COMMENT ON COLUMN outboxes.last_error IS 'Why the last attempt failed; NULL once published';
    COMMENT ON COLUMN outboxes.next_attempt_at IS
        'Set while the event is in retry: not tried before this time, and later events of its key wait';
    COMMENT ON COLUMN outboxes.dead_at IS 'When the event became a dead letter, which is not tried again';
    COMMENT ON COLUMN outboxes.discarded_at IS
        'When an operator discarded the dead letter, which then holds nothing back and goes with the retention';
    COMMENT ON COLUMN outboxes.discarded_by IS 'Who discarded it';
    COMMENT ON COLUMN outboxes.discard_reason IS 'Why';
    COMMENT ON INDEX outboxes_fresh_by_lane IS 'What claims read: pending events of a lane, not in retry, in order';
    COMMENT ON INDEX outboxes_retry_by_lane IS 'Events in retry by the time they are due';
    COMMENT ON INDEX outboxes_retry_by_key IS 'Events in retry by the key they hold';
    COMMENT ON INDEX outboxes_dead_by_key IS 'Dead letters by key';
    COMMENT ON INDEX outboxes_discarded_by_time IS 'Discarded events by the time of that';
    -- A table that was adopted may lack these, or have them by another name.
    FOR commented IN
        SELECT * FROM (VALUES
            ('CONSTRAINT', 'outboxes_metadata_is_object', 'Metadata becomes headers, so it is a JSON object or NULL'),
            ('CONSTRAINT', 'outboxes_topic_is_literal_subject',
             'NATS takes tokens separated by dots: no empty token, blank, control character or wildcard'),
            ('TABLE', 'outboxes_default', 'Events that no monthly partition takes; empty where those are made in time')
        ) AS comments(kind, name, words)
         WHERE CASE kind
               WHEN 'TABLE' THEN to_regclass(name) IS NOT NULL
               ELSE EXISTS (SELECT FROM pg_constraint WHERE conname = name AND conrelid = 'outboxes'::regclass)
               END
    LOOP
        EXECUTE format('COMMENT ON %s %I%s IS %L', commented.kind, commented.name,
                       CASE commented.kind WHEN 'CONSTRAINT' THEN ' ON outboxes' END, commented.words);
    END LOOP;
    COMMENT ON TABLE outbox_lanes IS 'One row for each lane of keys; a claim locks the row, and nothing changes it';
    COMMENT ON TABLE outbox_schema IS 'Migrations applied';
    COMMENT ON FUNCTION outbox_key(text, jsonb) IS 'The ordering key of an event';
    COMMENT ON FUNCTION outbox_lane(text, jsonb) IS 'The lane of an event''s key, 0 to 63';
    COMMENT ON FUNCTION outbox_notify() IS 'Wakes pg-outbox up when the transaction commits, if it sleeps';
    COMMENT ON FUNCTION outbox_hold_lanes() IS 'Waits for the open claims, and lets none begin until the transaction ends';
    COMMENT ON FUNCTION create_monthly_partition(text, date) IS
        'Makes the partition for the month of the date (UTC) if it is missing, and returns its name';
    COMMENT ON FUNCTION cleanup_old_outbox_events(int) IS
        'Deletes up to 10,000 published or discarded events older than that many days, and returns how many';
    COMMENT ON FUNCTION outbox_partitions() IS 'The partitions of the outbox and their bounds';
    COMMENT ON FUNCTION outbox_partition_holds(name) IS
        'What keeps a partition from being dropped: pending, dead, or NULL';
    COMMENT ON FUNCTION outbox_partition_state() IS
        'Days from now that have partitions, and rows in the DEFAULT partition (counted up to 100,000)';
    COMMENT ON FUNCTION outbox_missing_partitions(int) IS 'The months, up to so many ahead, that want a partition';
    COMMENT ON FUNCTION outbox_create_partition(date) IS 'Makes the partition of a month, and returns its name';
    COMMENT ON FUNCTION outbox_drop_partition(name, interval) IS
        'Drops a partition that is older than that as a whole and holds no pending or dead event, or says why not';
    COMMENT ON FUNCTION outbox_clean_partition(name, bigint, interval) IS
        'Deletes published and discarded events older than that from 256 blocks of a partition';

    INSERT INTO outbox_schema (version) VALUES (1);
END
$rest$;

-- A second run that asks for another order must not seem to have worked.
DO $order$
DECLARE
    wanted text := nullif(current_setting('pg_outbox.order', true), '');
    installed text := CASE outbox_key('t', '{"ordering-key": "k"}') WHEN 'k' THEN 'key' WHEN 't' THEN 'topic' ELSE 'all' END;
BEGIN
    IF wanted <> installed THEN
        RAISE EXCEPTION 'events are ordered by "%" here; "%" was asked for', installed, wanted
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = 'The order is chosen once, by the first migration.';
    END IF;
END
$order$;

COMMIT;
