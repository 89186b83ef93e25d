//! Outages of either server under load: nothing is lost, no event is charged, and nobody has to help.

use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pg_outbox::lab::sandbox::{NatsServer, PostgresServer, Stop, StoreState};
use serde_json::json;

use super::delivery::wait_drained;
use super::harness::database::start_postgres;
use super::harness::wire;
use super::harness::workload::writers_until;
use super::harness::{
    Config, Daemon, History, Stored, TestDb, TestStream, Workload, check_history, database, start_nats,
    stream, wait_until,
};

const LIMIT: Duration = Duration::from_secs(90);

/// Runs writers while `faults` happen, then until `faults` has returned.
fn under_load(db: &TestDb, faults: impl FnOnce()) -> History {
    let workload = Workload { events: 100_000, pause: Duration::from_millis(10), ..Workload::default() };
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let writing = scope.spawn(|| writers_until(&db.dsn, &workload, &stop));
        thread::sleep(Duration::from_millis(500));
        faults();
        thread::sleep(Duration::from_millis(500));
        stop.store(true, Ordering::Relaxed);
        writing.join().unwrap()
    })
}

#[test]
fn a_nats_outage_is_charged_to_no_event() {
    let db = database();
    let mut nats = start_nats("");
    let stream = TestStream::on(&nats.url(), &json!({}));
    let daemon = Daemon::start(&Config::new(&db, &stream).set("dispatcher.max_attempts", 3));
    daemon.wait_ready();
    let history = under_load(&db, || {
        nats.stop(Stop::Fast).unwrap();
        let stopped = Instant::now();
        wait_until("it is not ready, and says why", Duration::from_secs(10), &[&daemon], || {
            let (status, body) = daemon.get("/ready");
            status == 503 && body.contains("outage")
        });
        while stopped.elapsed() < Duration::from_secs(15) {
            assert_eq!(daemon.get("/health").0, 200, "an outage of NATS is no fault of this process");
            assert_eq!(daemon.get("/ready").0, 503);
            thread::sleep(Duration::from_millis(500));
        }
        assert_eq!(
            db.number("SELECT coalesce(sum(attempts), 0) FROM outboxes WHERE published_at IS NULL"),
            0
        );
        nats.start_again(StoreState::Kept).unwrap();
    });
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    check_history(&history.committed, &stream.messages()).assert_clean();
    assert_eq!(db.dead(), 0);
    assert_eq!(db.number("SELECT count(*) FROM outboxes WHERE attempts <> 1"), 0);
    assert_eq!(daemon.log_lines("outage begins").len(), 1, "{}", daemon.log());
    assert_eq!(daemon.log_lines("outage ends").len(), 1, "{}", daemon.log());
    daemon.wait_ready();
}

#[test]
fn a_stalled_nats_server_costs_the_ack_timeout_and_a_new_connection() {
    let db = database();
    let nats = start_nats("");
    let stream = TestStream::on(&nats.url(), &json!({}));
    let config = Config::new(&db, &stream).set("nats.ack_timeout", "2s").set("nats.connect_timeout", "2s");
    let daemon = Daemon::start(&config);
    daemon.wait_ready();
    let history = under_load(&db, || {
        nats.pause().unwrap();
        let paused = Instant::now();
        wait_until("the stall is noticed", Duration::from_secs(7), &[&daemon], || {
            daemon.get("/ready").0 == 503
        });
        wait_until("no claim is held open", Duration::from_secs(10), &[&daemon, &db], || {
            db.number("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction' AND application_name LIKE 'pg-outbox%'") == 0
        });
        thread::sleep(Duration::from_secs(20).saturating_sub(paused.elapsed()));
        nats.resume().unwrap();
        let resumed = Instant::now();
        let published = daemon.metric("outbox_events_published_total");
        wait_until("it publishes again", Duration::from_secs(32), &[&daemon], || {
            daemon.metric("outbox_events_published_total") > published
        });
        println!("publishing again {:?} after the server went on", resumed.elapsed());
    });
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    check_history(&history.committed, &stream.messages()).assert_clean();
    assert_eq!(db.number("SELECT count(*) FROM outboxes WHERE attempts <> 1"), 0);
}

#[test]
fn a_nats_server_killed_again_and_again_loses_nothing() {
    let db = database();
    let mut nats = start_nats("");
    let stream = TestStream::on(&nats.url(), &json!({}));
    let daemon = Daemon::start(&Config::new(&db, &stream));
    daemon.wait_ready();
    let history = under_load(&db, || {
        for _ in 0..4 {
            thread::sleep(Duration::from_millis(400));
            nats.kill().unwrap();
            nats.start_again(StoreState::Kept).unwrap();
            wait_until("it publishes again", LIMIT, &[&daemon], || daemon.get("/ready").0 == 200);
        }
    });
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    check_history(&history.committed, &stream.messages()).assert_clean();
}

