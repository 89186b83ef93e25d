//! What every event may rely on while the servers are well: delivered once, in order per key, whoever carries it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pg_outbox::postgres::{ClaimSettings, Store};
use serde_json::Value;

use super::harness::workload::writers_until;
use super::harness::{
    Config, Daemon, TestDb, TestStream, Workload, check_history, database, start_nats, stream, wait_until,
    writers,
};

const LIMIT: Duration = Duration::from_secs(60);

/// Waits until nothing is pending.
#[track_caller]
pub fn wait_drained(db: &TestDb, stream: &TestStream, daemons: &[&Daemon], limit: Duration) {
    let mut witnesses: Vec<&dyn super::harness::Evidence> = vec![db, stream];
    witnesses.extend(daemons.iter().map(|daemon| *daemon as &dyn super::harness::Evidence));
    wait_until("nothing is pending", limit, &witnesses, || db.pending() == 0);
}

#[test]
fn an_event_arrives_with_its_headers_and_its_payload_untouched() {
    let (db, stream) = (database(), stream());
    let daemon = Daemon::start(&Config::new(&db, &stream));
    let metadata = r#"{"correlation-id": "request-123", "attempt": 7, "urgent": true, "big": 12345678901234567890,
        "nested": {"a": [1, 2]}, "nothing": null, "Nats-Rollup": "all", "evil": "a\r\nNats-Msg-Id: x", "ordering-key": "k"}"#;
    let payload = r#"{"amount": 1.10, "name": "Zoë \u0001", "deep": [[[]]]}"#;
    let seq = db.event_with("order.placed", metadata, payload);
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    let messages = stream.messages();
    assert_eq!(messages.len(), 1);
    let message = &messages[0];
    let id: String = db.client().query_one("SELECT id::text FROM outboxes", &[]).unwrap().get(0);
    let stored: String = db.client().query_one("SELECT payload::text FROM outboxes", &[]).unwrap().get(0);
    assert_eq!(
        String::from_utf8(message.payload.clone()).unwrap(),
        stored,
        "byte for byte what PostgreSQL prints"
    );
    assert_eq!(message.subject, stream.subject("order.placed"));
    assert_eq!(message.msg_id, id);
    assert_eq!(message.header("correlation-id"), Some("request-123"));
    assert_eq!(message.header("attempt"), Some("7"));
    assert_eq!(message.header("urgent"), Some("true"));
    assert_eq!(message.header("big"), Some("12345678901234567890"));
    assert_eq!(message.header("nested"), Some(r#"{"a":[1,2]}"#));
    assert_eq!(message.header("nothing"), None);
    assert_eq!(message.header("Nats-Rollup"), None, "metadata must not command the server");
    assert_eq!(message.header("Outbox-Seq"), Some(seq.to_string().as_str()));
    assert_eq!(message.header("Outbox-Topic"), Some("order.placed"));
    assert_eq!(message.header("Outbox-Attempt"), Some("1"));
    assert_eq!(message.header("Nats-Expected-Stream"), Some(stream.name.as_str()));
    assert!(message.header("Outbox-Created-At").unwrap().ends_with('Z'));
    assert!(message.header("Outbox-Instance").unwrap().starts_with("instance-"));
    assert_eq!(message.headers.matches("Nats-Msg-Id").count(), 1, "{}", message.headers);
    let attempts: i32 = db.client().query_one("SELECT attempts FROM outboxes", &[]).unwrap().get(0);
    assert_eq!(attempts, 1);
}

#[test]
fn two_instances_deliver_every_event_once_and_in_order_per_key() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream);
    let [first, second] = Daemon::start_two(&config);
    let history = writers(&db.dsn, &Workload::default());
    assert_eq!(history.committed.len(), 5_000);
    assert!(!history.rolled_back.is_empty(), "the workload must roll some events back");
    wait_drained(&db, &stream, &[&first, &second], LIMIT);
    check_history(&history.committed, &stream.messages()).assert_clean();
    assert_eq!(
        first.metric("outbox_events_published_total") + second.metric("outbox_events_published_total"),
        5_000.0
    );
    for daemon in [&first, &second] {
        assert!(daemon.metric("outbox_events_published_total") > 0.0, "both instances took part");
    }
}

