//! `pg-outbox migrate --adopt`, on tables as another program made them: with what they lack, while writers go on,
//! interrupted, refused.

use std::process::{Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::harness::daemon::{Program, pg_outbox};
use super::harness::database::{migrate, shared_postgres};
use super::harness::{Config, Daemon, Evidence, TestDb, TestStream, database, stream, wait_until};

const LIMIT: Duration = Duration::from_secs(120);
/// Longest that one INSERT may take meanwhile. A lock is asked for during 0.1 s; the rest is the machine's.
const SLOWEST_INSERT: Duration = Duration::from_secs(2);
/// Events that are there, and how many of them are not published.
const ROWS: i64 = 200_000;
const PENDING: i64 = 2_000;

/// The table of the seed, with what its users may have added.
const SEED: &str = "
    CREATE TABLE outboxes (
        id UUID NOT NULL,
        seq BIGSERIAL NOT NULL,
        created_at TIMESTAMPTZ NOT NULL,
        topic VARCHAR(255) NOT NULL,
        metadata JSONB,
        payload JSONB NOT NULL,
        published_at TIMESTAMPTZ,
        attempts INTEGER DEFAULT 0,
        last_error TEXT,
        tenant INT DEFAULT 7,
        PRIMARY KEY (id, created_at)
    ) PARTITION BY RANGE (created_at);
    CREATE INDEX own_index ON outboxes (seq) WHERE published_at IS NULL;
    DO $$ BEGIN
        FOR month IN -1 .. 1 LOOP
            EXECUTE format('CREATE TABLE %I PARTITION OF outboxes FOR VALUES FROM (%L) TO (%L)',
                to_char(date_trunc('month', now() AT TIME ZONE 'UTC') + make_interval(months => month), '\"outboxes_\"YYYY_MM'),
                date_trunc('month', now()) + make_interval(months => month),
                date_trunc('month', now()) + make_interval(months => month + 1));
        END LOOP;
    END $$;
    CREATE FUNCTION create_monthly_partition(table_name TEXT, start_date DATE) RETURNS void LANGUAGE sql AS '';
    CREATE FUNCTION cleanup_old_outbox_events(retention_days INT) RETURNS int LANGUAGE sql AS 'SELECT 0';";

/// An empty database with that table.
pub fn seed_table() -> TestDb {
    let db = TestDb::without_schema(shared_postgres());
    db.execute(&format!("ALTER DATABASE {} SET timezone = 'UTC'", db.name));
    db.execute(SEED);
    db
}

/// Fills it: the first rows are published, the last ones are not; the last but one month has half of them.
pub fn fill(db: &TestDb, rows: i64, pending: i64) {
    db.execute(&format!(
        "INSERT INTO outboxes (id, created_at, topic, metadata, payload, published_at, attempts)
         SELECT gen_random_uuid(), CASE WHEN n <= {rows} / 2 THEN date_trunc('month', now()) - interval '3 days' ELSE now() END,
                'order.placed', jsonb_build_object('ordering-key', 'k' || n % 100), jsonb_build_object('n', n),
                CASE WHEN n <= {rows} - {pending} THEN now() END, CASE WHEN n <= {rows} - {pending} THEN 1 ELSE 0 END
           FROM generate_series(1, {rows}) AS n"
    ));
}

pub fn adopt_command(
    db: &TestDb,
    stream: &TestStream,
    arguments: &[&str],
) -> (Program, tempfile::NamedTempFile) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), Config::new(db, stream).set("database.dsn", db.dsn.as_str()).yaml()).unwrap();
    let mut command = pg_outbox();
    command.args(["migrate", "--adopt"]).args(arguments).arg("--config").arg(file.path());
    (command, file)
}

pub fn adopt(db: &TestDb, stream: &TestStream, arguments: &[&str]) -> Output {
    adopt_command(db, stream, arguments).0.output().unwrap()
}

