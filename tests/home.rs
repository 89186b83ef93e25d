//! An outbox in a schema of its own, named by `database.schema`: daemon and commands work there and nowhere else, also
//! where no session can keep a setting.
//!
//! Beside it stands another outbox, in the schema that every connection finds by itself: what goes wrong ends there.

use std::time::Duration;

use serde_json::Value;

use super::harness::daemon::pg_outbox;
use super::harness::database::{OPERATOR, as_role, shared_postgres};
use super::harness::{Config, Daemon, Mode, Pooler, TestDb, TestStream, database, stream, wait_until};

const LIMIT: Duration = Duration::from_secs(60);
/// An event that is not published within this time waits for a poll.
const SOON: Duration = Duration::from_secs(10);
const SCHEMA: &str = "the Shop";

/// What a command prints to stdout when it succeeds.
#[track_caller]
fn run(config: &Config, arguments: &[&str]) -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), config.yaml()).unwrap();
    let output = pg_outbox().arg("--config").arg(file.path()).args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Two outboxes in one database; the configuration is for the one in [`SCHEMA`].
fn two_outboxes(dsn: &dyn Fn(&TestDb) -> String) -> (TestDb, TestStream, Config) {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream)
        .set("database.schema", SCHEMA)
        .set("dispatcher.poll_interval", "60s")
        .set("dispatcher.fallback_interval", "60s")
        .set("dispatcher.max_attempts", 1);
    let owner = config.clone().set("database.dsn", db.dsn.as_str());
    db.execute(&format!("CREATE SCHEMA \"{SCHEMA}\""));
    run(&owner, &["migrate"]);
    let roles = concat!(env!("CARGO_MANIFEST_DIR"), "/schema/roles.sql");
    let mut psql = shared_postgres().psql(&db.name);
    let output = psql.env("PGOPTIONS", "-c search_path=\"the\\ Shop\"").args(["-f", roles]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let config = config.set("database.dsn", dsn(&db));
    (db, stream, config)
}

fn event(db: &TestDb, schema: &str, topic: &str) {
    db.execute(&format!("INSERT INTO \"{schema}\".outboxes (topic, payload) VALUES ('{topic}', '{{}}')"));
}

/// How many events of the outbox in [`SCHEMA`] are so.
fn count(db: &TestDb, which: &str) -> i64 {
    db.number(&format!("SELECT count(*) FROM \"{SCHEMA}\".outboxes WHERE {which}"))
}

#[test]
fn an_outbox_in_another_schema_is_served_and_no_other_one() {
    let (db, stream, config) = two_outboxes(&TestDb::dispatcher_dsn);
    event(&db, "public", "order.placed");
    event(&db, SCHEMA, "order.placed");
    event(&db, SCHEMA, "lost.thing");
    assert!(run(&config, &["check"]).contains("ok    schema: complete"));
    let daemon = Daemon::start(&config.clone().set_in("nats.topic_map", "lost.thing", "nowhere.thing"));
    wait_until("both have ended", LIMIT, &[&daemon], || {
        (count(&db, "published_at IS NOT NULL"), count(&db, "dead_at IS NOT NULL")) == (1, 1)
    });
    wait_until("it listens", LIMIT, &[&daemon], || daemon.log().contains("listening for wake-ups"));
    for woken in 2..5 {
        event(&db, SCHEMA, "order.placed");
        wait_until("it is woken up", SOON, &[&daemon], || count(&db, "published_at IS NOT NULL") == woken);
    }
    wait_until("the partitions were looked at", LIMIT, &[&daemon], || {
        daemon.metric("outbox_partitions_ahead_days") > 0.0
    });
    assert_eq!(stream.count(), 4);
    assert_eq!(db.pending(), 1, "the outbox in public is somebody else's");

    let operator = config.clone().set("database.dsn", as_role(&db.dsn, OPERATOR));
    let letters: Value = serde_json::from_str(&run(&operator, &["dead", "list", "--json"])).unwrap();
    assert_eq!(letters[0]["topic"], "lost.thing", "{letters}");
    let status: Value = serde_json::from_str(&run(&operator, &["status", "--json"])).unwrap();
    assert_eq!(status["topics"][0]["topic"], "lost.thing", "{status}");
    run(&operator, &["replay", "--topic", "order.placed", "--yes"]);
    assert_eq!(stream.count(), 8);
    run(&operator, &["dead", "discard", "--yes", "--reason", "a test", letters[0]["id"].as_str().unwrap()]);
    assert_eq!(count(&db, "discarded_at IS NOT NULL"), 1);
}

#[test]
fn an_outbox_in_another_schema_is_served_through_both_kinds_of_pooler() {
    for mode in [Mode::Transaction, Mode::Session] {
        let pooler = Pooler::to(shared_postgres(), mode, 20);
        let (db, stream, config) = two_outboxes(&|db| pooler.dsn(db));
        let config = config.set("database.listen_dsn", db.dispatcher_dsn());
        event(&db, "public", "order.placed");
        let daemon = Daemon::start(&config);
        wait_until("it listens", LIMIT, &[&daemon], || daemon.log().contains("listening for wake-ups"));
        for woken in 1..4 {
            event(&db, SCHEMA, "order.placed");
            wait_until("it is woken up", SOON, &[&daemon], || {
                count(&db, "published_at IS NOT NULL") == woken
            });
        }
        wait_until("the partitions were looked at", LIMIT, &[&daemon], || {
            daemon.metric("outbox_partitions_ahead_days") > 0.0
        });
        assert_eq!((stream.count(), db.pending()), (3, 1), "{mode:?}");
    }
}

#[test]
fn a_schema_that_is_not_there_is_named() {
    let (db, stream) = (database(), stream());
    let config =
        Config::new(&db, &stream).set("database.dsn", db.dsn.as_str()).set("database.schema", "nowhere");
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), config.yaml()).unwrap();
    let said = |command: &str| {
        let output = pg_outbox().arg("--config").arg(file.path()).arg(command).output().unwrap();
        assert!(!output.status.success(), "{command}: {output:?}");
        String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
    };
    assert!(said("migrate").contains("search_path is nowhere"), "{}", said("migrate"));
    assert!(said("check").contains("table outboxes is missing"), "{}", said("check"));
}
