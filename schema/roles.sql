-- Three roles for three kinds of session, each with what it needs and no more. Needs the outbox (001_outbox.sql), its
-- owner, and, while a role is missing, the right to create roles. It works on the first schema of the search_path:
--
--     psql -v ON_ERROR_STOP=1 -f schema/roles.sql
--
-- outbox_writer      for applications: INSERT and nothing else, not even RETURNING.
-- outbox_dispatcher  for the daemon: reads the outbox, writes what becomes of events, locks lanes, and looks after the
--                    partitions through functions that run as their owner. It changes no topic, metadata or payload,
--                    inserts and deletes nothing, and sees no other table.
-- outbox_operator    for people: what the dispatcher may; what other sessions do (pg_read_all_stats), for
--                    `pg-outbox status`; and a fresh id for a dead letter, for `pg-outbox dead retry --new-id`.
--
-- They cannot log in; make a login role a member: CREATE ROLE shop LOGIN PASSWORD '...' IN ROLE outbox_writer. Roles
-- belong to the whole server: with several outboxes on one, give each roles of its own by the setting
-- pg_outbox.role_prefix: PGOPTIONS='-c pg_outbox.role_prefix=orders' makes orders_writer and so on. Doing it again
-- puts the grants on the outbox back to what stands here, and touches nothing else.

BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;

DO $roles$
DECLARE
    prefix text := coalesce(nullif(current_setting('pg_outbox.role_prefix', true), ''), 'outbox');
    writer name := prefix || '_writer';
    dispatcher name := prefix || '_dispatcher';
    operator name := prefix || '_operator';
    everybody text := format('%I, %I, %I', writer, dispatcher, operator);
    readers text := format('%I, %I', dispatcher, operator);
    home text := quote_ident(current_schema());
    outcome text;
    member name;
    function text;
BEGIN
    IF to_regclass(home || '.outbox_schema') IS NULL THEN
        RAISE EXCEPTION 'schema % has no outbox', coalesce(home, '(none)')
            USING ERRCODE = 'undefined_table', HINT = 'Run 001_outbox.sql first, or set search_path to its schema.';
    END IF;

    FOREACH member IN ARRAY ARRAY[writer, dispatcher, operator] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = member) THEN
            BEGIN
                EXECUTE format('CREATE ROLE %I NOLOGIN', member);
            EXCEPTION WHEN duplicate_object OR unique_violation THEN
                NULL; -- somebody else was faster, in this database or in another
            END;
        END IF;
    END LOOP;

    -- Two at once would change the same rows of the catalog.
    PERFORM pg_advisory_xact_lock(8247343699905503587);
    EXECUTE format('REVOKE ALL ON %1$s.outboxes, %1$s.outbox_lanes, %1$s.outbox_schema FROM %2$s', home, everybody);
    EXECUTE format('GRANT USAGE ON SCHEMA %s TO %s', home, everybody);

    EXECUTE format('GRANT INSERT ON %s.outboxes TO %I', home, writer);

    -- What says what became of an event; the rest of the row is its writer's word. Some columns are of later versions.
    SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) INTO outcome
      FROM pg_attribute
     WHERE attrelid = (home || '.outboxes')::regclass AND NOT attisdropped
       AND attname IN ('published_at', 'attempts', 'last_error', 'next_attempt_at', 'dead_at',
                       'discarded_at', 'discarded_by', 'discard_reason');
    EXECUTE format('GRANT SELECT, UPDATE (%s) ON %s.outboxes TO %s', outcome, home, readers);
    -- A dead letter can be sent under a fresh message id.
    EXECUTE format('GRANT UPDATE (id) ON %s.outboxes TO %I', home, operator);
    -- A row can be locked by whoever may update a column of it; a claim also writes how far its lanes are settled, and the
    -- sweep that this was not so.
    EXECUTE format('GRANT SELECT, UPDATE (settled_to, sequence_file, marked_at, sweeps) ON %s.outbox_lanes TO %s', home, readers);
    EXECUTE format('GRANT SELECT ON %s.outbox_schema TO %s', home, readers);

    -- The functions that run as their owner, and for that reason are not everybody's.
    FOR function IN
        SELECT oid::regprocedure::text FROM pg_proc
         WHERE pronamespace = home::regnamespace AND prosecdef AND proname LIKE 'outbox\_%'
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s', function, readers);
    END LOOP;

    -- Until PostgreSQL 15 that was so in public, and it stays so in a database that was upgraded. Who can make a function
    -- there can make one that ours, which run as their owner, take for one of PostgreSQL's.
    IF has_schema_privilege('public', current_schema(), 'CREATE') THEN
        RAISE WARNING 'anybody may create objects in schema %', home
            USING HINT = format('REVOKE CREATE ON SCHEMA %s FROM PUBLIC', home);
    END IF;

    IF NOT pg_has_role(operator, 'pg_read_all_stats', 'MEMBER') THEN
        BEGIN
            EXECUTE format('GRANT pg_read_all_stats TO %I', operator);
        EXCEPTION WHEN insufficient_privilege THEN
            RAISE NOTICE 'pg_read_all_stats was not granted to %, so status shows less: only a superuser may', operator;
        WHEN unique_violation THEN
            NULL; -- somebody else was faster
        END;
    END IF;
END
$roles$;

COMMIT;
