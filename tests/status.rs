//! `pg-outbox status`: what it says of a system at work, and of one that is not there.

use std::io::{BufRead, BufReader};
use std::process::{Output, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::harness::daemon::pg_outbox;
use crate::harness::{Config, Daemon, database, stream, wait_until};

const LIMIT: Duration = Duration::from_secs(30);

fn status(config: &Config, arguments: &[&str]) -> Output {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), config.yaml()).unwrap();
    pg_outbox().arg("--config").arg(file.path()).arg("status").args(arguments).output().unwrap()
}

fn json(config: &Config) -> Value {
    let output = status(config, &["--json"]);
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn status_shows_what_waits_and_what_is_in_the_way() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream)
        .set("database.dsn", db.operator_dsn())
        .set("ordering.on_dead", "block")
        .set("dispatcher.instance_id", "north");
    for topic in 0..14 {
        db.events(&format!("topic.n{topic:02}"), 14 - topic, 3);
    }
    db.execute(
        "INSERT INTO outboxes (topic, metadata, payload, next_attempt_at, attempts, last_error)
         VALUES ('order.placed', '{\"ordering-key\": \"in-retry\"}', '{\"secret\": 1}', now() + interval '1 minute', 1, 'first'),
                ('order.placed', '{\"ordering-key\": \"in-retry\"}', '{\"secret\": 1}', now() + interval '1 minute', 1, 'second');
         INSERT INTO outboxes (topic, metadata, payload, dead_at, attempts, last_error)
         VALUES ('order.placed', '{\"ordering-key\": \"is-dead\"}', '{\"secret\": 1}', now(), 3, 'too large')",
    );
    // A claim that stays open, of an instance called south; and a transaction that is in vacuum's way.
    let mut claim = db.client();
    claim
        .batch_execute(
            "SET application_name = 'pg-outbox/south'; BEGIN;
             SELECT lane FROM outbox_lanes WHERE lane < 5 FOR UPDATE SKIP LOCKED",
        )
        .unwrap();
    let mut old = db.client();
    old.batch_execute(
        "SET application_name = 'report'; BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM outboxes",
    )
    .unwrap();

    let seen = json(&config);
    let events = &seen["events"];
    assert_eq!(
        (&events["pending"], &events["retrying"], &events["dead"]),
        (&107.into(), &2.into(), &1.into())
    );
    assert!(events["lag_seconds"].as_f64().unwrap() >= 0.0);
    let topics = seen["topics"].as_array().unwrap();
    assert_eq!(topics.len(), 10);
    assert_eq!((&topics[0]["topic"], &topics[0]["pending"]), (&"topic.n00".into(), &14.into()));
    let keys = seen["blocked_keys"].as_array().unwrap();
    assert_eq!(keys.len(), 2, "{keys:?}");
    assert_eq!(
        (&keys[0]["key"], &keys[0]["events"], &keys[0]["reason"]),
        (&"in-retry".into(), &2.into(), &"first".into())
    );
    assert_eq!((&keys[1]["key"], &keys[1]["dead"]), (&"is-dead".into(), &true.into()));
    assert_eq!((&seen["lanes_held"], &seen["lanes"]), (&5.into(), &64.into()));
    let south = &seen["instances"][0];
    assert_eq!((&south["name"], &south["lanes"], &south["open"]), (&"south".into(), &5.into(), &1.into()));
    assert!(seen["oldest_transaction"]["what"].as_str().unwrap().starts_with("session "), "{seen}");
    assert!(seen["partitions"].as_array().unwrap().len() >= 5);
    assert!(seen["partition_days_ahead"].as_f64().unwrap() > 80.0);
    assert_eq!(seen["default_partition_rows"], 0);
    assert_eq!(
        (&seen["stream"]["name"], &seen["stream"]["messages"]),
        (&stream.name.clone().into(), &0.into())
    );
    assert!(!seen.to_string().contains("secret"));

    let output = status(&config, &[]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for part in [
        "pending 107, of these in retry 2; dead letters 1",
        "lanes       5 of 64 held",
        "south",
        "topic.n00",
        "in-retry",
        "too large",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    // To look took no lock that would have kept a claim from a lane.
    let free = "SELECT count(*) FROM (SELECT FROM outbox_lanes FOR UPDATE SKIP LOCKED) AS free";
    assert_eq!(db.number(free), 59);
}

#[test]
fn status_shows_rates_and_instances_while_events_flow() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream)
        .set("database.dsn", db.operator_dsn())
        .set("dispatcher.instance_id", "north");
    let daemon = Daemon::start(&config);
    daemon.wait_ready();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                db.events("order.placed", 20, 7);
            }
        });
        let seen = std::panic::catch_unwind(|| {
            wait_until("rates and the instance are shown", LIMIT, &[&daemon], || {
                let seen = json(&config);
                let above_zero = |rate: &Value| rate.as_f64().is_some_and(|rate| rate > 0.0);
                above_zero(&seen["rates"]["written"])
                    && above_zero(&seen["rates"]["stored"])
                    && seen["instances"][0]["name"] == "north"
            });
        });
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        seen.unwrap();
    });
}

#[test]
fn status_goes_on_with_watch() {
    let (db, stream) = (database(), stream());
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), Config::new(&db, &stream).yaml()).unwrap();
    let mut command = pg_outbox();
    command.arg("--config").arg(file.path()).args(["status", "--watch", "--json"]).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let seen: Vec<Value> = lines.take(2).map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(seen.len() == 2 && seen.iter().all(|status| status["events"]["pending"] == 0), "{seen:?}");
}

#[test]
fn status_says_which_server_does_not_answer_and_shows_the_other() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream)
        .set("database.dsn", db.operator_dsn())
        .set("nats.url", "nats://127.0.0.1:1");
    let output = status(&config, &[]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("FAIL  nats: ") && text.contains("pending 0"), "{text}");
    let config = Config::new(&db, &stream)
        .set("database.dsn", "postgresql://nobody@127.0.0.1:1/none")
        .set("database.connect_timeout", "500ms");
    let output = status(&config, &[]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("FAIL  backlog: ") && text.contains(&stream.name), "{text}");
}
