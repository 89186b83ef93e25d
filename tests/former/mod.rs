//! The outbox as it was before the first release: `migrate` says so and changes nothing, `migrate --adopt` takes it, with its
//! rows and their state, and no daemon works on it meanwhile.

use std::process::Output;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::adopt::{
    adopt, adopt_under_writers, assert_alike, assert_works, check, db_names, fill, said, write_until,
};
use super::harness::daemon::pg_outbox;
use super::harness::database::{migrate, shared_postgres};
use super::harness::{Config, Daemon, TestDb, database, stream, wait_until};

const LIMIT: Duration = Duration::from_secs(120);
const FORMER: &str = "has a former shape, from before the first release";
const TO_DO: &str = "Stop every pg-outbox that works on it, and run pg-outbox migrate --adopt";

/// A database with that shape, and with a partition for last month as well.
fn former(order: &str) -> TestDb {
    let db = TestDb::without_schema(shared_postgres());
    let output = shared_postgres()
        .psql(&db.name)
        .env("PGOPTIONS", format!("-c pg_outbox.order={order}"))
        .args([
            "-v",
            "ON_ERROR_STOP=1",
            "-f",
            concat!(env!("CARGO_MANIFEST_DIR"), "/tests/former/schema.sql"),
        ])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    db.execute("SELECT create_monthly_partition('outboxes', ((now() AT TIME ZONE 'UTC') - interval '1 month')::date)");
    db
}

/// Grants the dispatcher what it had there.
fn grant_dispatcher(db: &TestDb) {
    db.execute(
        "GRANT SELECT, UPDATE ON outboxes TO outbox_dispatcher; GRANT SELECT ON outbox_schema TO outbox_dispatcher;
         GRANT SELECT, UPDATE (lane) ON outbox_lanes TO outbox_dispatcher",
    );
}

/// Events in every state, the earlier ones first. All but the last four are of a key of their own.
fn events_in_every_state(db: &TestDb) {
    for (key, set) in [
        ("published", "published_at = now(), attempts = 1"),
        ("retried later", "next_attempt_at = now() + interval '4 minutes', attempts = 2, last_error = 'no'"),
        ("dead", "dead_at = now(), attempts = 3, last_error = 'never'"),
        ("discarded", "dead_at = now(), discarded_at = now(), discarded_by = 'me', discard_reason = 'old'"),
        ("k", "next_attempt_at = now() - interval '1 minute', attempts = 1, last_error = 'no'"),
    ] {
        let seq = db.event("order.placed", key, "{}");
        db.execute(&format!("UPDATE outboxes SET {set} WHERE seq = {seq}"));
    }
    for _ in 0..3 {
        db.event("order.placed", "k", "{}");
    }
}

/// All there is to say of the rows.
fn rows(db: &TestDb) -> String {
    let rows = "SELECT string_agg(tableoid::regclass || o::text, ' ' ORDER BY seq) FROM outboxes AS o";
    db.client().query_one(rows, &[]).unwrap().get(0)
}

/// The relations, functions and constraints there are.
fn objects(db: &TestDb) -> String {
    let objects = "SELECT string_agg(what, ' ' ORDER BY what)
                     FROM (SELECT relname || relfilenode || relacl::text FROM pg_class WHERE relnamespace = 'public'::regnamespace
                           UNION ALL SELECT pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = 'public'::regnamespace
                           UNION ALL SELECT conname FROM pg_constraint WHERE connamespace = 'public'::regnamespace
                           UNION ALL SELECT version || applied_at::text FROM outbox_schema) AS all_of_them(what)";
    db.client().query_one(objects, &[]).unwrap().get(0)
}

fn run_migrate(config: &Config, arguments: &[&str]) -> Output {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), config.yaml()).unwrap();
    pg_outbox().arg("migrate").args(arguments).arg("--config").arg(file.path()).output().unwrap()
}

#[track_caller]
fn assert_refused(output: &Output, parts: &[&str]) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    for part in parts {
        assert!(error.contains(part), "no {part:?} in: {error}");
    }
}

#[test]
fn migrate_and_check_and_the_daemon_say_what_to_do_and_change_nothing() {
    let (db, stream) = (former("key"), stream());
    events_in_every_state(&db);
    grant_dispatcher(&db);
    let before = (rows(&db), objects(&db));
    let config = Config::new(&db, &stream);
    assert_refused(&run_migrate(&config.clone().set("database.dsn", db.dsn.as_str()), &[]), &[FORMER, TO_DO]);
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/schema/001_outbox.sql");
    let output =
        shared_postgres().psql(&db.name).args(["-v", "ON_ERROR_STOP=1", "-f", file]).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains(FORMER) && error.contains(TO_DO), "{error}");

    let problem = "the schema is of version 1, from before the first release: stop every pg-outbox that works on it, and run \
                   `pg-outbox migrate --adopt`";
    let output = check(&config);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let failures: Vec<&str> = text.lines().filter(|line| line.starts_with("FAIL")).collect();
    assert_eq!(
        (failures, output.status.code()),
        (vec![format!("FAIL  schema: {problem}").as_str()], Some(1)),
        "{text}"
    );
    let daemon = Daemon::start(&config);
    let said = format!("schema is not ready: {problem}");
    wait_until("the daemon says so", LIMIT, &[&daemon], || !daemon.log_lines(&said).is_empty());
    let (status, page) = daemon.get("/ready");
    assert!(status == 503 && page.contains("the schema is of version 1"), "{status} {page}");
    assert_eq!((rows(&db), objects(&db)), before);
    assert_eq!(stream.count(), 0);
}

