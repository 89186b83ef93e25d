//! What the wake-up promises: no event waits for the poll, whatever the moment of its commit, and writers pay for it
//! only while somebody sleeps. The polls are a minute apart here, so that they help nobody.

use std::thread;
use std::time::{Duration, Instant};

use postgres::fallible_iterator::FallibleIterator;

use super::harness::{Config, Daemon, TestDb, TestStream, database, stream, wait_until};

const LIMIT: Duration = Duration::from_secs(30);
/// An event that is not published within this time was forgotten.
const SOON: Duration = Duration::from_secs(4);
/// Who has the sleep lock of this database.
const HOLDERS: &str = "SELECT count(*) FROM pg_locks
                        WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND granted AND classid = 1869968483
                          AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";

fn config(db: &TestDb, stream: &TestStream) -> Config {
    Config::new(db, stream).set("dispatcher.poll_interval", "60s").set("dispatcher.fallback_interval", "60s")
}

fn wait_asleep(db: &TestDb, daemon: &Daemon) {
    wait_until("it sleeps and holds the lock", LIMIT, &[daemon], || db.number(HOLDERS) == 1);
}

#[track_caller]
fn wait_published(db: &TestDb, daemon: &Daemon) {
    wait_until("everything is published", SOON, &[daemon, db], || db.pending() == 0);
}

