//! What a role, a database or a server may have set for itself: limits on statements and sessions, isolation, dates,
//! encodings, row-level security. The daemon either does not care, or says what is wrong.

use std::thread;
use std::time::Duration;

use pg_outbox::lab::sandbox::Stop;

use super::delivery::wait_drained;
use super::harness::daemon::pg_outbox;
use super::harness::database::{grant_roles, shared_postgres, start_postgres};
use super::harness::{Config, Daemon, TestDb, database, secrets, stream, wait_until};

const LIMIT: Duration = Duration::from_secs(60);

/// Runs a command of ours with this configuration; returns whether it succeeded, and all that it printed.
fn run(config: &Config, arguments: &[&str]) -> (bool, String) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.yaml");
    std::fs::write(&file, config.yaml()).unwrap();
    let output = pg_outbox().args(arguments).arg("--config").arg(&file).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(said).unwrap())
}

/// Sets things for every session of a database that begins from now on.
fn set_for(db: &TestDb, settings: &[(&str, &str)]) {
    let mut session = db.client();
    for (name, value) in settings {
        session.batch_execute(&format!("ALTER DATABASE {} SET {name} = '{value}'", db.name)).unwrap();
    }
}

#[test]
fn what_a_role_has_set_for_itself_does_no_harm() {
    let (db, stream) = (TestDb::without_schema(shared_postgres()), stream());
    let mut settings = vec![
        ("default_transaction_isolation", "serializable"),
        ("default_transaction_read_only", "on"),
        ("lock_timeout", "1s"),
        ("statement_timeout", "2s"),
        ("idle_in_transaction_session_timeout", "2s"),
        ("timezone", "Pacific/Apia"),
        ("datestyle", "German, DMY"),
        ("intervalstyle", "sql_standard"),
        ("bytea_output", "escape"),
        ("standard_conforming_strings", "off"),
        ("client_encoding", "LATIN1"),
        ("extra_float_digits", "-15"),
        ("quote_all_identifiers", "on"),
        ("enable_nestloop", "off"),
    ];
    // Since PostgreSQL 17.
    let limits_transactions = "SELECT count(*) FROM pg_settings WHERE name = 'transaction_timeout'";
    let limits_transactions = db.number(limits_transactions) == 1;
    if limits_transactions {
        settings.push(("transaction_timeout", "2500ms"));
    }
    set_for(&db, &settings);
    let config = Config::new(&db, &stream)
        .set("dispatcher.backoff_initial", "200ms")
        .set("dispatcher.backoff_max", "500ms")
        .set_in("nats.topic_map", "lost.thing", "nowhere.thing");
    let owner = Config::new(&db, &stream).set("database.dsn", db.dsn.clone());
    let (migrated, said) = run(&owner, &["migrate"]);
    assert!(migrated, "{said}");
    grant_roles(shared_postgres(), &db.name);
    let (_, said) = run(&config, &["check"]);
    assert!(
        said.contains("ok    schema: complete") && said.contains("ok    wake-up: LISTEN works"),
        "{said}"
    );
    let writer =
        format!("{}?options=-c%20default_transaction_read_only%3Doff%20-c%20statement_timeout%3D0", db.dsn);
    let db = TestDb { dsn: writer, name: db.name };
    for key in 0..5 {
        let key = format!("k{key}");
        db.event("lost.thing", &key, "{}");
        db.event("order.placed", &key, r#"{"\u00e9": "\u00e9"}"#);
    }
    db.events("order.placed", 2_000, 50);
    // Somebody has locked an event, so that its claim takes longer than any of these limits.
    let mut somebody = db.client();
    if limits_transactions {
        somebody.batch_execute("SET transaction_timeout = 0").unwrap();
    }
    let mut holder = somebody.transaction().unwrap();
    holder.batch_execute("SET LOCAL idle_in_transaction_session_timeout = 0").unwrap();
    holder.query("SELECT FROM outboxes WHERE topic = 'order.placed' LIMIT 1 FOR UPDATE", &[]).unwrap();
    let daemon = Daemon::start(&config);
    wait_until("a settle waits", LIMIT, &[&daemon], || {
        db.number("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'")
            > 0
    });
    thread::sleep(Duration::from_secs(3));
    holder.commit().unwrap();
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    assert_eq!((db.dead(), stream.count()), (5, 2_005));
    wait_until("it sleeps", LIMIT, &[&daemon], || daemon.log().contains("listening for wake-ups"));
    wait_until("the partitions were looked at", LIMIT, &[&daemon], || {
        daemon.metric("outbox_partitions_ahead_days") > 0.0
    });
    for said in ["claims fail", "settle failed", "wake-ups lost", "upkeep", "partition made"] {
        assert!(daemon.log_lines(said).is_empty(), "{said}\n{}", daemon.log());
    }
}

#[test]
fn sessions_that_end_while_idle_are_made_anew_and_nobody_notices() {
    let (db, stream) = (database(), stream());
    set_for(&db, &[("idle_session_timeout", "200ms")]);
    let daemon = Daemon::start(&Config::new(&db, &stream).set("dispatcher.fallback_interval", "60s"));
    wait_until("it listens", LIMIT, &[&daemon], || daemon.log().contains("listening for wake-ups"));
    let ours = "SELECT count(*) FROM pg_stat_activity
                 WHERE datname = current_database() AND application_name LIKE 'pg-outbox/%'";
    for _ in 0..3 {
        // The two of the wake-up stay.
        wait_until("the pool's sessions have ended", LIMIT, &[&daemon], || db.number(ours) == 2);
        db.events("order.placed", 100, 10);
        wait_drained(&db, &stream, &[&daemon], LIMIT);
    }
    for said in ["claims fail", "wake-ups lost"] {
        assert!(daemon.log_lines(said).is_empty(), "{said}\n{}", daemon.log());
    }
    assert_eq!(daemon.metric("outbox_postgres_errors_total"), 0.0);
}

#[test]
fn rows_that_row_level_security_hides_are_warned_of() {
    let postgres = start_postgres();
    let (db, stream) = (TestDb::on(&postgres), stream());
    db.execute(
        "ALTER TABLE outboxes ENABLE ROW LEVEL SECURITY;
         CREATE POLICY tenants ON outboxes USING (topic LIKE 'a.%')",
    );
    let config = Config::new(&db, &stream);
    let warning = "row-level security of table outboxes may hide rows";
    let (_, said) = run(&config, &["check"]);
    assert!(said.contains(warning), "{said}");
    let daemon = Daemon::start(&config);
    wait_until("it warns", LIMIT, &[&daemon], || daemon.log_lines(warning).len() == 1);
    drop(daemon);
    db.execute("CREATE POLICY all_of_it ON outboxes TO dispatcher USING (true)");
    let (_, said) = run(&config, &["check"]);
    assert!(!said.contains(warning), "{said}");
    db.events("order.placed", 100, 10);
    let daemon = Daemon::start(&config);
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    assert!(daemon.log_lines(warning).is_empty(), "{}", daemon.log());
}

#[test]
fn a_database_in_another_encoding_is_one_like_any_other() {
    let postgres = start_postgres();
    let (db, stream) = (TestDb::in_encoding(&postgres, "LATIN1"), stream());
    let daemon = Daemon::start(&Config::new(&db, &stream));
    db.event("order.plac\u{e9}", "k\u{e9}", "{\"name\": \"\u{e9}\"}");
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    let messages = stream.messages();
    assert_eq!(messages.len(), 1);
    assert_eq!(messages[0].payload, "{\"name\": \"\u{e9}\"}".as_bytes());
}

/// Reasons can hold what the database has no characters for. A settle that it refuses would be tried for ever.
#[test]
fn a_reason_is_written_whatever_the_encoding() {
    let postgres = start_postgres();
    let (db, stream) = (TestDb::in_encoding(&postgres, "LATIN1"), stream());
    let config = Config::new(&db, &stream)
        .set("dispatcher.max_attempts", 2)
        .set("dispatcher.backoff_initial", "100ms")
        .set_in("nats.topic_map", "lost.thing", "nowhere.\u{4e2d}");
    let daemon = Daemon::start(&config);
    db.event("lost.thing", "k", "{}");
    db.event("order.placed", "k", "{}");
    wait_until("both have ended", LIMIT, &[&daemon, &db], || (db.dead(), db.published()) == (1, 1));
    let escaped = r"SELECT count(*) FROM outboxes WHERE position('nowhere.\u{4e2d}' IN last_error) > 0";
    assert_eq!(db.number(escaped), 1);
    assert!(daemon.log_lines("settle failed").is_empty(), "{}", daemon.log());
}

#[test]
fn what_a_row_holds_is_in_no_error() {
    const PAYLOAD: &str = "what only consumers may know";
    secrets::plant(PAYLOAD);
    let (db, stream) = (database(), stream());
    db.execute("ALTER TABLE outboxes ADD CONSTRAINT nosy CHECK (attempts = 0)");
    let daemon = Daemon::start(&Config::new(&db, &stream).set("dispatcher.poll_interval", "200ms"));
    db.event("order.placed", "k", &format!("{{\"name\": \"{PAYLOAD}\"}}"));
    wait_until("it says why it cannot settle", LIMIT, &[&daemon, &db], || {
        daemon.log_lines("settle failed").iter().any(|line| line.contains("23514") && line.contains("nosy"))
    });
    for path in ["/status", "/recent", "/health", "/ready"] {
        daemon.get(path);
    }
    db.execute("ALTER TABLE outboxes DROP CONSTRAINT nosy");
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    assert!(daemon.log().contains("settle failed"));
}

#[test]
fn of_sessions_that_a_restart_has_ended_one_is_tried() {
    let mut postgres = start_postgres();
    let (db, stream) = (TestDb::on(&postgres), stream());
    let daemon = Daemon::start(&Config::new(&db, &stream).set("dispatcher.workers", 6));
    let ours = "SELECT count(*) FROM pg_stat_activity
                 WHERE datname = current_database() AND application_name LIKE 'pg-outbox/%'";
    wait_until("there are many sessions", LIMIT, &[&daemon, &db], || {
        db.events("order.placed", 3_000, 500);
        wait_drained(&db, &stream, &[&daemon], LIMIT);
        db.number(ours) >= 2 + 5
    });
    postgres.stop(Stop::Fast).unwrap();
    postgres.start_again().unwrap();
    db.events("order.placed", 1_000, 500);
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    let errors = daemon.metric("outbox_postgres_errors_total");
    assert!(errors <= 3.0, "{errors} errors\n{}", daemon.log());
}
