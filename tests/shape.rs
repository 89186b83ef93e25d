//! The shape of the schema that claims rest on: settles touch no index, lanes and hashes come from no md5, marks count for the
//! sequence that they were written with, a dump restores, and the sequence is one that reads can rely on.

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use crate::adopt::{adopt, check, fill, said, seed_table};
use crate::claim::claim_from;
use crate::counting::{set_marks, store};
use crate::harness::database::{grant_roles, shared_postgres};
use crate::harness::{Config, Daemon, TestDb, database, stream, wait_until};

const LIMIT: Duration = Duration::from_secs(60);
/// Columns that every settle changes.
const SETTLED: [&str; 3] = ["published_at", "attempts", "last_error"];

/// A program of PostgreSQL, of the server that the tests run on.
fn postgres_program(name: &str) -> Command {
    let psql = shared_postgres().psql("postgres");
    Command::new(Path::new(psql.get_program()).with_file_name(name))
}

#[track_caller]
fn fine(output: Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// An outbox that was made, and one that was adopted and has lost what others had built on it; each with an old month.
fn made_and_adopted() -> [TestDb; 2] {
    let (made, adopted) = (database(), seed_table());
    adopted.execute("DROP INDEX own_index");
    said(&adopt(&adopted, &stream(), &[]));
    for db in [&made, &adopted] {
        db.execute("SELECT create_monthly_partition('outboxes', '2020-02-01')");
    }
    [made, adopted]
}

#[test]
fn nothing_that_is_installed_names_md5() {
    for db in made_and_adopted() {
        // FIPS forbids it; functions, indexes, defaults and checks are all in a dump.
        let dump = fine(
            postgres_program("pg_dump")
                .args(["--schema-only", "--no-comments", "-d", &db.dsn])
                .output()
                .unwrap(),
        );
        assert!(
            dump.contains("FUNCTION public.outbox_lane") && dump.contains("INDEX outboxes_by_lane"),
            "{dump}"
        );
        let named: Vec<&str> = dump
            .lines()
            // Newer versions of pg_dump put a random word into two lines.
            .filter(|line| !line.starts_with('\\') && line.to_lowercase().contains("md5"))
            .collect();
        assert!(named.is_empty(), "{named:?}");
        let functions = "SELECT count(*) FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND pg_get_functiondef(oid) ILIKE '%md5%'";
        assert_eq!(db.number(functions), 0);
    }
}

#[test]
fn no_index_mentions_what_a_settle_changes() {
    for db in made_and_adopted() {
        // Keys, INCLUDEd columns, expressions and predicates all depend on their columns; the texts are asked as well.
        let mention = format!(
            "SELECT coalesce(string_agg(DISTINCT pg_get_indexdef(i.indexrelid), E'\\n'), '')
               FROM pg_partition_tree('outboxes') AS part
               JOIN pg_index AS i ON i.indrelid = part.relid
               LEFT JOIN pg_depend AS d ON d.classid = 'pg_class'::regclass AND d.objid = i.indexrelid AND d.refobjid = i.indrelid
               LEFT JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = d.refobjsubid
              WHERE a.attname IN ('{0}') OR pg_get_indexdef(i.indexrelid) ~ '\\m({1})\\M'",
            SETTLED.join("', '"),
            SETTLED.join("|"),
        );
        let found: String = db.client().query_one(&mention, &[]).unwrap().get(0);
        assert_eq!(found, "");
        let indexes =
            "SELECT min(n)::int8 FROM (SELECT count(*) AS n FROM pg_partition_tree('outboxes') AS part
                         JOIN pg_index AS i ON i.indrelid = part.relid GROUP BY part.relid) AS each";
        assert_eq!(db.number(indexes), 6, "the primary key and five, on every partition");
        let room = "SELECT count(*) FROM pg_partition_tree('outboxes') AS part JOIN pg_class AS c ON c.oid = part.relid
                     WHERE part.isleaf AND NOT 'fillfactor=70' = ANY (coalesce(c.reloptions, '{}'))";
        assert_eq!(db.number(room), 0, "partitions without room for settles");

        // So an update of all of them touches none.
        db.execute("INSERT INTO outboxes (topic, payload) SELECT 'a', '{}' FROM generate_series(1, 50);
                    INSERT INTO outboxes (created_at, topic, payload) SELECT '2020-02-03', 'a', '{}' FROM generate_series(1, 50)");
        let mut client = db.client();
        client.batch_execute("BEGIN; UPDATE outboxes SET published_at = now(), attempts = 1, last_error = NULL WHERE seq % 10 = 0").unwrap();
        let updates = "SELECT sum(n_tup_upd)::bigint, sum(n_tup_hot_upd)::bigint FROM pg_stat_xact_user_tables WHERE relname LIKE 'outboxes%'";
        let row = client.query_one(updates, &[]).unwrap();
        assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (10, 10));
    }
}