#[test]
fn no_commit_falls_between_two_sleeps() {
    let (db, stream) = (database(), stream());
    let daemon = Daemon::start(&config(&db, &stream));
    wait_asleep(&db, &daemon);
    // Writers that insert and commit at any moment of a dispatcher that falls asleep and awakes all the time.
    for round in 0..20 {
        thread::scope(|scope| {
            for writer in 0..8 {
                let db = &db;
                scope.spawn(move || {
                    let mut client = db.client();
                    for n in 0..fastrand::u64(1..12) {
                        thread::sleep(Duration::from_micros(fastrand::u64(0..25_000)));
                        let mut transaction = client.transaction().unwrap();
                        let metadata = format!(r#"{{"ordering-key": "{writer}"}}"#);
                        let insert = "INSERT INTO outboxes (topic, metadata, payload)
                                      VALUES ('order.placed', $1::text::jsonb, '{}')";
                        transaction.execute(insert, &[&metadata]).unwrap();
                        if n % 3 == 0 {
                            thread::sleep(Duration::from_micros(fastrand::u64(0..25_000)));
                        }
                        transaction.commit().unwrap();
                    }
                });
            }
        });
        let committed = Instant::now();
        wait_published(&db, &daemon);
        println!("round {round}: all published {:?} after the last commit", committed.elapsed());
    }
}

#[test]
fn an_event_inserted_before_the_sleep_and_committed_in_it_wakes() {
    let (db, stream) = (database(), stream());
    let mut client = db.client();
    let mut writer = client.transaction().unwrap();
    writer.batch_execute("INSERT INTO outboxes (topic, payload) VALUES ('order.placed', '{}')").unwrap();
    let daemon = Daemon::start(&config(&db, &stream));
    wait_until("it asks for the lock", LIMIT, &[&daemon], || {
        db.number(&HOLDERS.replace("AND granted", "AND NOT granted")) == 1
    });
    writer.commit().unwrap();
    wait_published(&db, &daemon);
}

#[test]
fn a_lock_that_is_not_kept_to_the_end_of_the_transaction_would_not_do() {
    let (db, stream) = (database(), stream());
    // The same trigger, but for one thing: it lets go of the lock at once.
    db.execute(
        "CREATE OR REPLACE FUNCTION outbox_notify() RETURNS trigger LANGUAGE plpgsql AS $$
         DECLARE
             oid int := TG_RELID::int8::bit(32)::int4;
         BEGIN
             IF pg_try_advisory_lock_shared(1869968483, oid) THEN
                 PERFORM pg_advisory_unlock_shared(1869968483, oid);
             ELSE
                 PERFORM pg_notify('outbox_events', '');
             END IF;
             RETURN NULL;
         END $$",
    );
    let mut client = db.client();
    let mut writer = client.transaction().unwrap();
    writer.batch_execute("INSERT INTO outboxes (topic, payload) VALUES ('order.placed', '{}')").unwrap();
    let daemon = Daemon::start(&config(&db, &stream));
    wait_asleep(&db, &daemon);
    // It looks once more, and when a sample of the writers has come, perhaps again.
    thread::sleep(Duration::from_secs(3));
    writer.commit().unwrap();
    thread::sleep(SOON);
    assert_eq!(db.pending(), 1, "this event was expected to be forgotten until the poll");
}

#[test]
fn writers_notify_only_while_somebody_sleeps() {
    let (db, stream) = (database(), stream());
    db.execute(
        "DROP ROLE IF EXISTS wakeup_writer; CREATE ROLE wakeup_writer;
         GRANT INSERT ON outboxes TO wakeup_writer",
    );
    let mut listener = db.client();
    listener.batch_execute("LISTEN outbox_events").unwrap();
    let mut heard = || {
        // The answer to a query comes behind the notifications of all commits before it.
        listener.batch_execute("SELECT 1").unwrap();
        let mut notifications = listener.notifications();
        let heard = notifications.len();
        while notifications.iter().next().unwrap().is_some() {}
        heard > 0
    };
    let mut notified = || {
        heard();
        db.execute(
            "SET ROLE wakeup_writer; INSERT INTO outboxes (topic, payload) VALUES ('order.placed', '{}')",
        );
        heard()
    };
    assert!(!notified(), "nobody is there");
    let daemon = Daemon::start(&config(&db, &stream));
    wait_published(&db, &daemon);
    wait_asleep(&db, &daemon);
    assert!(notified(), "somebody sleeps");
    wait_published(&db, &daemon);
    // In an outage it does not wait for events.
    stream.delete();
    db.event("order.placed", "k", "{}");
    wait_until("it lets the lock go", LIMIT, &[&daemon], || db.number(HOLDERS) == 0);
    assert!(!notified(), "nobody waits for events");
    stream.create(&serde_json::json!({}));
    wait_until("the outage ends", LIMIT, &[&daemon, &db], || db.pending() == 0);
    drop(daemon);
    wait_until("the lock falls with its holder", LIMIT, &[], || db.number(HOLDERS) == 0);
    db.execute("DROP OWNED BY wakeup_writer; DROP ROLE wakeup_writer");
}

#[test]
fn when_the_one_that_sleeps_is_killed_another_takes_over() {
    let (db, stream) = (database(), stream());
    let config = config(&db, &stream).set("dispatcher.poll_interval", "1s");
    let mut first = Daemon::start(&config.clone().set("dispatcher.instance_id", "first"));
    wait_asleep(&db, &first);
    let second = Daemon::start(&config.set("dispatcher.instance_id", "second"));
    second.wait_ready();
    assert_eq!(db.number(HOLDERS), 1);
    first.kill();
    db.event("order.placed", "k", "{}");
    wait_published(&db, &second);
    wait_asleep(&db, &second);
    db.event("order.placed", "k", "{}");
    wait_published(&db, &second);
}

#[test]
fn when_the_session_of_the_lock_is_ended_a_new_one_is_made() {
    let (db, stream) = (database(), stream());
    let daemon = Daemon::start(&config(&db, &stream));
    for _ in 0..2 {
        wait_asleep(&db, &daemon);
        db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_locks
              WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND classid = 1869968483
                AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
        );
        db.event("order.placed", "k", "{}");
        wait_published(&db, &daemon);
    }
    wait_asleep(&db, &daemon);
    db.event("order.placed", "k", "{}");
    wait_published(&db, &daemon);
    assert!(!daemon.log_lines("wake-ups lost").is_empty());
}

#[test]
fn without_the_trigger_it_polls_and_says_so() {
    let (db, stream) = (database(), stream());
    db.execute("DROP TRIGGER outboxes_notify ON outboxes");
    let daemon = Daemon::start(&config(&db, &stream).set("dispatcher.poll_interval", "200ms"));
    wait_until("it says so", LIMIT, &[&daemon], || daemon.log().contains("outboxes_notify is missing"));
    db.event("order.placed", "k", "{}");
    wait_published(&db, &daemon);
}
