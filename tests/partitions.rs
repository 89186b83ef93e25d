//! Partitions and retention: what the daemon does by itself, what `pg-outbox partitions` does, and what neither does.

use std::process::Output;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::counting::set_marks;
use crate::harness::daemon::pg_outbox;
use crate::harness::{Config, Daemon, TestDb, database, stream, unique, wait_until};

const LIMIT: Duration = Duration::from_secs(30);
/// Longest time that an insert may take beside somebody who wants to drop a partition: a lock's 100 ms, and the noise of
/// a busy machine.
const INSERT_LIMIT: Duration = Duration::from_millis(600);

/// Partitions for this month and those from `oldest` months ago on.
fn make_old_partitions(db: &TestDb, oldest: i32) {
    db.execute(&format!(
        "SELECT create_monthly_partition('outboxes', ((now() AT TIME ZONE 'UTC')::date - make_interval(months => n))::date)
           FROM generate_series(0, {oldest}) n"
    ));
}

/// Inserts `count` events that were created `days` days ago, and sets `state` of each.
fn old_events(db: &TestDb, days: i32, count: i32, state: &str) {
    db.execute(&format!(
        "INSERT INTO outboxes (created_at, topic, metadata, payload)
         SELECT now() - interval '{days} days', 'order.placed', '{{\"age\": {days}}}', '{{}}'
           FROM generate_series(1, {count});
         UPDATE outboxes SET {state} WHERE metadata ->> 'age' = '{days}' AND published_at IS NULL"
    ));
}

const PUBLISHED: &str = "published_at = created_at + interval '1 second'";
const DEAD: &str = "dead_at = created_at + interval '1 second', last_error = 'refused'";
const RETRY: &str = "next_attempt_at = now() + interval '1 day'";

/// The partition of the day so many days ago.
fn partition_of(db: &TestDb, days: i32) -> String {
    let query = format!(
        "SELECT to_char((now() - interval '{days} days') AT TIME ZONE 'UTC', '\"outboxes_\"YYYY\"_\"MM')"
    );
    db.client().query_one(&query, &[]).unwrap().get(0)
}

fn exists(db: &TestDb, table: &str) -> bool {
    db.number(&format!("SELECT count(*) FROM pg_class WHERE relname = '{table}'")) == 1
}

fn partitions(config: &Config, arguments: &[&str]) -> Output {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), config.yaml()).unwrap();
    pg_outbox().arg("--config").arg(file.path()).arg("partitions").args(arguments).output().unwrap()
}