#[test]
fn rows_keep_their_state_and_are_published_in_order() {
    let (db, made, stream) = (former("key"), database(), stream());
    events_in_every_state(&db);
    let before = (rows(&db), objects(&db));
    let plan = said(&adopt(&db, &stream, &["--dry-run"]));
    for part in [
        "take away what the former shape had",
        "DROP TABLE IF EXISTS outbox_lanes;",
        "DROP INDEX outboxes_fresh_by_lane, outboxes_retry_by_lane, outboxes_retry_by_key, outboxes_dead_by_key;",
        "declare index outboxes_by_lane, without building it",
        "SET (fillfactor = 70)",
        "record the version",
        "nothing was changed",
    ] {
        assert!(plan.contains(part), "no {part:?} in: {plan}");
    }
    assert!(!plan.contains("outboxes_discarded_by_time") && !plan.contains("note: index"), "{plan}");
    assert_eq!((rows(&db), objects(&db)), before);

    let done = said(&adopt(&db, &stream, &[]));
    let steps = |text: &str| {
        let words: Vec<&str> = text.split_whitespace().collect();
        let at = words.iter().rposition(|word| word.starts_with("steps;")).unwrap();
        words[at - 1].to_owned()
    };
    assert_eq!(steps(&done), steps(&plan), "{done}\n{plan}");
    assert_eq!(rows(&db), before.0);
    db.execute("SELECT create_monthly_partition('outboxes', '2020-02-01')");
    assert_alike(&db, &made);
    assert_eq!(db.number("SELECT count(*) FROM outbox_schema WHERE version IN (1, 2)"), 2);
    assert_eq!(said(&adopt(&db, &stream, &[])), "nothing is missing\n");

    let config = Config::new(&db, &stream);
    let unready = check(&config);
    let text = String::from_utf8_lossy(&unready.stdout);
    assert!(
        text.contains("permission denied for table outbox_lanes") && text.contains("run schema/roles.sql"),
        "{text}"
    );
    migrate(shared_postgres(), &db.name);
    assert!(check(&config).status.success());
    let daemon = Daemon::start(&config);
    wait_until("what may go is published", LIMIT, &[&daemon, &db], || db.published() == 5);
    let order =
        "SELECT string_agg(id::text, ' ' ORDER BY seq) FROM outboxes WHERE metadata ->> 'ordering-key' = 'k'";
    let order: String = db.client().query_one(order, &[]).unwrap().get(0);
    let seen: Vec<String> = stream.messages().into_iter().map(|stored| stored.msg_id).collect();
    assert_eq!(seen.join(" "), order);
    assert_eq!(
        (db.pending(), db.number("SELECT count(*) FROM outboxes WHERE attempts = 2 AND last_error = 'no'")),
        (1, 1)
    );
    assert_eq!((db.dead(), db.number("SELECT count(*) FROM outboxes WHERE discarded_by = 'me'")), (2, 1));
}

#[test]
fn it_is_adopted_under_writers_killed_in_the_middle_and_again() {
    let (db, stream) = (former("key"), stream());
    fill(&db, 200_000, 2_000);
    adopt_under_writers(&db, &stream, || {
        // A claim of that time, which knew nothing of versions, fails meanwhile.
        let claim = "SELECT lane FROM outbox_lanes WHERE lane = 1 FOR UPDATE SKIP LOCKED";
        let error = db.client().batch_execute(claim).unwrap_err();
        assert_eq!(error.code().map(postgres::error::SqlState::code), Some("42P01"));
        let config = Config::new(&db, &stream).set("database.dsn", db.dsn.as_str());
        assert_refused(&run_migrate(&config, &[]), &[FORMER, TO_DO]);
        let check = check(&config);
        assert!(
            String::from_utf8_lossy(&check.stdout).contains("FAIL  schema: the schema is of version 1"),
            "{check:?}"
        );
    });
    assert_works(&db, &stream);
}