fn survives_restarts_of_postgres(mode: Stop) {
    let mut postgres: PostgresServer = start_postgres();
    let db = TestDb::on(&postgres);
    let stream = stream();
    let daemon = Daemon::start(&Config::new(&db, &stream));
    daemon.wait_ready();
    let history = under_load(&db, || {
        for _ in 0..2 {
            thread::sleep(Duration::from_millis(500));
            postgres.stop(mode).unwrap();
            thread::sleep(Duration::from_secs(1));
            assert_eq!(daemon.get("/health").0, 200, "an outage of PostgreSQL is no fault of this process");
            postgres.start_again().unwrap();
        }
    });
    let caught_up = Instant::now();
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    println!("drained {:?} after the last writer", caught_up.elapsed());
    check_history(&history.committed, &stream.messages()).assert_clean();
    assert_eq!(db.dead(), 0);
    wait_until("it is ready again", LIMIT, &[&daemon], || daemon.get("/ready").0 == 200);
}

#[test]
fn a_fast_restart_of_postgres_loses_nothing() {
    survives_restarts_of_postgres(Stop::Fast);
}

#[test]
fn an_immediate_restart_of_postgres_loses_nothing() {
    survives_restarts_of_postgres(Stop::Immediate);
}

#[test]
fn terminated_backends_are_replaced() {
    let (db, stream) = (database(), stream());
    let daemon = Daemon::start(&Config::new(&db, &stream));
    daemon.wait_ready();
    let history = under_load(&db, || {
        for _ in 0..5 {
            thread::sleep(Duration::from_millis(300));
            db.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                 WHERE datname = current_database() AND application_name LIKE 'pg-outbox%'",
            );
        }
    });
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    check_history(&history.committed, &stream.messages()).assert_clean();
}

/// A subscriber of core NATS that outlives restarts of the server, as a real one does. It counts in `times` how often
/// it has subscribed.
fn subscribe(url: &str, subject: &str, times: &AtomicU64, stop: &AtomicBool) -> Vec<Stored> {
    let mut stored: Vec<Stored> = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let Ok(mut client) = std::panic::catch_unwind(|| wire::Client::connect(url)) else {
            thread::sleep(Duration::from_millis(20));
            continue;
        };
        client.subscribe(subject);
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| client.flush())).is_err() {
            continue;
        }
        times.fetch_add(1, Ordering::Relaxed);
        while !stop.load(Ordering::Relaxed) {
            let waited = Instant::now();
            match client.next(Duration::from_millis(200)) {
                Some(message) => stored.push(Stored::new(stored.len() as u64, message)),
                None if waited.elapsed() < Duration::from_millis(150) => break,
                None => {}
            }
        }
    }
    stored
}

/// The server is killed while events are between publish and fence. With a subscriber that was there all the time
/// nothing may be settled that it did not get; one that reconnects may miss what was published while it was away,
/// which core NATS promises to nobody. So the daemon is held off (by a lane lock) until the subscriber is back.
#[test]
fn core_nats_settles_nothing_that_a_subscriber_did_not_get() {
    let db = database();
    let mut nats = start_nats("");
    let stream = TestStream::on(&nats.url(), &json!({}));
    stream.delete();
    let daemon = Daemon::start(&Config::new(&db, &stream).set("nats.jetstream.enabled", false));
    daemon.wait_ready();
    let (stop, url, subject) = (AtomicBool::new(false), nats.url(), format!("{}.>", stream.prefix));
    let times = AtomicU64::new(0);
    let (mut expected, mut cut) = (0, 0);
    let stored = thread::scope(|scope| {
        let subscriber = scope.spawn(|| subscribe(&url, &subject, &times, &stop));
        let subscribed = |round: u64| {
            wait_until("there is a subscriber", LIMIT, &[&daemon], || times.load(Ordering::Relaxed) > round);
        };
        let hold = || {
            let mut holder = db.client();
            holder.batch_execute("BEGIN; SELECT lane FROM outbox_lanes FOR UPDATE").unwrap();
            holder
        };
        subscribed(0);
        for round in 0..6_u64 {
            let held = hold();
            db.events("order.placed", 4_000, 200);
            expected += 4_000;
            drop(held);
            thread::sleep(Duration::from_millis(30 + 15 * round));
            nats.kill().unwrap();
            let held = hold();
            cut += usize::from((1..4_000).contains(&db.pending()));
            nats.start_again(StoreState::Kept).unwrap();
            subscribed(round + 1);
            drop(held);
            wait_until("the round is published", LIMIT, &[&daemon, &db], || db.pending() == 0);
        }
        thread::sleep(Duration::from_millis(500));
        stop.store(true, Ordering::Relaxed);
        subscriber.join().unwrap()
    });
    let mut client = db.client();
    let settled = client.query("SELECT id::text FROM outboxes WHERE published_at IS NOT NULL", &[]).unwrap();
    assert_eq!(settled.len(), expected);
    assert!(cut > 0, "no kill came in the middle of a round");
    let got: std::collections::HashSet<&str> = stored.iter().map(|message| message.msg_id.as_str()).collect();
    let missed = settled.iter().filter(|row| !got.contains(row.get::<_, &str>(0))).count();
    assert_eq!(missed, 0, "settled, and never received; {}", daemon.log());
}