#[test]
fn marks_count_for_the_sequence_that_they_were_written_with() {
    let db = database();
    let store = store(&db);
    let claimed = || claim_from(&store, 0, 64, 100).take_events().len();
    let seen = |what: &str, expected: usize| {
        assert_eq!(claimed(), expected, "{what}");
        assert_eq!(store.backlog(&[], 1_000).unwrap().pending, i64::try_from(expected).unwrap(), "{what}");
        assert_eq!(store.topics(1).unwrap().len(), expected.min(1), "{what}");
    };
    db.events("order.placed", 10, 5);
    seen("no marks", 10);
    set_marks(&db, "10");
    seen("marks behind all", 0);
    set_marks(&db, "7");
    seen("marks before the last three", 3);

    // Above the last number drawn: the sequence was set back, or a standby took over that had less.
    set_marks(&db, "11");
    seen("marks above all numbers", 10);
    set_marks(&db, "10");
    db.execute("SELECT setval('outboxes_seq_seq', 9)");
    seen("the sequence was set back", 10);
    db.execute("SELECT setval('outboxes_seq_seq', 10, false)");
    seen("the last number is still to be drawn", 10);
    db.execute("SELECT setval('outboxes_seq_seq', 10)");
    seen("and is drawn", 0);

    // Another file, in which numbers begin anew; it is the same again once that is rolled back.
    let mut other = db.client();
    other.batch_execute("BEGIN; TRUNCATE outboxes RESTART IDENTITY; ROLLBACK").unwrap();
    seen("rolled back", 0);
    db.execute("TRUNCATE outboxes RESTART IDENTITY");
    db.events("order.placed", 20, 5);
    seen("begun anew", 20);
    set_marks(&db, "20");
    seen("marks of the new file", 0);
    db.execute("ALTER SEQUENCE outboxes_seq_seq RESTART WITH 21");
    seen("another file, whatever the number", 20);
    db.execute("SELECT setval('outboxes_seq_seq', 1000); UPDATE outbox_lanes SET sequence_file = 0");
    seen("marks of no file", 20);
}