#[test]
fn the_order_that_was_chosen_stays() {
    let stream = stream();
    for (order, keys) in [("topic", "a,a,b"), ("all", ",,"), ("key", "k,a,b")] {
        let db = former(order);
        db.execute(
            "INSERT INTO outboxes (topic, metadata, payload)
             VALUES ('a', '{\"ordering-key\": \"k\"}', '{}'), ('a', NULL, '{}'), ('b', NULL, '{}')",
        );
        let before = objects(&db);
        let other = if order == "key" { "topic" } else { "key" };
        let refused = adopt(&db, &stream, &["--order", other]);
        assert_refused(
            &refused,
            &[&format!("events are ordered by \"{order}\" here, and \"{other}\" was asked for")],
        );
        assert_eq!(objects(&db), before, "{order}");
        // It need not be said, also when the first step was all that was done.
        let plan = said(&adopt(&db, &stream, &["--dry-run"]));
        let first = plan.lines().nth(1).unwrap();
        if order == "all" {
            db.execute(first);
        }
        let arguments = ["--order", order];
        said(&adopt(&db, &stream, if order == "topic" { &arguments } else { &[] }));
        let query = "SELECT string_agg(outbox_key(topic, metadata), ',' ORDER BY seq),
                            bool_and(outbox_key_hash(topic, metadata) = hashtextextended(outbox_key(topic, metadata), 0)),
                            bool_and(outbox_lane(topic, metadata) = hashtextextended(outbox_key(topic, metadata), 0) & 63)
                       FROM outboxes";
        let row = db.client().query_one(query, &[]).unwrap();
        assert_eq!((row.get::<_, String>(0).as_str(), row.get(1), row.get(2)), (keys, true, true), "{order}");
    }
}

#[test]
fn nothing_is_done_while_a_daemon_is_connected_or_a_claim_is_open() {
    let (db, stream) = (former("key"), stream());
    events_in_every_state(&db);
    grant_dispatcher(&db);
    let before = (rows(&db), objects(&db));
    let mut daemon = Daemon::start(&Config::new(&db, &stream).set("dispatcher.instance_id", "north"));
    wait_until("it is connected", LIMIT, &[&daemon], || !daemon.log_lines("schema is not ready").is_empty());
    let words = ["pg-outbox is connected to this database: north (", "stop every instance"];
    assert_refused(&adopt(&db, &stream, &[]), &words);
    let plan = said(&adopt(&db, &stream, &["--dry-run"]));
    assert!(plan.starts_with("note: pg-outbox is connected to this database: north ("), "{plan}");
    assert_eq!((rows(&db), objects(&db)), before);
    daemon.term();
    assert!(daemon.wait_exit(LIMIT).success());

    // A claim is waited for, by nobody else.
    let mut claim = db.client();
    claim.batch_execute("BEGIN; SELECT lane FROM outbox_lanes WHERE lane < 9 FOR UPDATE").unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| write_until(&db, &stop));
        let adopting = scope.spawn(|| adopt(&db, &stream, &[]));
        let asks = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
                       AND query LIKE '%DROP TABLE IF EXISTS outbox_lanes%'";
        wait_until("it waits for the claim", LIMIT, &[&db_names(&db)], || db.number(asks) > 0);
        let written = |db: &TestDb| db.number("SELECT last_value FROM outboxes_seq_seq");
        let first = written(&db);
        wait_until("writers go on meanwhile", LIMIT, &[&db_names(&db)], || written(&db) > first + 200);
        assert_eq!(objects(&db), before.1);
        claim.batch_execute("COMMIT").unwrap();
        let output = adopting.join().unwrap();
        stop.store(true, Ordering::Relaxed);
        said(&output);
        let slowest = writing.join().unwrap();
        assert!(slowest < Duration::from_secs(2), "an INSERT took {slowest:?}");
    });
    assert_alike(&db, &database());
}

/// The outbox that a connection finds by itself is another one, of the present shape.
#[test]
fn one_in_a_schema_of_its_own_is_adopted_there() {
    let (db, stream) = (database(), stream());
    db.execute("CREATE SCHEMA \"the Shop\"");
    let former = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/former/schema.sql");
    let mut psql = shared_postgres().psql(&db.name);
    let output =
        psql.env("PGOPTIONS", "-c search_path=\"the\\ Shop\"").args(["-f", former]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    db.execute(
        "INSERT INTO \"the Shop\".outboxes (topic, payload) SELECT 'a', '{}' FROM generate_series(1, 9)",
    );
    let public = objects(&db);
    let config =
        Config::new(&db, &stream).set("database.dsn", db.dsn.as_str()).set("database.schema", "the Shop");
    assert_refused(&run_migrate(&config, &[]), &["the outbox in schema the Shop has a former shape", TO_DO]);
    let done = said(&run_migrate(&config, &["--adopt"]));
    assert!(done.starts_with("take away what the former shape had"), "{done}");
    assert!(check(&config).status.success());
    assert_eq!(said(&run_migrate(&config, &["--adopt"])), "nothing is missing\n");
    assert_eq!(objects(&db), public);
    assert_eq!(db.number("SELECT last_value FROM \"the Shop\".outbox_sequence()"), 9);
    assert_eq!(db.number("SELECT last_value FROM public.outbox_sequence()"), 0);
}

#[test]
fn what_others_have_built_on_it_is_named_and_nothing_is_changed() {
    let (db, stream) = (former("key"), stream());
    db.execute("CREATE VIEW shown AS SELECT outbox_lane(topic, metadata) AS lane FROM outboxes");
    let before = objects(&db);
    assert_refused(
        &adopt(&db, &stream, &[]),
        &["take away what the former shape had", "view shown depends on function outbox_lane(text,jsonb)"],
    );
    assert_eq!(objects(&db), before);
}