#[track_caller]
fn printed(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{:?}: {stderr}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A role that may log in and nothing else: its name, and its connection string.
fn login_role(db: &TestDb) -> (String, String) {
    let role = unique("service_");
    let (user, rest) = db.dsn.strip_prefix("postgresql://").unwrap().split_once(':').unwrap();
    assert_eq!(user, "postgres");
    let (password, _) = rest.split_once('@').unwrap();
    db.execute(&format!("CREATE ROLE {role} LOGIN PASSWORD '{password}'"));
    (role.clone(), format!("postgresql://{role}:{rest}"))
}

/// Ends the writers of a test in whatever way it ends.
struct SetAtEnd<'a>(&'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_role_that_owns_nothing_keeps_the_partitions_up() {
    let (db, stream) = (database(), stream());
    make_old_partitions(&db, 4);
    old_events(&db, 100, 20, PUBLISHED);
    old_events(&db, 95, 1, PUBLISHED);
    let old = partition_of(&db, 100);
    // Next month's partition is missing, and so is the one of 14 months ago, of which DEFAULT has an event.
    let next = partition_of(&db, -32);
    db.execute(&format!("DROP TABLE {next}"));
    old_events(&db, 425, 1, DEAD);
    let fallen = partition_of(&db, 425);
    assert_eq!(db.number("SELECT count(*) FROM outboxes_default"), 1);

    let config = Config::new(&db, &stream).set("partitions.premake", 5);
    let daemon = Daemon::start(&config);
    wait_until("a round of upkeep is done", LIMIT, &[&daemon], || {
        daemon.metric("outbox_upkeep_last_success_timestamp_seconds") > 0.0
    });
    for days in [-32, -63, -94, -125] {
        assert!(exists(&db, &partition_of(&db, days)), "no partition of {days} days ago");
    }
    assert!(!exists(&db, &old), "{old} is still there");
    assert!(daemon.metric("outbox_partitions_dropped_total") >= 3.0);
    // What had fallen into DEFAULT is where it belongs, and still a dead letter.
    assert_eq!(db.number(&format!("SELECT count(*) FROM {fallen} WHERE dead_at IS NOT NULL")), 1);
    assert_eq!(daemon.metric("outbox_default_partition_rows"), 0.0);
    let ahead = daemon.metric("outbox_partitions_ahead_days");
    assert!((150.0..190.0).contains(&ahead), "{ahead}");
    assert!(daemon.log_lines("upkeep of the partitions failed").is_empty(), "{}", daemon.log());
}

#[test]
fn a_role_without_the_grant_is_told_what_to_grant_and_publishes_all_the_same() {
    let (db, stream) = (database(), stream());
    let (role, dsn) = login_role(&db);
    db.execute(&format!("GRANT SELECT, UPDATE ON outboxes, outbox_lanes TO {role}"));
    let daemon = Daemon::start(&Config::new(&db, &stream).set("database.dsn", dsn));
    db.events("order.placed", 10, 3);
    wait_until("all is published", LIMIT, &[&db, &daemon], || db.published() == 10);
    wait_until("it says what to grant", LIMIT, &[&daemon], || {
        !daemon.log_lines("grant the service's role EXECUTE on the functions outbox_*partition*").is_empty()
    });
}

#[test]
fn a_pending_event_and_a_dead_letter_are_never_deleted_however_old() {
    let (db, stream) = (database(), stream());
    make_old_partitions(&db, 6);
    for (days, state) in [(200, DEAD), (160, RETRY), (130, PUBLISHED)] {
        old_events(&db, days, 3, state);
        old_events(&db, days - 1, 3, PUBLISHED);
    }
    // A gone stream keeps the pending one pending.
    let config = Config::new(&db, &stream).set("nats.jetstream.stream_name", "GONE");
    db.execute(
        "INSERT INTO outboxes (created_at, topic, payload) VALUES (now() - interval '70 days', 'a', '{}')",
    );
    let daemon = Daemon::start(&config);
    wait_until("a round of upkeep is done", LIMIT, &[&daemon], || {
        daemon.metric("outbox_upkeep_last_success_timestamp_seconds") > 0.0
    });
    assert!(exists(&db, &partition_of(&db, 200)) && exists(&db, &partition_of(&db, 160)));
    assert!(exists(&db, &partition_of(&db, 70)) && !exists(&db, &partition_of(&db, 130)));
    assert_eq!((db.dead(), db.pending()), (3, 4));
    // Of what stays, the published events went one by one.
    assert_eq!(db.published(), 0);
    assert!(daemon.metric("outbox_events_deleted_total") >= 6.0);
    assert_eq!(daemon.log_lines("it has dead letters").len(), 1, "{}", daemon.log());
    assert_eq!(daemon.log_lines("it has pending events").len(), 2, "{}", daemon.log());
}

/// Marks say that all before them is settled, and what they do not know of (a row that somebody set back, or that a
/// replication brought) is for the sweep to find, before anything else happens to it.
#[test]
fn an_event_that_the_marks_have_passed_keeps_its_partition_and_is_published() {
    let (db, stream) = (database(), stream());
    make_old_partitions(&db, 4);
    old_events(&db, 100, 5, PUBLISHED);
    old_events(&db, 70, 5, PUBLISHED);
    set_marks(&db, "(SELECT last_value FROM outbox_sequence())");
    let (old, passed) = (partition_of(&db, 70), partition_of(&db, 100));
    db.execute(&format!("UPDATE {passed} SET published_at = NULL WHERE seq = 3"));
    let config = Config::new(&db, &stream);
    let said = printed(&partitions(&config, &["drop"]));
    assert!(said.contains(&format!("kept {passed}: it has pending events")), "{said}");
    assert!(
        said.contains(&format!("dropped {old}\n")) && exists(&db, &passed) && !exists(&db, &old),
        "{said}"
    );
    let daemon = Daemon::start(&config);
    wait_until("it is published", LIMIT, &[&db, &daemon], || db.pending() == 0);
    assert_eq!(stream.count(), 1);
    assert!(printed(&partitions(&config, &["drop"])).contains(&format!("dropped {passed}\n")));
}

#[test]
fn months_that_are_partly_old_lose_what_is_old_in_bounded_steps() {
    let (db, stream) = (database(), stream());
    make_old_partitions(&db, 3);
    // Too old by retention but not as a whole month; of about ten steps' size.
    db.execute(
        "INSERT INTO outboxes (created_at, topic, payload, published_at)
         SELECT now() - interval '40 hours', 'order.placed', jsonb_build_object('filler', repeat('x', 900)), now() - interval '40 hours'
           FROM generate_series(1, 20000)",
    );
    old_events(&db, 0, 50, PUBLISHED);
    // Old, but published a moment ago.
    db.execute(
        "INSERT INTO outboxes (created_at, topic, payload, published_at)
         VALUES (now() - interval '40 hours', 'order.placed', '{}', now())",
    );
    let daemon = Daemon::start(&Config::new(&db, &stream).set("partitions.retention", "1day"));
    wait_until("a round of upkeep is done", LIMIT, &[&daemon], || {
        daemon.metric("outbox_upkeep_last_success_timestamp_seconds") > 0.0
    });
    assert_eq!(db.number("SELECT count(*) FROM outboxes"), 51);
    assert_eq!(daemon.metric("outbox_events_deleted_total"), 20_000.0);
    let mut client = db.client();
    client.batch_execute("INSERT INTO outboxes (created_at, topic, payload, published_at)
         SELECT now() - interval '40 hours', 'order.placed', jsonb_build_object('filler', repeat('x', 900)), now() - interval '40 hours'
           FROM generate_series(1, 20000)").unwrap();
    let step = "SELECT deleted, next_block FROM outbox_clean_partition($1::text::name, 0, '1 day')";
    let row = client.query_one(step, &[&partition_of(&db, 2)]).unwrap();
    let (deleted, next): (i64, Option<i64>) = (row.get(0), row.get(1));
    assert!(deleted < 5_000 && next == Some(256), "{deleted} {next:?}");
}

#[test]
fn retention_off_keeps_everything() {
    let (db, stream) = (database(), stream());
    make_old_partitions(&db, 4);
    old_events(&db, 100, 5, PUBLISHED);
    let config = Config::new(&db, &stream).set("partitions.retention", "off");
    let daemon = Daemon::start(&config);
    wait_until("a round of upkeep is done", LIMIT, &[&daemon], || {
        daemon.metric("outbox_upkeep_last_success_timestamp_seconds") > 0.0
    });
    assert_eq!(db.published(), 5);
    assert!(exists(&db, &partition_of(&db, 100)));
    let output = partitions(&config, &["drop"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("partitions.retention is off"), "{output:?}");
}

#[test]
fn one_instance_at_a_time_looks_after_the_partitions() {
    let (db, stream) = (database(), stream());
    make_old_partitions(&db, 4);
    let mut other = db.client();
    other.batch_execute("BEGIN").unwrap();
    assert!(other.query_one(include_str!("../src/postgres/upkeep_turn.sql"), &[]).unwrap().get::<_, bool>(0));
    let config = Config::new(&db, &stream);
    let daemon = Daemon::start(&config);
    wait_until("it sees that another is at it", LIMIT, &[&daemon], || {
        !daemon.log_lines("another instance is at it").is_empty()
    });
    assert!(exists(&db, &partition_of(&db, 100)));
    assert_eq!(daemon.metric("outbox_upkeep_last_success_timestamp_seconds"), 0.0);
    // The gauges are there all the same.
    wait_until("it knows how far partitions go", LIMIT, &[&daemon], || {
        daemon.metric("outbox_partitions_ahead_days") > 80.0
    });
    drop(other);
    let second = Daemon::start(&config);
    wait_until("the next one gets its turn", LIMIT, &[&second], || !exists(&db, &partition_of(&db, 100)));
}

#[test]
fn writers_go_on_while_a_partition_waits_to_be_dropped() {
    let (db, stream) = (database(), stream());
    make_old_partitions(&db, 4);
    old_events(&db, 100, 10, PUBLISHED);
    let old = partition_of(&db, 100);
    let config = Config::new(&db, &stream).set("partitions.retention", "60d");
    // A writer whose transaction stays open holds its lock on the table.
    let mut writer = db.client();
    writer
        .batch_execute("BEGIN; INSERT INTO outboxes (topic, payload) VALUES ('order.placed', '{}')")
        .unwrap();
    let done = AtomicBool::new(false);
    let (slowest, inserts, output) = std::thread::scope(|scope| {
        let inserter = scope.spawn(|| {
            let (mut client, mut slowest, mut inserts) = (db.client(), Duration::ZERO, 0);
            while !done.load(Ordering::Relaxed) {
                let started = Instant::now();
                client
                    .execute("INSERT INTO outboxes (topic, payload) VALUES ('order.placed', '{}')", &[])
                    .unwrap();
                slowest = slowest.max(started.elapsed());
                inserts += 1;
            }
            (slowest, inserts)
        });
        let end = SetAtEnd(&done);
        let output = partitions(&config, &["drop"]);
        drop(end);
        let (slowest, inserts) = inserter.join().unwrap();
        (slowest, inserts, output)
    });
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains(&format!("kept {old}: its locks were not free")), "{said}");
    assert!(slowest < INSERT_LIMIT && inserts > 20, "{inserts} inserts, the slowest took {slowest:?}");
    assert!(exists(&db, &old));
    writer.batch_execute("COMMIT").unwrap();
    assert!(printed(&partitions(&config, &["drop"])).contains(&format!("dropped {old}\n")));
    assert!(!exists(&db, &old));
}

/// Claims and writers are at work all the time, and the partition goes nevertheless; nothing is lost or refused.
#[test]
fn a_partition_is_dropped_and_one_made_under_load() {
    let (db, stream) = (database(), stream());
    make_old_partitions(&db, 4);
    old_events(&db, 100, 10, PUBLISHED);
    let config =
        Config::new(&db, &stream).set("partitions.retention", "60d").set("dispatcher.batch_size", 20);
    let this_month = partition_of(&db, 0);
    let daemon = Daemon::start(&config);
    daemon.wait_ready();
    let done = AtomicBool::new(false);
    let inserted = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..3)
            .map(|writer| {
                let (db, done) = (&db, &done);
                scope.spawn(move || {
                    let mut client = db.client();
                    let insert = format!(
                        "INSERT INTO outboxes (topic, metadata, payload)
                         VALUES ('order.placed', '{{\"ordering-key\": \"k{writer}\"}}', '{{}}')"
                    );
                    let mut inserted = 0;
                    while !done.load(Ordering::Relaxed) {
                        inserted += client.execute(&insert, &[]).unwrap();
                    }
                    inserted
                })
            })
            .collect();
        let end = SetAtEnd(&done);
        let mut admin = db.client();
        // This month's partition goes and comes again under the writers, and its rows move along.
        admin
            .batch_execute(&format!(
                "BEGIN; LOCK TABLE outboxes; ALTER TABLE outboxes DETACH PARTITION {this_month};
                 ALTER TABLE {this_month} RENAME TO aside; INSERT INTO outboxes SELECT * FROM aside;
                 DROP TABLE aside; COMMIT"
            ))
            .unwrap();
        wait_until("the month is made again", LIMIT, &[&db], || {
            partitions(&config, &["create"]).status.success()
        });
        wait_until("the old partition is gone", LIMIT, &[&db], || {
            partitions(&config, &["drop"]).status.success() && !exists(&db, &partition_of(&db, 100))
        });
        drop(end);
        writers.into_iter().map(|writer| i64::try_from(writer.join().unwrap()).unwrap()).sum::<i64>()
    });
    assert_eq!(db.number("SELECT count(*) FROM outboxes_default"), 0);
    assert!(exists(&db, &this_month));
    assert_eq!(db.number("SELECT count(*) FROM outboxes"), inserted);
    wait_until("all is published", LIMIT, &[&db, &daemon], || db.published() == inserted);
}