#[test]
fn a_filled_outbox_restores_elsewhere_with_an_empty_search_path() {
    let from = database();
    from.events("order.placed", 200, 30);
    from.execute(
        "UPDATE outboxes SET published_at = now(), attempts = 1 WHERE seq <= 100;
         UPDATE outboxes SET next_attempt_at = now(), attempts = 1 WHERE seq BETWEEN 101 AND 103;
         UPDATE outboxes SET dead_at = now() WHERE seq = 104;
         INSERT INTO outboxes (created_at, topic, payload) VALUES ('2024-02-03', 'old.one', '{}')",
    );
    set_marks(&from, "100");
    let rows = "SELECT string_agg(tableoid::regclass || o::text, ' ' ORDER BY seq) FROM outboxes AS o";
    let of = |db: &TestDb, query: &str| db.client().query_one(query, &[]).unwrap().get::<_, String>(0);
    let folder = tempfile::tempdir().unwrap();
    let (plain, custom) = (folder.path().join("plain.sql"), folder.path().join("custom"));
    for (format, file) in [("--format=plain", &plain), ("--format=custom", &custom)] {
        fine(postgres_program("pg_dump").args([format, "-d", &from.dsn, "-f"]).arg(file).output().unwrap());
    }
    let text = std::fs::read_to_string(&plain).unwrap();
    assert!(text.contains("set_config('search_path', '', false)"));
    for is_plain in [true, false] {
        let to = TestDb::without_schema(shared_postgres());
        let output = if is_plain {
            shared_postgres()
                .psql(&to.name)
                .args(["-v", "ON_ERROR_STOP=1", "-f"])
                .arg(&plain)
                .output()
                .unwrap()
        } else {
            let mut restore = postgres_program("pg_restore");
            restore.args(["--exit-on-error", "--jobs=2", "-d", &to.dsn]).arg(&custom).output().unwrap()
        };
        fine(output);
        assert_eq!(of(&to, rows), of(&from, rows));
        let store = store(&to);
        assert_eq!(store.schema_problems().unwrap(), Vec::<String>::new());
        let backlog = store.backlog(&[], 1_000).unwrap();
        assert_eq!((backlog.pending, backlog.retrying, backlog.dead), (100, 3, 1), "plain {is_plain}");
        assert_eq!(claim_from(&store, 0, 64, 1_000).take_events().len(), 100);
        // Whoever writes and whoever looks after it may have no search_path either.
        let mut client = to.client();
        client
            .batch_execute(
                "SET search_path = ''; INSERT INTO public.outboxes (topic, payload) VALUES ('a', '{}');
                 SELECT public.create_monthly_partition('public.outboxes', '2024-03-01');
                 SELECT * FROM public.outbox_sequence(); SELECT public.outbox_partition_holds('outboxes_2024_03');
                 SELECT public.outbox_mend_lanes()",
            )
            .unwrap();
    }
}

/// What `check` and an adoption make of the sequence, by what was done to it.
#[test]
fn a_sequence_that_reads_cannot_rely_on_is_told_of_and_mended_where_that_is_a_statement() {
    let stream = stream();
    for (change, problem, is_mended) in [
        ("ALTER SEQUENCE outboxes_seq_seq CACHE 20", "sequence outboxes_seq_seq has a CACHE", true),
        ("ALTER SEQUENCE outboxes_seq_seq CYCLE", "sequence outboxes_seq_seq has CYCLE", true),
        (
            "ALTER SEQUENCE outboxes_seq_seq MINVALUE -1000 INCREMENT -1",
            "sequence outboxes_seq_seq counts down",
            false,
        ),
        (
            "ALTER SEQUENCE outboxes_seq_seq OWNED BY NONE",
            "ALTER SEQUENCE outboxes_seq_seq OWNED BY outboxes.seq",
            false,
        ),
        (
            "CREATE SEQUENCE other; ALTER TABLE outboxes ALTER COLUMN seq SET DEFAULT nextval('other')",
            "seq does not draw from its own sequence outboxes_seq_seq",
            false,
        ),
        (
            "ALTER TABLE outboxes ALTER COLUMN seq DROP DEFAULT",
            "seq does not draw from its own sequence",
            false,
        ),
    ] {
        let (db, strange) = (database(), seed_table());
        let store = store(&db);
        db.execute(change);
        strange.execute(change);
        let told = store.schema_problems().unwrap();
        assert!(
            told.len() == 1
                && told[0].contains(problem)
                && told[0].ends_with("run `pg-outbox migrate --adopt`"),
            "{told:?}"
        );
        for db in [&db, &strange] {
            let output = adopt(db, &stream, &[]);
            if is_mended {
                assert!(said(&output).contains("sequence outboxes_seq_seq "), "{output:?}");
                grant_roles(shared_postgres(), &db.name);
                let problems = crate::counting::store(db).schema_problems().unwrap();
                assert_eq!(problems, Vec::<String>::new(), "{change}");
            } else {
                let error = String::from_utf8_lossy(&output.stderr);
                assert!(output.status.code() == Some(1) && error.contains(problem), "{change}: {error}");
            }
        }
        assert_eq!(
            strange.number("SELECT count(*) FROM pg_class WHERE relname = 'outbox_schema'"),
            i64::from(is_mended)
        );
    }
}