#[test]
fn an_instance_that_is_killed_loses_nothing_and_delays_the_other_little() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream);
    let survivor = Daemon::start(&config.clone().set("dispatcher.instance_id", "survivor"));
    let workload = Workload { events: 20_000, pause: Duration::from_millis(2), ..Workload::default() };
    let stop = AtomicBool::new(false);
    let history = thread::scope(|scope| {
        let writing = scope.spawn(|| writers_until(&db.dsn, &workload, &stop));
        for round in 0..4 {
            let mut victim =
                Daemon::start(&config.clone().set("dispatcher.instance_id", format!("victim-{round}")));
            wait_until("the victim publishes", LIMIT, &[&victim, &db], || {
                victim.metric("outbox_events_published_total") > 50.0
            });
            victim.kill();
            // What the victim had claimed is free at once, and the survivor finds it within two seconds.
            let seq = db.number("SELECT max(seq) FROM outboxes");
            let killed = Instant::now();
            wait_until(
                "all that the victim left is published",
                Duration::from_secs(2),
                &[&survivor, &db],
                || {
                    db.number(&format!(
                        "SELECT count(*) FROM outboxes WHERE published_at IS NULL AND seq <= {seq}"
                    )) == 0
                },
            );
            println!("round {round}: caught up {:?} after the kill", killed.elapsed());
        }
        stop.store(true, Ordering::Relaxed);
        writing.join().unwrap()
    });
    wait_drained(&db, &stream, &[&survivor], LIMIT);
    check_history(&history.committed, &stream.messages()).assert_clean();
}

#[test]
fn an_idle_daemon_publishes_a_new_event_at_once() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream).set("dispatcher.fallback_interval", "60s");
    let daemon = Daemon::start(&config);
    daemon.wait_ready();
    wait_until("it listens", LIMIT, &[&daemon], || daemon.log().contains("listening for wake-ups"));
    for n in 0..5 {
        thread::sleep(Duration::from_millis(300));
        let committed = Instant::now();
        db.event("order.placed", "k", &format!(r#"{{"n": {n}}}"#));
        wait_until("the event is published", Duration::from_secs(2), &[&daemon, &db], || db.pending() == 0);
        println!("seen published after {:?}", committed.elapsed());
    }
}

#[test]
fn without_notifications_events_are_found_by_polling() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream)
        .set("database.listen", false)
        .set("dispatcher.poll_interval", "200ms")
        .set("dispatcher.fallback_interval", "60s");
    let daemon = Daemon::start(&config);
    daemon.wait_ready();
    db.event("order.placed", "k", "{}");
    wait_until("the event is published", Duration::from_secs(3), &[&daemon, &db], || db.pending() == 0);
}

#[test]
fn the_topic_map_decides_the_subject() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream)
        .set_in("nats.topic_map", "user.created", format!("{}.users.created", stream.prefix))
        .set_in("nats.topic_map", "order.*", format!("{}.orders.*", stream.prefix));
    let daemon = Daemon::start(&config);
    for topic in ["user.created", "order.placed", "other.thing"] {
        db.event(topic, "k", "{}");
    }
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    let subjects: Vec<String> = stream.messages().into_iter().map(|message| message.subject).collect();
    let expected = ["users.created", "orders.placed", "other.thing"].map(|subject| stream.subject(subject));
    assert_eq!(subjects, expected);
}

#[test]
fn without_order_everything_is_delivered_all_the_same() {
    let (db, stream) = (database(), stream());
    db.events("order.placed", 2_000, 3);
    let daemon = Daemon::start(&Config::new(&db, &stream).set("ordering.enabled", false));
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    assert_eq!(stream.count(), 2_000);
}