/// What it printed; it must have worked.
#[track_caller]
pub fn said(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Asserts that everything is ready, and that the daemon (as a dispatcher) publishes what is pending, in order.
pub fn assert_works(db: &TestDb, stream: &TestStream) {
    migrate(shared_postgres(), &db.name);
    let config = Config::new(db, stream);
    let check = check(&config);
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    let published = db.published();
    let pending = db.pending();
    let mut expected = std::collections::HashMap::<String, Vec<String>>::new();
    let rows = db
        .client()
        .query("SELECT outbox_key(topic, metadata), id::text FROM outboxes WHERE published_at IS NULL ORDER BY seq", &[])
        .unwrap();
    for row in rows {
        expected.entry(row.get(0)).or_default().push(row.get(1));
    }
    let daemon = Daemon::start(&config);
    wait_until("all is published", LIMIT, &[&daemon, db], || db.pending() == 0);
    assert_eq!((db.published(), db.dead()), (published + pending, 0));
    // What had been published before stays so.
    assert_eq!(stream.count(), u64::try_from(pending).unwrap());
    let mut seen = std::collections::HashMap::<String, Vec<String>>::new();
    for stored in stream.messages() {
        seen.entry(stored.header("ordering-key").unwrap().to_owned()).or_default().push(stored.msg_id);
    }
    assert_eq!(seen, expected);
}

/// `pg-outbox check` with this configuration.
pub fn check(config: &Config) -> Output {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), config.yaml()).unwrap();
    pg_outbox().args(["check", "--config"]).arg(file.path()).output().unwrap()
}

#[test]
fn a_large_table_is_adopted_under_writers_killed_in_the_middle_and_again() {
    let (db, stream) = (seed_table(), stream());
    fill(&db, ROWS, PENDING);
    let plan = said(&adopt(&db, &stream, &["--dry-run"]));
    assert!(plan.contains("CREATE INDEX CONCURRENTLY") && plan.contains("nothing was changed"), "{plan}");
    assert!(plan.contains("note: index own_index mentions a column that every settle changes"), "{plan}");
    assert_eq!(db.number("SELECT count(*) FROM pg_class WHERE relname = 'outbox_schema'"), 0);
    adopt_under_writers(&db, &stream, || {});
    let own = "SELECT count(*) FROM outboxes WHERE tenant = 7";
    assert!(db.number(own) > ROWS);
    assert_works(&db, &stream);
    // The functions of the seed made room for ours.
    assert_eq!(db.number("SELECT cleanup_old_outbox_events(30)"), 0);
    assert_eq!(db.number("SELECT count(*) FROM pg_proc WHERE proname LIKE '%\\_before_adoption'"), 2);
}

/// Adopts while events are inserted: kills it in the middle, calls `interrupted`, and does it again.
pub fn adopt_under_writers(db: &TestDb, stream: &TestStream, interrupted: impl FnOnce()) {
    let stop = AtomicBool::new(false);
    let slowest = std::thread::scope(|scope| {
        let writing: Vec<_> = (0..3).map(|_| scope.spawn(|| write_until(db, &stop))).collect();
        let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            // Killed as soon as a first index is being built; a partition is made meanwhile, as the seed's users do.
            let (mut command, _file) = adopt_command(db, stream, &[]);
            let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            let building = "SELECT count(*) FROM pg_index WHERE NOT indisvalid AND indexrelid::regclass::text LIKE '%20%by%'";
            wait_until("an index is being built", LIMIT, &[&db_names(db)], || {
                assert!(child.try_wait().unwrap().is_none(), "it ended too early");
                db.number(building) > 0
            });
            child.kill().unwrap();
            child.wait().unwrap();
            assert_eq!(
                db.number("SELECT count(*) FROM outbox_schema WHERE version = 2"),
                0,
                "it was not done"
            );
            interrupted();
            said(&adopt(db, stream, &[]));
            assert_eq!(said(&adopt(db, stream, &[])), "nothing is missing\n");
        }));
        stop.store(true, Ordering::Relaxed);
        let slowest = writing.into_iter().map(|writer| writer.join().unwrap()).max().unwrap();
        worked.unwrap();
        slowest
    });
    assert!(slowest < SLOWEST_INSERT, "an INSERT took {slowest:?}");
}