#[test]
fn numbers_that_a_session_has_drawn_in_advance_are_not_used_once_that_is_mended() {
    let (db, stream) = (seed_table(), stream());
    db.execute("ALTER SEQUENCE outboxes_seq_seq CACHE 20");
    let mut writer = db.client();
    let insert = "INSERT INTO outboxes (id, created_at, topic, payload) VALUES (gen_random_uuid(), now(), 'a', '{}') RETURNING seq";
    let seq = |client: &mut postgres::Client| client.query_one(insert, &[]).unwrap().get::<_, i64>(0);
    assert_eq!((seq(&mut writer), seq(&mut db.client()), seq(&mut writer)), (1, 21, 2));
    said(&adopt(&db, &stream, &[]));
    let last = seq(&mut db.client());
    assert!(last > 40 && seq(&mut writer) == last + 1, "{last}");
}

#[test]
fn an_identity_column_is_adopted_as_a_serial_one_is() {
    let (db, stream) = (seed_table(), stream());
    db.execute(
        "ALTER TABLE outboxes ALTER COLUMN seq DROP DEFAULT; DROP SEQUENCE outboxes_seq_seq;
         ALTER TABLE outboxes ALTER COLUMN seq ADD GENERATED ALWAYS AS IDENTITY",
    );
    fill(&db, 30, 10);
    said(&adopt(&db, &stream, &[]));
    grant_roles(shared_postgres(), &db.name);
    let store = store(&db);
    assert_eq!(store.schema_problems().unwrap(), Vec::<String>::new());
    assert_eq!(db.number("SELECT last_value FROM outbox_sequence()"), 30);
    assert_eq!(claim_from(&store, 0, 64, 100).take_events().len(), 10);
}

#[test]
fn nothing_is_claimed_at_a_version_that_the_program_does_not_know() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream);
    let daemon = Daemon::start(&config);
    db.events("order.placed", 10, 5);
    wait_until("all is published", LIMIT, &[&daemon, &db], || db.published() == 10);
    // A later program has migrated, while this one runs.
    db.execute("INSERT INTO outbox_schema (version) VALUES (3)");
    db.events("order.placed", 5, 5);
    let problem = "the schema is of version 3, and this pg-outbox works with version 2: install the pg-outbox that belongs to it; \
                   nothing is claimed";
    let said = format!("claims fail, trying on: {problem}");
    wait_until("it says so", LIMIT, &[&daemon, &db], || !daemon.log_lines(&said).is_empty());
    wait_until("it is not ready", LIMIT, &[&daemon], || daemon.get("/ready").0 == 503);
    assert_eq!((db.pending(), stream.count()), (5, 10));
    let told = String::from_utf8(check(&config).stdout).unwrap();
    assert!(told.contains(&format!("FAIL  schema: {problem}")), "{told}");
    let output = adopt(&db, &stream, &[]);
    assert!(
        output.status.code() == Some(1) && String::from_utf8_lossy(&output.stderr).contains(problem),
        "{output:?}"
    );

    db.execute("DELETE FROM outbox_schema WHERE version = 3");
    wait_until("all is published", LIMIT, &[&daemon, &db], || db.published() == 15);
    wait_until("it is ready", LIMIT, &[&daemon], || daemon.get("/ready").0 == 200);
    assert_eq!(daemon.log_lines(&said).len(), 1, "{}", daemon.log());
}

#[test]
fn what_an_outbox_has_lost_an_adoption_adds() {
    let (db, stream) = (database(), stream());
    let store = store(&db);
    db.execute(
        "DROP INDEX outboxes_by_lane, outboxes_retry_by_key; DROP TABLE outboxes_default;
         ALTER TABLE outboxes DROP COLUMN discard_reason",
    );
    let told = store.schema_problems().unwrap();
    assert!(
        told.len() == 4 && told.iter().all(|problem| problem.ends_with("run `pg-outbox migrate --adopt`")),
        "{told:?}"
    );
    db.events("order.placed", 10, 5);
    said(&adopt(&db, &stream, &[]));
    assert_eq!(store.schema_problems().unwrap(), Vec::<String>::new());
    assert_eq!(said(&adopt(&db, &stream, &[])), "nothing is missing\n");
    assert_eq!(claim_from(&store, 0, 64, 100).take_events().len(), 10);
}
