//! The schema, as writers and operators meet it: what an INSERT needs and gets, what is refused, how months and
//! retention work, and that psql and the program install the same thing.

use std::path::Path;
use std::process::Command;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use pg_outbox::command::migrate::{self, OrderingScope};
use pg_outbox::postgres::{ClaimSettings, Store};
use postgres::Client;

use crate::claim::{claim_from, settings_for};
use crate::harness::database::shared_postgres;
use crate::harness::{TestDb, database, unique, wait_until};

const LIMIT: Duration = Duration::from_secs(20);

fn schema_file() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("schema/001_outbox.sql")
}

fn run_psql(command: &mut Command) {
    let output = command.arg("-f").arg(schema_file()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// What `pg-outbox migrate` prints, or why it failed.
fn run_migrate(dsn: &str, order: Option<OrderingScope>) -> Result<String, String> {
    let mut out = Vec::new();
    migrate::run(&settings_for(dsn), order, &mut out).map_err(|error| format!("{error:#}"))?;
    Ok(String::from_utf8(out).unwrap())
}

/// The schema as text. Newer versions of pg_dump put a random word into two lines.
fn dump(db: &TestDb) -> String {
    let text = pg_dump(db, &["--schema-only"]);
    text.lines().filter(|line| !line.starts_with('\\')).collect::<Vec<_>>().join("\n")
}

/// What pg_dump, of the server that the tests run on, says about a database.
fn pg_dump(db: &TestDb, arguments: &[&str]) -> String {
    let psql = shared_postgres().psql("postgres");
    let mut command = Command::new(Path::new(psql.get_program()).with_file_name("pg_dump"));
    let output = command.args(arguments).args(["-d", &db.dsn]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn store(db: &TestDb) -> Store {
    let settings = ClaimSettings {
        synchronous_commit: false,
        idle_in_transaction_timeout: Duration::from_secs(60),
        ordered: true,
        block_on_dead: false,
        backoff_max: Duration::from_secs(300),
        max_claim_bytes: 1_000_000,
    };
    Store::new(&settings_for(&db.dsn), "schema", settings).unwrap()
}

fn text(client: &mut Client, query: &str) -> String {
    client.query_one(query, &[]).unwrap_or_else(|error| panic!("{query}: {error:?}")).get(0)
}

/// The SQLSTATE and the constraint, if any, of a statement that must fail.
fn refusal(client: &mut Client, statement: &str) -> (String, String) {
    let error = client.batch_execute(statement).expect_err(statement);
    let error = error.as_db_error().unwrap();
    (error.code().code().to_owned(), error.constraint().unwrap_or_default().to_owned())
}

#[test]
fn psql_and_migrate_install_the_same_schema_and_once_is_enough() {
    let postgres = shared_postgres();
    let by_psql = TestDb::without_schema(postgres);
    let by_migrate = TestDb::without_schema(postgres);
    run_psql(&mut postgres.psql(&by_psql.name));
    assert_eq!(run_migrate(&by_migrate.dsn, None).unwrap(), "schema version 2 applied\n");
    let schema = dump(&by_psql);
    assert!(schema.contains("outboxes_by_lane"));
    assert_eq!(schema, dump(&by_migrate));

    // Again, crosswise, while a writer is in the middle of a transaction: nothing changes, nobody waits.
    let mut writer = by_migrate.client();
    writer
        .batch_execute(
            "BEGIN; INSERT INTO outboxes (topic, payload) VALUES ('a', '{}'); LOCK TABLE outbox_lanes",
        )
        .unwrap();
    run_psql(postgres.psql(&by_migrate.name).env("PGOPTIONS", "-c lock_timeout=1s"));
    assert_eq!(run_migrate(&by_migrate.dsn, None).unwrap(), "schema is up to date, at version 2\n");
    assert_eq!(
        run_migrate(&by_psql.dsn, Some(OrderingScope::Key)).unwrap(),
        "schema is up to date, at version 2\n"
    );
    assert_eq!(schema, dump(&by_psql));
    assert_eq!(schema, {
        writer.batch_execute("ROLLBACK").unwrap();
        dump(&by_migrate)
    });
}

#[test]
fn migrations_at_the_same_time_wait_for_each_other() {
    let db = TestDb::without_schema(shared_postgres());
    let start = Barrier::new(6);
    let printed: Vec<String> = std::thread::scope(|scope| {
        let run = || {
            start.wait();
            run_migrate(&db.dsn, None).unwrap()
        };
        let threads: Vec<_> = (0..6).map(|_| scope.spawn(run)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(printed.iter().any(|text| text.contains("applied")), "{printed:?}");
    assert_eq!(db.number("SELECT count(*) FROM outbox_schema"), 1);
    assert_eq!(db.number("SELECT count(*) FROM outbox_lanes"), 64);
}

#[test]
fn migrate_refuses_a_table_that_is_not_its_own_and_leaves_nothing_behind() {
    let db = TestDb::without_schema(shared_postgres());
    db.execute("CREATE TABLE outboxes (id int)");
    let error = run_migrate(&db.dsn, None).unwrap_err();
    assert!(error.contains("42P07") && error.contains("outboxes"), "{error}");
    assert_eq!(db.number("SELECT count(*) FROM pg_class WHERE relname LIKE 'outbox%'"), 1);
    let nowhere = format!("{}&options=-csearch_path%3Dnowhere", with_query(&db.dsn));
    let error = run_migrate(&nowhere, None).unwrap_err();
    assert!(error.contains("search_path is nowhere"), "{error}");
}

fn with_query(dsn: &str) -> String {
    if dsn.contains('?') { dsn.to_owned() } else { format!("{dsn}?sslmode=prefer") }
}

#[test]
fn the_order_is_chosen_once() {
    let keys = "SELECT string_agg(outbox_key(topic, metadata), ',' ORDER BY seq) FROM outboxes";
    for (order, expected, lanes) in [
        (OrderingScope::Key, "k1,a,1,a", 3),
        (OrderingScope::Topic, "a,a,b,a", 2),
        (OrderingScope::All, ",,,", 1),
    ] {
        let db = TestDb::without_schema(shared_postgres());
        run_migrate(&db.dsn, Some(order)).unwrap();
        db.execute(
            r#"INSERT INTO outboxes (topic, metadata, payload) VALUES ('a', '{"ordering-key": "k1"}', '{}'),
               ('a', '{"ordering-key": null}', '{}'), ('b', '{"ordering-key": 1}', '{}'), ('a', NULL, '{}')"#,
        );
        assert_eq!(text(&mut db.client(), keys), expected);
        assert_eq!(db.number("SELECT count(DISTINCT outbox_lane(topic, metadata)) FROM outboxes"), lanes);
        let mut claim = claim_from(&store(&db), 0, 64, 100);
        assert_eq!(claim.take_events().len(), 4, "the lane index is searched in every order");
        for other in [OrderingScope::Key, OrderingScope::Topic, OrderingScope::All] {
            let result = run_migrate(&db.dsn, Some(other));
            assert_eq!(result.is_ok(), other == order, "{order:?} then {other:?}: {result:?}");
        }
    }
}

#[test]
fn lanes_of_keys_never_change() {
    // hashtextextended of the key, and its lower 6 bits. Rows are found by these numbers: one that changes hides events.
    let mut client = database().client();
    let sql = "SELECT outbox_lane('t', m.metadata), outbox_lane($1, NULL), outbox_key_hash('t', m.metadata),
                      outbox_key_hash($1, NULL), hashtextextended($1, 0), (hashtextextended($1, 0) & 63)::int
                 FROM (SELECT jsonb_build_object('ordering-key', $1::text) AS metadata) AS m";
    for (key, hash, lane) in [
        ("a", 3_591_986_179_850_072_241_i64, 49),
        ("b", -1_633_062_336_851_484_768, 32),
        ("order-1", 4_600_028_448_891_172_555, 11),
        ("", -6_939_563_903_564_495_251, 45),
        ("ä", 727_577_435_721_441_419, 11),
        ("k1", -8_407_625_331_169_925_676, 20),
        ("customer/42", 5_130_075_490_246_093_531, 27),
    ] {
        let row = client.query_one(sql, &[&key]).unwrap();
        let lanes: [i32; 3] = [row.get(0), row.get(1), row.get(5)];
        let hashes: [i64; 3] = [row.get(2), row.get(3), row.get(4)];
        assert_eq!((lanes, hashes), ([lane; 3], [hash; 3]), "{key}");
    }
}

#[test]
fn key_and_lane_cost_an_insert_no_function_call() {
    // The index shows it: what the planner looks for is the expression, not the function.
    let mut client = database().client();
    let plan = "EXPLAIN SELECT FROM outboxes WHERE outbox_lane(topic, metadata) = 1 AND outbox_key(topic, metadata) = 'k'
                                               AND outbox_key_hash(topic, metadata) = 7";
    let rows = client.query(plan, &[]).unwrap();
    let plan = rows.iter().map(|row| row.get::<_, String>(0)).collect::<Vec<_>>().join("\n");
    assert!(
        plan.contains("hashtextextended((COALESCE((metadata ->> 'ordering-key'")
            && !plan.contains("outbox_key"),
        "{plan}"
    );
}

#[test]
fn a_role_that_owns_a_schema_installs_and_one_with_insert_alone_writes() {
    let db = TestDb::without_schema(shared_postgres());
    let (owner, writer) = (unique("owner_"), unique("writer_"));
    db.execute(&format!(
        "CREATE ROLE {owner} NOSUPERUSER; CREATE ROLE {writer} NOSUPERUSER;
         CREATE SCHEMA app AUTHORIZATION {owner};
         ALTER DEFAULT PRIVILEGES FOR ROLE {owner} REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC"
    ));
    let mut client = db.client();
    client.batch_execute(&format!("SET ROLE {owner}; SET search_path = app")).unwrap();
    client.batch_execute(&std::fs::read_to_string(schema_file()).unwrap()).unwrap();
    client
        .batch_execute(&format!(
            "GRANT USAGE ON SCHEMA app TO {writer}; GRANT INSERT ON app.outboxes TO {writer};
             SELECT create_monthly_partition('outboxes', '2024-02-01')"
        ))
        .unwrap();

    // Nothing of ours is on its search_path either.
    client.batch_execute(&format!("RESET ROLE; SET ROLE {writer}; SET search_path = public")).unwrap();
    client
        .batch_execute(
            "INSERT INTO app.outboxes (topic, metadata, payload) VALUES ('a', '{\"ordering-key\": \"k\"}', '{}');
             INSERT INTO app.outboxes (created_at, topic, payload) VALUES ('2024-02-03', 'b', '{}')",
        )
        .unwrap();
    assert_eq!(refusal(&mut client, "SELECT FROM app.outboxes").0, "42501");
    assert_eq!(refusal(&mut client, "SELECT setval('app.outboxes_seq_seq', 1)").0, "42501");
    client.batch_execute("RESET ROLE; SET search_path = public").unwrap();
    assert_eq!(
        text(
            &mut client,
            "SELECT string_agg(tableoid::regclass::text, ',' ORDER BY seq) FROM app.outboxes
                                   WHERE topic = 'b'"
        ),
        "app.outboxes_2024_02"
    );
    // The functions find their table from anywhere.
    client.batch_execute("SELECT app.cleanup_old_outbox_events(0)").unwrap();
    assert_eq!(
        text(&mut client, "SELECT app.create_monthly_partition('app.outboxes', '2024-03-09')"),
        "outboxes_2024_03"
    );
}

#[test]
fn everything_the_application_does_works() {
    let db = database();
    let mut client = db.client();
    client
        .execute("INSERT INTO outboxes (topic, metadata, payload) VALUES ('user.created', '{\"a\": 1}', '{\"n\": 1}')", &[])
        .unwrap();
    let mut copy = client.copy_in("COPY outboxes (topic, metadata, payload) FROM STDIN").unwrap();
    std::io::Write::write_all(&mut copy, b"order.placed\t{\"ordering-key\": \"k\"}\t{}\nx\t\\N\t[1]\n")
        .unwrap();
    assert_eq!(copy.finish().unwrap(), 2);
    let operator = "SELECT * FROM outboxes WHERE published_at IS NULL AND attempts > 0
                       AND created_at < NOW() - INTERVAL '5 minutes'";
    assert_eq!(client.query(operator, &[]).unwrap().len(), 0);
    db.execute("UPDATE outboxes SET attempts = 1, created_at = now() - interval '6 minutes' WHERE seq = 2");
    assert_eq!(client.query(operator, &[]).unwrap().len(), 1);
    let row = client
        .query_one(
            "SELECT attempts, published_at IS NULL, last_error IS NULL FROM outboxes WHERE seq = 1",
            &[],
        )
        .unwrap();
    assert_eq!((row.get::<_, i32>(0), row.get::<_, bool>(1), row.get::<_, bool>(2)), (0, true, true));
}

#[test]
fn default_ids_are_version_7_and_in_order_of_time() {
    let db = database();
    let mut client = db.client();
    for _ in 0..50 {
        client.batch_execute("INSERT INTO outboxes (topic, payload) VALUES ('a', '{}')").unwrap();
    }
    let rows = client.query("SELECT id, created_at FROM outboxes ORDER BY seq", &[]).unwrap();
    let ids: Vec<uuid::Uuid> = rows.iter().map(|row| row.get(0)).collect();
    assert!(ids.is_sorted(), "{ids:?}");
    for id in &ids {
        assert_eq!((id.get_version_num(), id.get_variant()), (7, uuid::Variant::RFC4122), "{id}");
    }
    let drift = "SELECT max(abs(extract(epoch FROM created_at) * 1000
                        - ('x' || left(replace(id::text, '-', ''), 12))::bit(48)::bigint))::bigint FROM outboxes";
    assert!(db.number(drift) <= 1_000, "the first 48 bits are milliseconds since 1970");
}

#[test]
fn what_nats_would_refuse_is_refused_at_the_source() {
    let mut client = database().client();
    for topic in ["a", "user.created", "a-b_c.d1", "Größe.ü", "a.b.c.d", "$x", "a\u{a0}b"] {
        client.execute("INSERT INTO outboxes (topic, payload) VALUES ($1, '{}')", &[&topic]).unwrap();
    }
    for topic in [
        "", ".", "a.", ".a", "a..b", "a b", " a", "a ", "a\tb", "a\nb", "a\n", "a\r", "\u{7f}", "\u{1}", "*",
        ">", "a.*", "a.>", "a*b",
    ] {
        let error = client
            .execute("INSERT INTO outboxes (topic, payload) VALUES ($1, '{}')", &[&topic])
            .expect_err(topic);
        let error = error.as_db_error().unwrap();
        assert_eq!(error.constraint(), Some("outboxes_topic_is_literal_subject"), "{topic:?}");
    }
    for metadata in ["[]", "1", "\"a\"", "null", "true"] {
        let statement =
            format!("INSERT INTO outboxes (topic, metadata, payload) VALUES ('a', '{metadata}', '{{}}')");
        assert_eq!(refusal(&mut client, &statement).1, "outboxes_metadata_is_object", "{metadata}");
    }
    assert_eq!(refusal(&mut client, "INSERT INTO outboxes (topic, payload) VALUES ('a', NULL)").0, "23502");
    assert_eq!(
        refusal(&mut client, "INSERT INTO outboxes (topic, payload) VALUES (repeat('a', 256), '{}')").0,
        "22001"
    );
}

/// The bounds of a partition as instants.
const BOUNDS: &str = "SELECT string_agg(pg_get_expr(relpartbound, oid), ';' ORDER BY relname) FROM pg_class
                       WHERE relname LIKE 'outboxes\\_2%' AND relkind = 'r'";

#[test]
fn months_are_those_of_utc_whatever_the_session_thinks() {
    let db = TestDb::without_schema(shared_postgres());
    let mut client = db.client();
    // A day ahead of UTC at its end, with a date style that reads months first.
    client.batch_execute("SET timezone = 'Pacific/Kiritimati'; SET datestyle = 'SQL, DMY'").unwrap();
    client.batch_execute(&std::fs::read_to_string(schema_file()).unwrap()).unwrap();
    let created = text(&mut client, "SELECT create_monthly_partition('outboxes', DATE '29-02-2024')");
    assert_eq!(created, "outboxes_2024_02");
    client.batch_execute("SET timezone = 'UTC'; SET datestyle = 'ISO'").unwrap();
    let bounds = text(&mut client, BOUNDS);
    let first = "FOR VALUES FROM ('2024-02-01 00:00:00+00') TO ('2024-03-01 00:00:00+00');";
    assert!(bounds.starts_with(first), "{bounds}");
    let expected = text(
        &mut client,
        "SELECT string_agg(format('FOR VALUES FROM (%L) TO (%L)', month, month + interval '1 month'), ';' ORDER BY month)
           FROM generate_series(date_trunc('month', now()), now() + interval '3 months', interval '1 month') AS month",
    );
    assert_eq!(bounds.strip_prefix(first), Some(expected.as_str()), "the current month and the next three");
    // The schema's own session settings are as they were.
    client
        .batch_execute(
            "SET timezone = 'Asia/Tokyo'; SELECT create_monthly_partition('outboxes', '2024-05-01')",
        )
        .unwrap();
    assert_eq!(
        text(&mut client, "SELECT current_setting('timezone') || current_setting('lock_timeout')"),
        "Asia/Tokyo0"
    );
}

#[test]
fn a_month_is_made_once_and_takes_its_events_out_of_default() {
    let db = database();
    let store = store(&db);
    let mut client = db.client();
    client
        .batch_execute(
            "INSERT INTO outboxes (created_at, topic, payload) VALUES
             ('2024-01-31 23:59:59.999999+00', 'before', '{}'), ('2024-02-01 00:00:00+00', 'first', '{}'),
             ('2024-02-29 23:59:59.999999+00', 'last', '{}'), ('2024-03-01 00:00:00+00', 'after', '{}'),
             ('infinity', 'never', '{}')",
        )
        .unwrap();
    let before = text(&mut client, "SELECT string_agg(o::text, ' ' ORDER BY seq) FROM outboxes o");
    let sql = "SELECT create_monthly_partition('outboxes', '2024-02-01')";
    assert_eq!(text(&mut client, sql), "outboxes_2024_02");
    assert_eq!(text(&mut client, sql), "outboxes_2024_02", "the second time does nothing");
    assert_eq!(text(&mut client, "SELECT string_agg(o::text, ' ' ORDER BY seq) FROM outboxes o"), before);
    assert_eq!(
        text(
            &mut client,
            "SELECT string_agg(topic || '=' || tableoid::regclass, ' ' ORDER BY seq) FROM outboxes"
        ),
        "before=outboxes_default first=outboxes_2024_02 last=outboxes_2024_02 after=outboxes_default never=outboxes_default"
    );
    let mut claim = claim_from(&store, 0, 64, 100);
    assert_eq!(claim.take_events().len(), 5);
    // A partition like the others: its indexes belong to the table's, and its checks are there.
    let shape = "SELECT string_agg(format('%s %s', (SELECT count(*) FROM pg_inherits i JOIN pg_index x ON x.indexrelid = i.inhrelid WHERE x.indrelid = c.oid),
                                          (SELECT count(*) FROM pg_constraint WHERE conrelid = c.oid AND contype = 'c')), ',')
                   FROM pg_class c WHERE relname IN ('outboxes_2024_02', 'outboxes_default')";
    assert_eq!(text(&mut client, shape), "6 2,6 2");
    for (arguments, code) in [
        ("'nowhere', '2024-02-01'", "42P01"),
        ("'outbox_lanes', '2024-02-01'", "42809"),
        ("'outboxes', NULL", "22023"),
        ("'outboxes', 'infinity'", "22023"),
    ] {
        assert_eq!(refusal(&mut client, &format!("SELECT create_monthly_partition({arguments})")).0, code);
    }
    client.batch_execute("CREATE TABLE outboxes_2024_03 ()").unwrap();
    assert_eq!(refusal(&mut client, "SELECT create_monthly_partition('outboxes', '2024-03-01')").0, "42P07");
}

#[test]
fn making_a_month_gives_way_to_an_open_claim() {
    let db = database();
    let store = store(&db);
    db.event("order.placed", "k", "{}");
    let claim = claim_from(&store, 0, 64, 100);
    let started = Instant::now();
    std::thread::scope(|scope| {
        let month = scope.spawn(|| {
            refusal(&mut db.client(), "SELECT create_monthly_partition('outboxes', '2024-02-01')").0
        });
        // Meanwhile writers and other claims get through, time and again.
        let mut client = db.client();
        while !month.is_finished() {
            let before = Instant::now();
            client.batch_execute("INSERT INTO outboxes (topic, payload) VALUES ('a', '{}')").unwrap();
            drop(claim_from(&store, 0, 64, 100));
            assert!(before.elapsed() < Duration::from_secs(2), "stood still for {:?}", before.elapsed());
        }
        assert_eq!(month.join().unwrap(), "55P03");
    });
    assert!(started.elapsed() < LIMIT, "{:?}", started.elapsed());
    assert_eq!(db.number("SELECT count(*) FROM pg_class WHERE relname = 'outboxes_2024_02'"), 0);

    // And goes through when the claim ends while it tries.
    std::thread::scope(|scope| {
        let month = scope
            .spawn(|| text(&mut db.client(), "SELECT create_monthly_partition('outboxes', '2024-02-01')"));
        wait_until("it waits for the claim", LIMIT, &[&db], || {
            db.number(
                "SELECT count(*) FROM pg_stat_activity
                  WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%create_monthly%'",
            ) == 1
        });
        claim.release().unwrap();
        assert_eq!(month.join().unwrap(), "outboxes_2024_02");
    });
}

#[test]
fn two_who_make_the_same_month_both_get_it() {
    let db = database();
    let start = Barrier::new(4);
    std::thread::scope(|scope| {
        let make = || {
            let mut client = db.client();
            start.wait();
            assert_eq!(
                text(&mut client, "SELECT create_monthly_partition('outboxes', '2024-02-01')"),
                "outboxes_2024_02"
            );
        };
        (0..4)
            .map(|_| scope.spawn(make))
            .collect::<Vec<_>>()
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
    });
}

#[test]
fn cleanup_deletes_old_published_events_and_nothing_else() {
    let db = database();
    db.execute(
        "INSERT INTO outboxes (created_at, topic, payload, published_at, dead_at, next_attempt_at) VALUES
         (now() - interval '40 days', 'old',         '{}', now() - interval '40 days', NULL, NULL),
         (now() - interval '40 days', 'just-now',    '{}', now(), NULL, NULL),
         (now() - interval '40 days', 'pending',     '{}', NULL, NULL, NULL),
         (now() - interval '40 days', 'retried',     '{}', NULL, NULL, now()),
         (now() - interval '40 days', 'dead',        '{}', NULL, now() - interval '39 days', NULL),
         (now() - interval '20 days', 'recent',      '{}', now() - interval '20 days', NULL, NULL)",
    );
    let topics = "SELECT string_agg(topic, ' ' ORDER BY seq) FROM outboxes";
    assert_eq!(db.number("SELECT cleanup_old_outbox_events()"), 1);
    assert_eq!(text(&mut db.client(), topics), "just-now pending retried dead recent");
    assert_eq!(db.number("SELECT cleanup_old_outbox_events(30)"), 0);
    assert_eq!(db.number("SELECT cleanup_old_outbox_events(10)"), 1);
    assert_eq!(db.number("SELECT cleanup_old_outbox_events(days => 0)"), 1);
    assert_eq!(text(&mut db.client(), topics), "pending retried dead");
    for days in ["-1", "NULL"] {
        assert_eq!(
            refusal(&mut db.client(), &format!("SELECT cleanup_old_outbox_events({days})")).0,
            "22023"
        );
    }
}

#[test]
fn cleanup_goes_in_bounded_batches() {
    let db = database();
    db.execute(
        "INSERT INTO outboxes (created_at, topic, payload, published_at)
         SELECT now() - interval '40 days', 'a', '{}', now() - interval '40 days' FROM generate_series(1, 10005)",
    );
    // A row that somebody holds is left for the next time.
    let mut other = db.client();
    other.batch_execute("BEGIN; SELECT FROM outboxes WHERE seq = 1 FOR UPDATE").unwrap();
    let batches: Vec<i64> = (0..3).map(|_| db.number("SELECT cleanup_old_outbox_events(30)")).collect();
    assert_eq!(batches, [10_000, 4, 0]);
    other.batch_execute("ROLLBACK").unwrap();
    assert_eq!(db.number("SELECT cleanup_old_outbox_events(30)"), 1);
}

#[test]
fn a_dump_restores_elsewhere() {
    let (from, to) = (database(), TestDb::without_schema(shared_postgres()));
    from.events("order.placed", 10, 3);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), pg_dump(&from, &[])).unwrap();
    let output = shared_postgres().psql(&to.name).arg("-f").arg(file.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(to.pending(), 10);
    assert_eq!(claim_from(&store(&to), 0, 64, 100).take_events().len(), 10);
}

#[test]
fn check_names_what_the_schema_lacks() {
    let db = database();
    let store = store(&db);
    assert_eq!(store.schema_problems().unwrap(), Vec::<String>::new());
    assert!(store.server_version().unwrap() >= 140_000);
    db.execute(
        "DROP INDEX outboxes_retry_by_key; ALTER TABLE outboxes DROP COLUMN last_error; DROP TABLE outboxes_default;
         DELETE FROM outbox_lanes WHERE lane < 4",
    );
    assert_eq!(
        store.schema_problems().unwrap(),
        [
            "column outboxes.last_error is missing; run `pg-outbox migrate --adopt`",
            "index outboxes_retry_by_key is missing; run `pg-outbox migrate --adopt`",
            "DEFAULT partition of table outboxes is missing; run `pg-outbox migrate --adopt`",
            "4 of 64 rows of table outbox_lanes is missing; run `pg-outbox migrate`",
        ]
    );
    let empty = self::store(&TestDb::without_schema(shared_postgres()));
    assert_eq!(
        empty.schema_problems().unwrap(),
        [
            "table outboxes is missing; run `pg-outbox migrate`",
            "table outbox_lanes is missing; run `pg-outbox migrate`",
            "table outbox_schema is missing; run `pg-outbox migrate`",
        ]
    );
}