/// Inserts events until told to stop, each in a transaction of its own; the time that the slowest took.
pub fn write_until(db: &TestDb, stop: &AtomicBool) -> Duration {
    let mut client = db.client();
    let mut slowest = Duration::ZERO;
    while !stop.load(Ordering::Relaxed) {
        let began = Instant::now();
        client
            .batch_execute(
                "INSERT INTO outboxes (id, created_at, topic, metadata, payload)
                 VALUES (gen_random_uuid(), now(), 'order.placed', '{\"ordering-key\": \"w\"}', '{}')",
            )
            .unwrap();
        slowest = slowest.max(began.elapsed());
        std::thread::sleep(Duration::from_millis(5));
    }
    slowest
}

/// A table that may not be an outbox yet says less about itself.
pub struct Names(String);

pub fn db_names(db: &TestDb) -> Names {
    Names(db.name.clone())
}

impl Evidence for Names {
    fn evidence(&self) -> String {
        format!("--- database {}", self.0)
    }
}

#[test]
fn an_adopted_outbox_is_like_one_that_was_made() {
    let (adopted, made, stream) = (seed_table(), database(), stream());
    adopted.execute("ALTER TABLE outboxes DROP COLUMN tenant");
    said(&adopt(&adopted, &stream, &[]));
    assert_alike(&adopted, &made);
    // A writer need not give an id nor a time any more.
    adopted.execute("INSERT INTO outboxes (topic, payload) VALUES ('a', '{}')");
    assert_eq!(said(&adopt(&made, &stream, &[])), "nothing is missing\n");
}

