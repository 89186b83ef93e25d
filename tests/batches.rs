//! Atomic batches, on a nats-server that has them: order at full speed for a single key, under faults as well.

use std::time::{Duration, Instant};

use pg_outbox::lab::sandbox::{NatsOptions, NatsServer, StoreState};
use serde_json::json;

use super::delivery::wait_drained;
use super::harness::stream::{current_nats, current_nats_server};
use super::harness::workload::writers_until;
use super::harness::{Config, Daemon, TestStream, Workload, check_history, database, wait_until, writers};

const LIMIT: Duration = Duration::from_secs(90);

/// The payloads' numbers, in the order of the stream.
fn numbers(stream: &TestStream) -> Vec<i64> {
    stream.messages().iter().map(|message| message.json()["n"].as_i64().unwrap()).collect()
}

#[test]
fn a_single_key_goes_in_batches_and_stays_in_order() {
    let nats = current_nats();
    let mut times = Vec::new();
    for allow_atomic in [true, false] {
        let db = database();
        let stream = TestStream::on(&nats.url(), &json!({ "allow_atomic": allow_atomic }));
        db.events("order.placed", 10_000, 1);
        let started = Instant::now();
        let daemon = Daemon::start(&Config::new(&db, &stream).set("dispatcher.batch_size", 1_000));
        wait_drained(&db, &stream, &[&daemon], LIMIT);
        times.push(started.elapsed());
        assert_eq!(numbers(&stream), (1..=10_000).collect::<Vec<i64>>());
        let batches =
            stream.messages().iter().filter(|message| message.header("Nats-Batch-Id").is_some()).count();
        assert_eq!(batches > 9_000, allow_atomic, "{batches} of 10,000 were in batches");
        assert!(daemon.log_lines("outage begins").is_empty(), "{}", daemon.log());
    }
    println!("10,000 events of one key: {:?} in batches, {:?} one by one", times[0], times[1]);
}

#[test]
fn an_event_that_is_refused_is_the_only_one() {
    let nats = current_nats();
    let db = database();
    let stream = TestStream::on(&nats.url(), &json!({ "allow_atomic": true, "max_msg_size": 2_000 }));
    let config = Config::new(&db, &stream).set("dispatcher.max_attempts", 1).set_in(
        "nats.topic_map",
        "lost.thing",
        "nowhere.thing",
    );
    for n in 1..=60 {
        let (topic, filler) = match n {
            20 => ("lost.thing", 0),
            40 => ("order.placed", 3_000),
            _ => ("order.placed", 0),
        };
        db.event(topic, "k", &json!({ "n": n, "filler": "x".repeat(filler) }).to_string());
    }
    let daemon = Daemon::start(&config);
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    assert_eq!(numbers(&stream), (1..=60).filter(|n| ![20, 40].contains(n)).collect::<Vec<i64>>());
    assert_eq!(db.dead(), 2);
    let errors = db.number(
        "SELECT count(*) FROM outboxes WHERE last_error LIKE '%nowhere.thing%' OR last_error LIKE '%max_msg_size%'",
    );
    assert_eq!(errors, 2);
}

#[test]
fn an_event_that_fits_alone_and_not_into_a_batch_goes_alone() {
    const MAX_PAYLOAD: usize = 65_536;
    let config = format!("max_payload: {MAX_PAYLOAD}");
    let nats = NatsServer::start(&NatsOptions { program: Some(current_nats_server()), config }).unwrap();
    let db = database();
    let stream = TestStream::on(&nats.url(), &json!({ "allow_atomic": true }));
    let config = Config::new(&db, &stream);
    db.events("order.placed", 1, 1);
    let mut daemon = Daemon::start(&config);
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    daemon.kill();
    // A batch adds more than 80 bytes to the headers of each event.
    let (frame, near) = (stream.messages()[0].headers.len() + r#"{"n": 15, "filler": ""}"#.len(), 60);
    for n in 2..=30 {
        let filler = if n == 15 { MAX_PAYLOAD - frame - near } else { 0 };
        db.event("order.placed", "k", &json!({ "n": n, "filler": "x".repeat(filler) }).to_string());
    }
    let daemon = Daemon::start(&config);
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    assert_eq!(numbers(&stream), (1..=30).collect::<Vec<i64>>());
    assert!(daemon.log_lines("outage begins").is_empty(), "{}", daemon.log());
}

#[test]
fn a_batch_that_was_stored_before_is_settled_by_its_duplicates() {
    let nats = current_nats();
    let db = database();
    let stream = TestStream::on(&nats.url(), &json!({ "allow_atomic": true }));
    db.events("order.placed", 500, 1);
    let config = Config::new(&db, &stream);
    let mut daemon = Daemon::start(&config);
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    daemon.kill();
    // As after a crash of PostgreSQL that forgot the settles of some, in the middle of what were batches.
    db.execute(
        "UPDATE outboxes SET published_at = NULL, attempts = 0 WHERE seq BETWEEN 130 AND 270;
         UPDATE outbox_lanes SET settled_to = -1",
    );
    let daemon = Daemon::start(&config);
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    assert_eq!(numbers(&stream), (1..=500).collect::<Vec<i64>>());
    assert_eq!(db.dead(), 0);
    wait_until("duplicates are counted", LIMIT, &[&daemon], || {
        daemon.get("/metrics").1.contains("outbox_attempts_total{outcome=\"duplicate\"} 141")
    });
}

#[test]
fn a_hot_key_in_batches_survives_kills_of_server_and_instance() {
    let mut nats = current_nats();
    let db = database();
    let stream = TestStream::on(&nats.url(), &json!({ "allow_atomic": true }));
    let config = Config::new(&db, &stream);
    let survivor = Daemon::start(&config);
    survivor.wait_ready();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let workload =
        Workload { events: 200_000, keys: 1, pause: Duration::from_millis(5), ..Workload::default() };
    let history = std::thread::scope(|scope| {
        let writing = scope.spawn(|| writers_until(&db.dsn, &workload, &stop));
        for round in 0..3 {
            let mut victim = Daemon::start(&config);
            db.events("other.thing", 2_000, 1);
            std::thread::sleep(Duration::from_millis(250 + 100 * round));
            victim.kill();
            nats.kill().unwrap();
            nats.start_again(StoreState::Kept).unwrap();
            wait_until("it goes on", LIMIT, &[&survivor], || survivor.get("/ready").0 == 200);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        writing.join().unwrap()
    });
    wait_drained(&db, &stream, &[&survivor], LIMIT);
    let (own, others): (Vec<_>, Vec<_>) =
        stream.messages().into_iter().partition(|message| message.subject.ends_with("order.placed"));
    check_history(&history.committed, &own).assert_clean();
    assert_eq!(others.len(), 6_000);
}

#[test]
fn many_keys_share_the_server_with_batches() {
    let nats = current_nats();
    let db = database();
    let stream = TestStream::on(&nats.url(), &json!({ "allow_atomic": true }));
    let daemon = Daemon::start(&Config::new(&db, &stream).set("dispatcher.batch_size", 1_000));
    let history = writers(&db.dsn, &Workload { keys: 20, ..Workload::default() });
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    check_history(&history.committed, &stream.messages()).assert_clean();
}