#[test]
fn the_command_lists_makes_and_drops() {
    let (db, stream) = (database(), stream());
    make_old_partitions(&db, 4);
    old_events(&db, 100, 1, PUBLISHED);
    old_events(&db, 70, 1, DEAD);
    let config = Config::new(&db, &stream);
    let (old, kept, next) = (partition_of(&db, 100), partition_of(&db, 70), partition_of(&db, -32));
    db.execute(&format!("DROP TABLE {next}"));

    let table = printed(&partitions(&config, &["list"]));
    let line = |name: &str| {
        table.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}: {table}"))
    };
    assert!(line(&old).ends_with("nothing: to be dropped"), "{table}");
    assert!(line(&kept).ends_with("dead letters"), "{table}");
    assert!(line(&partition_of(&db, 0)).ends_with("its time"), "{table}");
    assert!(line("outboxes_default").ends_with("events without a partition"), "{table}");
    let json: serde_json::Value =
        serde_json::from_str(&printed(&partitions(&config, &["list", "--json"]))).unwrap();
    let entry = json.as_array().unwrap().iter().find(|entry| entry["name"] == *kept).unwrap();
    assert_eq!((&entry["holds"], &entry["is_old"]), (&"dead".into(), &true.into()));

    let month = |name: &str| name.replace("outboxes_", "").replace('_', "-");
    let made = printed(&partitions(&config, &["create", "--dry-run"]));
    assert_eq!(made, format!("would make the partition of {}\n", month(&next)));
    assert!(!exists(&db, &next));
    let made = printed(&partitions(&config, &["create"]));
    assert_eq!(made, format!("partition of {} is there: {next}\n", month(&next)));
    assert!(printed(&partitions(&config, &["create"])).starts_with("nothing to make"));
    printed(&partitions(&config, &["create", "--month", "2019-02"]));
    assert!(exists(&db, "outboxes_2019_02"));
    let wrong = partitions(&config, &["create", "--month", "2019-13"]);
    assert!(
        !wrong.status.success() && String::from_utf8_lossy(&wrong.stderr).contains("is not a month"),
        "{wrong:?}"
    );

    let dropped = printed(&partitions(&config, &["drop", "--dry-run"]));
    assert!(dropped.contains(&format!("would drop {old}\n")), "{dropped}");
    assert!(dropped.contains(&format!("kept {kept}: it has dead letters")), "{dropped}");
    assert!(exists(&db, &old));
    let dropped = printed(&partitions(&config, &["drop"]));
    assert!(
        dropped.contains(&format!("dropped {old}\n")) && dropped.contains("dropped outboxes_2019_02\n"),
        "{dropped}"
    );
    assert!(!exists(&db, &old) && exists(&db, &kept));
}