/// Asserts that an adopted outbox has the shape of one that was made.
pub fn assert_alike(adopted: &TestDb, made: &TestDb) {
    for (what, query) in [
        ("columns", "SELECT string_agg(attname || ' ' || format_type(atttypid, atttypmod) || attnotnull || ' ' ||
                            coalesce(pg_get_expr(adbin, adrelid), ''), ', ' ORDER BY attname)
                       FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
                      WHERE attrelid = 'outboxes'::regclass AND attnum > 0 AND NOT attisdropped"),
        ("indexes", "SELECT string_agg(pg_get_indexdef(indexrelid) || indisvalid, E'\n' ORDER BY indexrelid::regclass::text)
                       FROM pg_index WHERE indrelid = 'outboxes'::regclass AND indexrelid <> coalesce(to_regclass('own_index'), 0)"),
        ("functions", "SELECT string_agg(oid::regprocedure || prosecdef::text || coalesce(proconfig::text, ''), ', ' ORDER BY oid::regprocedure::text)
                         FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND proname NOT LIKE '%before_adoption'"),
        ("trigger", "SELECT string_agg(pg_get_triggerdef(oid), ', ') FROM pg_trigger WHERE tgrelid = 'outboxes'::regclass"),
        ("checks", "SELECT string_agg(conname, ', ' ORDER BY conname) FROM pg_constraint
                     WHERE conrelid = 'outboxes'::regclass AND contype = 'c'"),
        ("lanes", "SELECT string_agg(l::text, ' ' ORDER BY lane) FROM outbox_lanes AS l"),
        ("columns of lanes", "SELECT string_agg(attname || ' ' || format_type(atttypid, atttypmod) || attnotnull, ', ' ORDER BY attnum)
                                FROM pg_attribute WHERE attrelid = 'outbox_lanes'::regclass AND attnum > 0"),
        ("parts of indexes", "SELECT string_agg(DISTINCT parts::text, ', ')
                                FROM (SELECT count(*) FILTER (WHERE i.inhrelid IS NOT NULL AND x.indisvalid) AS parts
                                        FROM pg_inherits AS p JOIN pg_index AS x ON x.indrelid = p.inhrelid
                                        LEFT JOIN pg_inherits AS i ON i.inhrelid = x.indexrelid
                                             AND i.inhparent IS DISTINCT FROM to_regclass('own_index')
                                       WHERE p.inhparent = 'outboxes'::regclass GROUP BY p.inhrelid) AS each"),
        ("room on pages", "SELECT string_agg(DISTINCT (SELECT option FROM unnest(c.reloptions) AS option
                                                        WHERE option LIKE 'fillfactor=%'), ', ') || bool_and(reloptions IS NOT NULL)
                             FROM pg_inherits JOIN pg_class AS c ON c.oid = inhrelid WHERE inhparent = 'outboxes'::regclass"),
        ("comments", "SELECT string_agg(pg_describe_object(classoid, objoid, objsubid) || ': ' || description, E'\n'
                                        ORDER BY pg_describe_object(classoid, objoid, objsubid)) FROM pg_description
                       WHERE pg_describe_object(classoid, objoid, objsubid) ~ 'outbox' AND description !~ 'catalog'"),
        ("version", "SELECT max(version)::text FROM outbox_schema"),
    ] {
        let of = |db: &TestDb| db.client().query_one(query, &[]).unwrap().get::<_, Option<String>>(0);
        assert!(of(made).is_some(), "{what}");
        assert_eq!(of(adopted), of(made), "{what}");
    }
}

#[test]
fn rows_that_a_check_would_refuse_are_settled_and_new_ones_refused_once_writers_are_mended() {
    let (db, stream) = (seed_table(), stream());
    fill(&db, 200, 100);
    let insert = |topic: &str, metadata: &str, age: &str| {
        format!(
            "INSERT INTO outboxes (id, created_at, topic, metadata, payload)
             VALUES (gen_random_uuid(), now() - interval '{age}', '{topic}', '{metadata}', '{{}}')"
        )
    };
    // Of long ago, one that no check would let in; of today, one whose writer does not know better.
    db.execute(
        "CREATE TABLE outboxes_old PARTITION OF outboxes FOR VALUES FROM ('2020-01-01') TO ('2025-01-01')",
    );
    db.execute(&format!(
        "{}; UPDATE outboxes SET created_at = '2024-06-01' WHERE topic = 'a..b'",
        insert("a..b", "{}", "0")
    ));
    db.execute(&insert("fine", "null", "0"));
    let told = said(&adopt(&db, &stream, &[]));
    assert!(told.contains("check outboxes_metadata_is_object is left out: 1 rows"), "{told}");
    let checks = "SELECT count(*) FROM pg_constraint WHERE conrelid = 'outboxes'::regclass AND contype = 'c'";
    assert_eq!(db.number(checks), 1);
    migrate(shared_postgres(), &db.name);
    let daemon = Daemon::start(&Config::new(&db, &stream));
    wait_until("nothing is pending", LIMIT, &[&daemon, &db], || db.pending() == 0);
    assert_eq!(db.number("SELECT count(*) FROM outboxes WHERE dead_at IS NOT NULL AND topic = 'a..b'"), 1);
    assert_eq!(db.published(), 201);
    assert!(db.client().batch_execute(&insert("x..y", "{}", "0")).is_err(), "the other check holds");

    // The writer is mended, and its rows are of long ago.
    db.execute("UPDATE outboxes SET created_at = '2024-06-01' WHERE topic = 'fine'");
    let told = said(&adopt(&db, &stream, &[]));
    assert!(told.contains("check outboxes_metadata_is_object for new rows"), "{told}");
    assert_eq!(db.number(checks), 2);
    assert!(db.client().batch_execute(&insert("fine", "null", "0")).is_err());
    db.execute("UPDATE outboxes SET attempts = 5 WHERE topic IN ('fine', 'a..b')");
}

#[test]
fn what_cannot_be_adopted_is_refused_in_clear_words_and_left_as_it_was() {
    let stream = stream();
    let cases = [
        ("ALTER TABLE outboxes ALTER COLUMN payload TYPE json", "column payload is json; it must be jsonb"),
        (
            "ALTER TABLE outboxes ALTER COLUMN attempts TYPE bigint",
            "column attempts is bigint; it must be integer",
        ),
        ("DROP TABLE outboxes; CREATE TABLE outboxes (id uuid PRIMARY KEY)", "not partitioned"),
        ("DROP TABLE outboxes", "run pg-outbox migrate, without --adopt"),
        ("CREATE TABLE outboxes_default (id int)", "outboxes_default is there"),
    ];
    for (change, part) in cases {
        let db = seed_table();
        db.execute(change);
        let output = adopt(&db, &stream, &[]);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && error.contains(part), "{part}: {error}");
        assert_eq!(db.number("SELECT count(*) FROM pg_class WHERE relname = 'outbox_schema'"), 0, "{part}");
    }
    // Without --adopt the table is refused, and the way named.
    let db = seed_table();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), Config::new(&db, &stream).set("database.dsn", db.dsn.as_str()).yaml())
        .unwrap();
    let output = pg_outbox().args(["migrate", "--config"]).arg(file.path()).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && error.contains("pg-outbox migrate --adopt"), "{error}");
}