#[test]
fn sigterm_drains_and_exits_cleanly() {
    let (db, stream) = (database(), stream());
    db.events("order.placed", 30_000, 200);
    let mut daemon = Daemon::start(&Config::new(&db, &stream));
    wait_until("it publishes", LIMIT, &[&daemon, &db], || db.published() > 0);
    daemon.term();
    let status = daemon.wait_exit(Duration::from_secs(10));
    assert!(status.success(), "{status}\n{}", daemon.log());
    let line = daemon.log_lines("stopped:").pop().expect("it says what it did");
    assert!(line.contains("drained=") && line.contains("released=") && line.contains("took="), "{line}");
    assert!(!line.contains("cut_off"), "every worker ended within the grace: {line}");
    let left = db.pending();
    assert!(left > 0, "the test must stop it in the middle");
    assert_eq!(stream.count() as i64, db.published(), "what is in the stream is settled, and nothing else");
    // A server process that was in the middle of a count sees the end after it.
    wait_until("no connection stays behind", LIMIT, &[&db], || {
        db.number("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'pg-outbox%'") == 0
    });
}

#[test]
fn workers_that_are_about_to_return_are_not_cut_off() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream).set("dispatcher.workers", 16).set("database.max_connections", 20);
    for _ in 0..10 {
        let mut daemon = Daemon::start(&config);
        daemon.wait_ready();
        daemon.term();
        assert!(daemon.wait_exit(LIMIT).success(), "{}", daemon.log());
        let line = daemon.log_lines("stopped:").pop().expect("it says what it did");
        assert!(!line.contains("cut_off"), "nobody had anything to do: {line}");
    }
}

#[test]
fn a_second_sigterm_ends_it_at_once() {
    let (db, stream) = (database(), stream());
    let nats = start_nats("");
    let slow = TestStream::on(&nats.url(), &serde_json::json!({}));
    db.events("order.placed", 500, 10);
    let mut daemon = Daemon::start(&Config::new(&db, &slow).set("nats.ack_timeout", "20s"));
    wait_until("it publishes", LIMIT, &[&daemon, &db], || db.published() > 0);
    db.events("order.placed", 50_000, 10);
    nats.pause().unwrap();
    thread::sleep(Duration::from_millis(300));
    daemon.term();
    thread::sleep(Duration::from_millis(500));
    assert!(daemon.running(), "it waits for what is in flight");
    daemon.term();
    let status = daemon.wait_exit(Duration::from_secs(2));
    assert_eq!(status.code(), Some(130), "{}", daemon.log());
    nats.resume().unwrap();
    drop(stream);
}

#[test]
fn a_grace_that_is_too_short_still_loses_nothing() {
    let db = database();
    let nats = start_nats("");
    let stream = TestStream::on(&nats.url(), &serde_json::json!({}));
    let config =
        Config::new(&db, &stream).set("nats.ack_timeout", "20s").set("dispatcher.shutdown_grace", "1s");
    let mut daemon = Daemon::start(&config);
    daemon.wait_ready();
    nats.pause().unwrap();
    db.events("order.placed", 20_000, 10);
    wait_until("a worker waits for acks", LIMIT, &[&daemon, &db], || {
        daemon.metric("outbox_claims_total{result=\"events\"}") > 0.0
    });
    daemon.term();
    let status = daemon.wait_exit(Duration::from_secs(5));
    assert!(status.success(), "{status}\n{}", daemon.log());
    let line = daemon.log_lines("stopped:").pop().expect("it says what it did");
    assert!(line.contains(" cut_off=") && line.ends_with(" (grace was over)"), "{line}");
    nats.resume().unwrap();
    let again = Daemon::start(&config);
    wait_drained(&db, &stream, &[&again], LIMIT);
    assert_eq!(stream.count(), 20_000, "the stream dropped what came twice");
}

