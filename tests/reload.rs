//! SIGHUP: what changes while running, what is named as needing a restart, and what is refused.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use super::delivery::wait_drained;
use super::harness::daemon::pg_outbox;
use super::harness::{Config, Daemon, Workload, check_history, database, stream, wait_until, writers};

const LIMIT: Duration = Duration::from_secs(60);

/// Sends SIGHUP and waits for the log's answer, which contains `part` once more than before.
#[track_caller]
fn reload(daemon: &Daemon, part: &str) -> String {
    let before = daemon.log_lines(part).len();
    daemon.reload();
    wait_until(&format!("the log says {part:?}"), LIMIT, &[daemon], || daemon.log_lines(part).len() > before);
    daemon.log_lines(part)[before].clone()
}

#[test]
fn a_reload_changes_topic_map_limits_headers_and_log_level() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream)
        .set("dispatcher.workers", 1)
        .set("dispatcher.batch_size", 100)
        .set("logging.level", "info")
        .set("dispatcher.backoff_initial", "10ms");
    let daemon = Daemon::start(&config);
    daemon.wait_ready();
    let metadata = r#"{"Nats-Colour": "blue"}"#;
    db.event_with("order.placed", metadata, "{}");
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    assert!(daemon.log_lines("claim settled").is_empty(), "{}", daemon.log());

    let changed = config
        .set_in("nats.topic_map", "order.placed", format!("{}.moved", stream.prefix))
        .set_in("nats.topic_map", "lost", "nowhere")
        .set("nats.allow_headers", vec!["Nats-Colour"])
        .set("dispatcher.batch_size", 2)
        .set("dispatcher.max_attempts", 1)
        .set("dispatcher.backoff_initial", "20ms")
        .set("dispatcher.backoff_max", "1s")
        .set("logging.level", "debug");
    daemon.write_config(&changed);
    let line = reload(&daemon, "reloaded:");
    for key in [
        "dispatcher.batch_size",
        "dispatcher.max_attempts",
        "dispatcher.backoff_initial",
        "dispatcher.backoff_max",
        "nats.allow_headers",
        "nats.topic_map",
        "logging.level",
    ] {
        assert!(line.contains(key), "{key} is missing: {line}");
    }
    assert!(daemon.log_lines("restart needed").is_empty(), "{}", daemon.log());

    db.event_with("order.placed", metadata, "{}");
    db.events("order.packed", 20, 20);
    db.event("lost", "k", "{}");
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    let messages = stream.messages();
    assert_eq!(messages[0].subject, stream.subject("order.placed"));
    assert_eq!(messages[0].header("Nats-Colour"), None);
    let moved = messages.iter().find(|message| message.subject == stream.subject("moved")).unwrap();
    assert_eq!(moved.header("Nats-Colour"), Some("blue"));
    assert_eq!(db.dead(), 1, "one attempt is all there is now");
    assert!(daemon.log_lines("will retry").is_empty(), "{}", daemon.log());
    let claims = daemon.log_lines("claim settled: events=");
    assert!(claims.len() >= 10, "{claims:?}");
    let small = |line: &String| line.contains("events=1 ") || line.contains("events=2 ");
    assert!(claims.iter().all(small), "{claims:?}");

    reload(&daemon, "changed: nothing");
}

#[test]
fn what_takes_a_restart_is_named_at_every_reload() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream);
    let daemon = Daemon::start(&config);
    daemon.wait_ready();
    let changed = config
        .set("dispatcher.workers", 2)
        .set("nats.token", "t0ken")
        .set("database.dsn", "postgresql://u:hunter2@localhost/other")
        .set("metrics.path", "/elsewhere")
        .set_in("nats.topic_map", "order.placed", format!("{}.moved", stream.prefix));
    daemon.write_config(&changed);
    for _ in 0..2 {
        let line = reload(&daemon, "restart needed:");
        let (_, keys) = line.split_once("restart needed: ").unwrap();
        let expected = "dispatcher.workers, database.dsn, nats credentials, metrics.path changed in ";
        assert!(keys.starts_with(expected), "{line}");
    }
    wait_until("the second reload is over", LIMIT, &[&daemon], || daemon.log_lines("reloaded:").len() == 2);
    assert!(daemon.log_lines("reloaded:")[0].ends_with("changed: nats.topic_map"), "{}", daemon.log());
    assert!(daemon.log_lines("reloaded:")[1].ends_with("changed: nothing"), "{}", daemon.log());
    assert!(!daemon.log().contains("hunter2"));

    // Everything else goes on as it was: the database, the login, the metrics.
    db.event("order.placed", "k", "{}");
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    assert_eq!(stream.messages()[0].subject, stream.subject("moved"));
    assert_eq!(daemon.metric("outbox_events_published_total"), 1.0);
}

#[test]
fn a_bad_file_is_refused_whole_with_the_messages_of_a_start() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream);
    let daemon = Daemon::start(&config);
    daemon.wait_ready();
    let moved = config.set_in("nats.topic_map", "order.placed", format!("{}.moved", stream.prefix));
    daemon.write_config(&moved.clone().set("dispatcher.bach_size", 1).set("dispatcher.workers", 0));
    let summary = reload(&daemon, "problems=");
    assert!(summary.contains("problems=2; the configuration from before stays in force"), "{summary}");

    let start = pg_outbox().args(["run", "--config"]).arg(daemon.config()).output().unwrap();
    assert_eq!(start.status.code(), Some(78));
    let said = String::from_utf8(start.stderr).unwrap();
    let problems: Vec<&str> = said.lines().map(|line| line.trim_start_matches("pg-outbox: ")).collect();
    assert_eq!(problems.len(), 2, "{said}");
    for problem in problems {
        assert_eq!(daemon.log_lines(&format!("reload refused: {problem}")).len(), 1, "{}", daemon.log());
    }

    db.event("order.placed", "k", "{}");
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    assert_eq!(stream.messages()[0].subject, stream.subject("order.placed"), "nothing of the bad file holds");
    assert_eq!(daemon.get("/ready").0, 200);

    daemon.write_config(&moved);
    reload(&daemon, "changed: nats.topic_map");
    db.event("order.placed", "k", "{}");
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    assert_eq!(stream.messages()[1].subject, stream.subject("moved"));
}

#[test]
fn reloads_under_load_lose_nothing_and_keep_the_order() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream).set("logging.level", "info");
    let daemon = Daemon::start(&config);
    daemon.wait_ready();
    let written = AtomicBool::new(false);
    let history = thread::scope(|scope| {
        let reloads = scope.spawn(|| {
            let mut reloads = 0;
            while reloads < 10 || !written.load(Ordering::Relaxed) {
                reloads += 1;
                let subject = format!("{}.placed-{}", stream.prefix, reloads % 2);
                let size = [1, 7, 300][reloads % 3];
                daemon.write_config(
                    &config
                        .clone()
                        .set_in("nats.topic_map", "order.placed", subject)
                        .set("dispatcher.batch_size", size),
                );
                reload(&daemon, "reloaded:");
            }
        });
        let history = writers(&db.dsn, &Workload { events: 2_000, keys: 40, ..Workload::default() });
        written.store(true, Ordering::Relaxed);
        reloads.join().unwrap();
        history
    });
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    let messages = stream.messages();
    check_history(&history.committed, &messages).assert_clean();
    for name in ["placed-0", "placed-1"] {
        let subject = stream.subject(name);
        assert!(messages.iter().any(|message| message.subject == subject), "nothing went to {subject}");
    }
}