#[test]
fn no_nats_server_at_the_start_ends_the_daemon_after_its_attempts() {
    let db = database();
    let mut nats: NatsServer = start_nats("");
    let stream = TestStream::on(&nats.url(), &json!({}));
    nats.kill().unwrap();
    let config = Config::new(&db, &stream).set("nats.max_retries", 3).set("nats.retry_delay", "300ms");
    let started = Instant::now();
    let mut daemon = Daemon::spawn(&config.yaml(), |_| {});
    let status = daemon.wait_exit(Duration::from_secs(10));
    assert_eq!(status.code(), Some(1), "{}", daemon.log());
    assert!(started.elapsed() >= Duration::from_millis(600), "three attempts have two pauses between them");
    let log = daemon.log();
    assert!(log.contains("attempt=1/3") && log.contains("after 3 attempts"), "{log}");
}

#[test]
fn one_server_of_several_is_enough() {
    let (db, stream) = (database(), stream());
    let urls: Vec<String> = (0..3)
        .map(|_| {
            // Nobody listens on a port that was free a moment ago.
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            format!("nats://127.0.0.1:{port}")
        })
        .chain([stream.url.clone()])
        .collect();
    let config = Config::new(&db, &stream).set("nats.url", urls.join(",")).set("nats.max_retries", 1);
    let daemon = Daemon::start(&config);
    daemon.wait_ready();
    db.event("order.placed", "k", "{}");
    wait_drained(&db, &stream, &[&daemon], LIMIT);
}

#[test]
fn a_nats_server_that_comes_late_is_found() {
    let db = database();
    let mut nats: NatsServer = start_nats("");
    let stream = TestStream::on(&nats.url(), &json!({}));
    nats.stop(Stop::Fast).unwrap();
    db.events("order.placed", 10, 2);
    let config = Config::new(&db, &stream).set("nats.max_retries", 20).set("nats.retry_delay", "200ms");
    let daemon = Daemon::start(&config);
    wait_until("it tries", LIMIT, &[&daemon], || daemon.log().contains("attempt=2/20"));
    nats.start_again(StoreState::Kept).unwrap();
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    assert_eq!(stream.count(), 10);
}

/// As on a full disk: PostgreSQL reads and locks, and refuses every settle. The stream forgets ids at once, so
/// whatever is published again is stored again.
#[test]
fn settles_that_fail_publish_nothing_twice() {
    let db = database();
    let stream = stream();
    stream.update(&json!({ "duplicate_window": 100_000_000 }));
    let daemon = Daemon::start(&Config::new(&db, &stream));
    daemon.wait_ready();
    db.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS \
         $$ BEGIN RAISE 'no space left on device' USING ERRCODE = 'disk_full'; END $$; \
         CREATE TRIGGER refuse BEFORE UPDATE ON outboxes FOR EACH ROW EXECUTE FUNCTION refuse()",
    );
    db.events("order.placed", 40, 10);
    wait_until("it says that settles fail", LIMIT, &[&daemon], || {
        daemon.log().contains("settle failed") && daemon.get("/ready").1.contains("settles fail")
    });
    thread::sleep(Duration::from_secs(3));
    assert_eq!(daemon.log_lines("ERROR").len(), 1, "said once, not at every claim: {}", daemon.log());
    db.execute("DROP TRIGGER refuse ON outboxes");
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    assert_eq!(stream.count(), 40, "published once, though settled late");
    wait_until("it is ready again", LIMIT, &[&daemon], || daemon.get("/ready").0 == 200);
}