#[test]
fn the_functions_refuse_strangers_and_what_is_not_the_outbox() {
    let db = database();
    db.execute("CREATE TABLE accounts (n int); CREATE TABLE \"outboxes_x; DROP TABLE accounts\" (n int)");
    let stranger = unique("stranger_");
    db.execute(&format!("CREATE ROLE {stranger} LOGIN; GRANT SELECT, INSERT ON outboxes TO {stranger}"));
    let code = |client: &mut postgres::Client, statement: &str| {
        let error = client.batch_execute(statement).unwrap_err();
        error.code().unwrap_or_else(|| panic!("{statement}: {error}")).code().to_owned()
    };
    let mut client = db.client();
    for table in ["accounts", "outboxes", "outbox_lanes", "outboxes_x; DROP TABLE accounts", "no_such"] {
        let drop = format!("SELECT outbox_drop_partition('{table}', '30 days')");
        assert_eq!(code(&mut client, &drop), "42P01", "{table}");
        let clean = format!("SELECT outbox_clean_partition('{table}', 0, '30 days')");
        assert_eq!(code(&mut client, &clean), "42P01", "{table}");
    }
    let this_month = partition_of(&db, 0);
    for retention in ["'0 days'", "'-5 days'", "NULL"] {
        assert_eq!(
            code(&mut client, &format!("SELECT outbox_drop_partition('{this_month}', {retention})")),
            "22023"
        );
    }
    let answer: String = client
        .query_one(&format!("SELECT outbox_drop_partition('{this_month}', '1 day')"), &[])
        .unwrap()
        .get(0);
    assert_eq!(answer, "young");
    client.batch_execute(&format!("SET ROLE {stranger}")).unwrap();
    for call in [
        "outbox_partition_holds('outboxes_default')",
        "outbox_partition_state()",
        "outbox_missing_partitions(1)",
        "outbox_create_partition('2019-01-01')",
        "outbox_drop_partition('outboxes_default', '30 days')",
        "outbox_clean_partition('outboxes_default', 0, '30 days')",
    ] {
        assert_eq!(code(&mut client, &format!("SELECT {call}")), "42501", "{call}");
    }
}