#[test]
fn probes_and_metrics_tell_the_truth() {
    let (db, stream) = (database(), stream());
    let daemon = Daemon::start(&Config::new(&db, &stream));
    daemon.wait_ready();
    for path in ["/health", "/healthz", "/ready", "/readyz"] {
        assert_eq!(daemon.get(path).0, 200, "{path}");
    }
    db.events("order.placed", 100, 10);
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    wait_until("the counters are there", LIMIT, &[&daemon], || {
        daemon.metric("outbox_events_published_total") == 100.0
    });
    assert_eq!(daemon.metric("outbox_events_failed_total"), 0.0);
    wait_until("the backlog is counted", LIMIT, &[&daemon], || daemon.metric("outbox_pending_events") == 0.0);
    let (status, metrics) = daemon.get("/metrics");
    assert_eq!(status, 200);
    for name in ["outbox_batch_processing_duration_seconds_bucket", "outbox_lag_seconds", "outbox_build_info"]
    {
        assert!(metrics.contains(name), "{name} is missing");
    }
    let (status, body) = daemon.get("/status");
    assert_eq!(status, 200);
    assert!(serde_json::from_str::<Value>(&body).is_ok(), "{body}");
    assert_eq!(daemon.get("/nothing").0, 404);
}

#[test]
fn a_missing_stream_is_said_and_charged_to_no_event() {
    let (db, stream) = (database(), stream());
    stream.delete();
    db.events("order.placed", 20, 4);
    let daemon = Daemon::start(&Config::new(&db, &stream));
    wait_until("it says what is missing", LIMIT, &[&daemon], || {
        let (status, body) = daemon.get("/ready");
        status == 503 && body.contains("is missing") && body.contains("nats.jetstream.create")
    });
    let (_, body) = daemon.get("/ready");
    assert!(!body.contains("nats: "), "the connection is there, and no reason: {body}");
    assert_eq!(daemon.get("/health").0, 200);
    assert_eq!(db.number("SELECT coalesce(sum(attempts), 0) FROM outboxes"), 0);
    stream.create(&serde_json::json!({}));
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    assert_eq!(stream.count(), 20);
}

#[test]
fn a_missing_stream_is_created_when_that_is_wanted() {
    let (db, stream) = (database(), stream());
    stream.delete();
    db.events("order.placed", 20, 4);
    let config = Config::new(&db, &stream)
        .set("nats.jetstream.create", true)
        .set("nats.jetstream.subjects", vec![format!("{}.>", stream.prefix)])
        .set("nats.jetstream.storage", "memory");
    let daemon = Daemon::start(&config);
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    assert_eq!(stream.info()["config"]["storage"], "memory");
    assert_eq!(stream.count(), 20);
}

#[test]
fn a_missing_schema_is_said_and_waited_for() {
    let stream = stream();
    let db = TestDb::without_schema(super::harness::database::shared_postgres());
    let daemon = Daemon::start(&Config::new(&db, &stream));
    wait_until("it names the command", LIMIT, &[&daemon], || {
        let (status, body) = daemon.get("/ready");
        status == 503 && body.contains("pg-outbox migrate")
    });
    assert_eq!(daemon.get("/health").0, 200);
}

#[test]
fn core_nats_delivers_in_order() {
    let (db, stream) = (database(), stream());
    // The stream listens too, so that what core NATS carried can be read back.
    let daemon = Daemon::start(&Config::new(&db, &stream).set("nats.jetstream.enabled", false));
    let history = writers(&db.dsn, &Workload { events: 3_000, ..Workload::default() });
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    check_history(&history.committed, &stream.messages()).assert_clean();
}

#[test]
fn a_claim_in_another_database_is_not_taken_for_one_here() {
    // Made from one template, their tables have the same oid.
    let (db, twin, stream) = (database(), database(), stream());
    let config =
        pg_outbox::config::Config::parse(&Config::new(&db, &stream).yaml(), "test", |_| None).unwrap();
    let store = Store::new(&config.database, "twin", ClaimSettings::default()).unwrap();
    let claims_open = || store.claims_open().unwrap();
    let mut there = twin.client();
    there.batch_execute("BEGIN; SELECT lane FROM outbox_lanes FOR UPDATE").unwrap();
    assert!(!claims_open());
    let mut here = db.client();
    here.batch_execute("BEGIN; SELECT lane FROM outbox_lanes FOR UPDATE").unwrap();
    assert!(claims_open());
}