#[test]
fn a_table_without_partitions_is_moved_as_the_readme_says() {
    let (db, stream) = (seed_table(), stream());
    // The same table, but for its partitions, of which it had none.
    db.execute(
        "ALTER TABLE outboxes RENAME TO partitioned; DROP FUNCTION create_monthly_partition, cleanup_old_outbox_events;
         CREATE TABLE outboxes (LIKE partitioned INCLUDING ALL); DROP TABLE partitioned CASCADE;
         CREATE SEQUENCE plain_seq OWNED BY outboxes.seq; ALTER TABLE outboxes ALTER COLUMN seq SET DEFAULT nextval('plain_seq')",
    );
    fill(&db, 300, 100);
    let (_, recipe) = include_str!("../README.md").split_once("- **A table without partitions**").unwrap();
    let block = recipe.split("```").nth(1).unwrap();
    let statements: Vec<&str> = block.split('\'').skip(1).step_by(2).collect();
    assert_eq!((statements.len(), block.matches("\npg-outbox migrate\n").count()), (2, 1), "{block}");
    db.execute(statements[0]);
    migrate(shared_postgres(), &db.name);
    db.execute(statements[1]);
    assert_eq!((db.pending(), db.published()), (100, 0));
    assert_works(&db, &stream);
}

#[test]
fn a_transaction_in_the_way_is_waited_for_and_keeps_no_writer_waiting() {
    let (db, stream) = (seed_table(), stream());
    fill(&db, 100, 10);
    let mut reader = db.client();
    reader.batch_execute("BEGIN; SELECT FROM outboxes").unwrap();
    let stop = AtomicBool::new(false);
    let slowest = std::thread::scope(|scope| {
        let writing = scope.spawn(|| write_until(&db, &stop));
        let adopting = scope.spawn(|| adopt(&db, &stream, &[]));
        let asks = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
                       AND query LIKE '%adopt%'";
        wait_until("it asks for its lock", LIMIT, &[&db_names(&db)], || db.number(asks) > 0);
        let written = |db: &TestDb| db.number("SELECT last_value FROM outboxes_seq_seq");
        let before = written(&db);
        wait_until("writers go on meanwhile", LIMIT, &[&db_names(&db)], || written(&db) > before + 300);
        reader.batch_execute("COMMIT").unwrap();
        let output = adopting.join().unwrap();
        stop.store(true, Ordering::Relaxed);
        said(&output);
        writing.join().unwrap()
    });
    assert!(slowest < SLOWEST_INSERT, "an INSERT took {slowest:?}");
    assert_works(&db, &stream);
}
