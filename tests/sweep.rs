//! The sweep: what claims have passed unlawfully is found and published, in order, and nothing else is taken for such.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::delivery::wait_drained;
use crate::harness::workload::writers_until;
use crate::harness::{
    Config, Daemon, TestDb, TestStream, Workload, check_history, database, stream, wait_until,
};

/// A pass begins ten seconds after the last one, and what it finds is judged a second later at the earliest.
const FIND_LIMIT: Duration = Duration::from_secs(60);
const FOUND: &str = "outbox_sweep_found_total";
const LAST_PASS: &str = "outbox_sweep_last_pass_timestamp_seconds";

fn config(db: &TestDb, stream: &TestStream) -> Config {
    Config::new(db, stream).set("partitions.sweep_rate", 100_000)
}

/// `n` events over three keys, all published, and marks that have passed them. Returns how many messages that makes.
fn published(db: &TestDb, stream: &TestStream, daemons: &[&Daemon], n: i64) -> usize {
    db.events("order.placed", n, 3);
    wait_drained(db, stream, daemons, FIND_LIMIT);
    let_marks_pass(db, || wait_drained(db, stream, daemons, FIND_LIMIT));
    stream.messages().len()
}

/// Some events of another key, with samples in between: by them the marks of all lanes rise.
fn let_marks_pass(db: &TestDb, drained: impl Fn()) {
    for _ in 0..3 {
        thread::sleep(Duration::from_millis(300));
        db.event("order.placed", "other", "{}");
        drained();
    }
}

/// Sets published events back to pending, one by one from the last to the first, so that they lie the other way round in the
/// table. They get fresh ids, or the stream would take them for duplicates.
fn set_back(db: &TestDb, first: i64, last: i64) {
    db.execute(&format!(
        "DO $$ BEGIN
             FOR n IN REVERSE {last} .. {first} LOOP
                 UPDATE outboxes SET published_at = NULL, attempts = 0, id = gen_random_uuid() WHERE seq = n;
             END LOOP;
         END $$"
    ));
}

/// Waits until as many events as these were found, and nothing is pending any more.
#[track_caller]
fn wait_found(db: &TestDb, daemon: &Daemon, events: f64) {
    wait_until("the sweep has found them", FIND_LIMIT, &[db, daemon], || daemon.metric(FOUND) >= events);
    wait_until("they are published", FIND_LIMIT, &[db, daemon], || db.pending() == 0);
}

/// Waits until a pass is over that began after now.
#[track_caller]
fn wait_next_pass(daemon: &Daemon) {
    for _ in 0..2 {
        let before = daemon.metric(LAST_PASS);
        wait_until("a pass is over", FIND_LIMIT, &[daemon], || daemon.metric(LAST_PASS) > before);
    }
}

/// The seqs of the messages of a key from the `skip`th message of the stream on.
fn seqs_of(stream: &TestStream, key: &str, skip: usize) -> Vec<i64> {
    let messages = stream.messages();
    let of_key = messages.iter().skip(skip).filter(|message| message.header("ordering-key") == Some(key));
    of_key.map(|message| message.header("Outbox-Seq").unwrap().parse().unwrap()).collect()
}

#[test]
fn events_set_back_to_pending_are_published_again_in_order() {
    let (db, stream) = (database(), stream());
    let daemon = Daemon::start(&config(&db, &stream));
    let before = published(&db, &stream, &[&daemon], 60);
    set_back(&db, 20, 50);
    wait_found(&db, &daemon, 3.0);
    assert_eq!(stream.messages().len(), before + 31);
    for key in ["k0", "k1", "k2"] {
        let again = seqs_of(&stream, key, before);
        assert!(again.is_sorted() && again.len() >= 10, "{key}: {again:?}");
    }
    let lines = daemon.log_lines("sweep found events that claims had passed: lane=");
    assert!((1..=3).contains(&lines.len()) && lines.iter().all(|line| line.contains("WARN")), "{lines:?}");
    // That was all, and said once.
    let found = daemon.metric(FOUND);
    wait_next_pass(&daemon);
    assert_eq!(daemon.metric(FOUND), found);
    assert_eq!(db.number("SELECT sum(sweeps) FROM outbox_lanes"), i64::try_from(lines.len()).unwrap());
}

#[test]
fn what_replication_inserts_below_the_marks_is_found() {
    let (db, stream) = (database(), stream());
    let daemon = Daemon::start(&config(&db, &stream));
    let before = published(&db, &stream, &[&daemon], 30);
    // An apply worker fires no trigger and draws no number.
    db.execute(
        "SET session_replication_role = replica;
         INSERT INTO outboxes (seq, topic, metadata, payload)
         SELECT seq, 'order.placed', '{\"ordering-key\": \"k1\"}', '{}' FROM generate_series(12, 3, -1) seq",
    );
    wait_found(&db, &daemon, 10.0);
    assert_eq!(seqs_of(&stream, "k1", before), (3..=12).collect::<Vec<i64>>());
}

#[test]
fn a_number_drawn_in_an_earlier_transaction_than_its_insert_is_found() {
    let (db, stream) = (database(), stream());
    let daemon = Daemon::start(&config(&db, &stream));
    let drawn = db.number("SELECT nextval('outboxes_seq_seq')");
    let before = published(&db, &stream, &[&daemon], 30);
    db.execute(&format!(
        "INSERT INTO outboxes (seq, topic, metadata, payload)
         VALUES ({drawn}, 'order.placed', '{{\"ordering-key\": \"k1\"}}', '{{}}')"
    ));
    let after = db.event("order.placed", "k1", "{}");
    wait_found(&db, &daemon, 1.0);
    assert_eq!(seqs_of(&stream, "k1", before), [after, drawn], "who draws so early has no order");
}

#[test]
fn an_event_moved_to_another_key_is_found() {
    let (db, stream) = (database(), stream());
    let daemon = Daemon::start(&config(&db, &stream));
    daemon.wait_ready();
    let held = db.event("order.placed", "a", "{}");
    wait_drained(&db, &stream, &[&daemon], FIND_LIMIT);
    db.execute(&format!(
        "UPDATE outboxes SET published_at = NULL, next_attempt_at = now() + interval '4 minutes' WHERE seq = {held}"
    ));
    let moved = db.event("order.placed", "a", "{}");
    let stays = db.event("order.placed", "a", "{}");
    let others_go = || {
        wait_until("the others are published", FIND_LIMIT, &[&db, &daemon], || db.pending() == 3);
    };
    db.events("order.placed", 500, 250);
    others_go();
    let_marks_pass(&db, others_go);
    db.execute(&format!("UPDATE outboxes SET metadata = '{{\"ordering-key\": \"b\"}}' WHERE seq = {moved}"));
    wait_until("it is published", FIND_LIMIT, &[&db, &daemon], || db.pending() == 2);
    assert_eq!(daemon.metric(FOUND), 1.0);
    assert_eq!(seqs_of(&stream, "b", 0), [moved]);
    // What waits behind the retry is no find.
    wait_next_pass(&daemon);
    assert_eq!((daemon.metric(FOUND), db.pending()), (1.0, 2));
    db.execute(&format!("UPDATE outboxes SET next_attempt_at = now() WHERE seq = {held}"));
    db.execute("NOTIFY outbox_events");
    wait_until("all is published", FIND_LIMIT, &[&db, &daemon], || db.pending() == 0);
    assert_eq!(seqs_of(&stream, "a", 1), [stays], "the first one is a duplicate to the stream");
    assert_eq!(daemon.metric(FOUND), 1.0);
}

#[test]
fn the_documented_way_by_hand_needs_no_sweep() {
    let (db, stream) = (database(), stream());
    let daemon = Daemon::start(&config(&db, &stream).set("partitions.sweep_rate", 0));
    let before = published(&db, &stream, &[&daemon], 30);
    db.execute(
        "BEGIN;
         SELECT FROM outbox_lanes WHERE lane = outbox_lane('order.placed', '{\"ordering-key\": \"k1\"}') FOR UPDATE;
         UPDATE outboxes SET published_at = NULL, next_attempt_at = now(), id = gen_random_uuid() WHERE seq IN (4, 7);
         NOTIFY outbox_events;
         COMMIT",
    );
    wait_until("they are published", Duration::from_secs(5), &[&db, &daemon], || db.pending() == 0);
    assert_eq!(seqs_of(&stream, "k1", before), [4, 7]);
    assert_eq!(daemon.metric(LAST_PASS), 0.0, "it is off");
}

#[test]
fn two_instances_begin_once_where_one_of_them_found_something() {
    let (db, stream) = (database(), stream());
    let config = config(&db, &stream);
    let [first, second] = Daemon::start_two(&config);
    for daemon in [&first, &second] {
        daemon.wait_ready();
    }
    let before = published(&db, &stream, &[&first, &second], 3_000);
    set_back(&db, 500, 700);
    let found = || first.metric(FOUND) + second.metric(FOUND);
    wait_until("the sweep has found them", FIND_LIMIT, &[&db, &first, &second], || found() >= 3.0);
    // New ones come meanwhile.
    for _ in 0..20 {
        db.events("order.placed", 30, 3);
    }
    wait_drained(&db, &stream, &[&first, &second], FIND_LIMIT);
    assert_eq!(stream.messages().len(), before + 201 + 600);
    for key in ["k0", "k1", "k2"] {
        let again: Vec<i64> = seqs_of(&stream, key, before).into_iter().filter(|seq| *seq <= 3_000).collect();
        assert!(again.is_sorted() && again.len() == 67, "{key}: {again:?}");
        let new: Vec<i64> = seqs_of(&stream, key, before).into_iter().filter(|seq| *seq > 3_000).collect();
        assert!(new.is_sorted() && new.len() == 200, "{key}: {new:?}");
    }
    let lines =
        [&first, &second].map(|daemon| daemon.log_lines("sweep found events that claims had passed").len());
    assert_eq!(db.number("SELECT sum(sweeps) FROM outbox_lanes"), (lines[0] + lines[1]) as i64);
    assert!(lines[0] + lines[1] <= 3, "{lines:?}: a lane each");
}

#[test]
fn a_lane_that_somebody_has_is_left_to_the_next_pass() {
    let (db, stream) = (database(), stream());
    let daemon = Daemon::start(&config(&db, &stream));
    published(&db, &stream, &[&daemon], 30);
    let mut operator = db.client();
    let lane = "lane = outbox_lane('order.placed', '{\"ordering-key\": \"k1\"}')";
    operator.batch_execute(&format!("BEGIN; SELECT FROM outbox_lanes WHERE {lane} FOR UPDATE")).unwrap();
    set_back(&db, 4, 4);
    wait_until("it gives the lane up", FIND_LIMIT, &[&daemon], || {
        !daemon.log_lines("sweep: somebody has lane=").is_empty()
    });
    assert_eq!((daemon.metric(FOUND), db.pending()), (0.0, 1));
    operator.batch_execute("COMMIT").unwrap();
    wait_found(&db, &daemon, 1.0);
}

#[test]
fn one_instance_at_a_time_sweeps() {
    let (db, stream) = (database(), stream());
    let mut other = db.client();
    other.batch_execute("BEGIN").unwrap();
    assert!(other.query_one(include_str!("../src/postgres/sweep_turn.sql"), &[]).unwrap().get::<_, bool>(0));
    let daemon = Daemon::start(&config(&db, &stream));
    wait_until("it finds the turn taken", FIND_LIMIT, &[&daemon], || {
        !daemon.log_lines("sweep skipped: another instance is at it").is_empty()
    });
    assert_eq!(daemon.metric(LAST_PASS), 0.0);
    other.batch_execute("COMMIT").unwrap();
    wait_until("it sweeps", FIND_LIMIT, &[&daemon], || daemon.metric(LAST_PASS) > 0.0);
}

/// The event appears below the mark of its lane, and nothing tells the claimer, which rests; but it will hear.
#[test]
fn an_event_whose_writer_has_just_ended_is_no_find() {
    let (db, stream) = (database(), stream());
    let rests = config(&db, &stream).set("dispatcher.fallback_interval", "60s");
    let daemon = Daemon::start(&rests);
    published(&db, &stream, &[&daemon], 30);
    let mut writer = db.client();
    // Without the trigger, which would wake the claimer.
    writer
        .batch_execute(
            "BEGIN; SET LOCAL session_replication_role = replica;
             INSERT INTO outboxes (topic, metadata, payload) VALUES ('order.placed', '{\"ordering-key\": \"k1\"}', '{}')",
        )
        .unwrap();
    // Until the writer is known for long enough that claims go on beyond its number.
    for _ in 0..2 {
        published(&db, &stream, &[&daemon], 3);
    }
    wait_next_pass(&daemon);
    writer.batch_execute("COMMIT").unwrap();
    assert_eq!(db.pending(), 1);
    wait_until("it is published", FIND_LIMIT, &[&db, &daemon], || db.pending() == 0);
    assert!(!daemon.log_lines("sweep judges what looks passed: events=1").is_empty(), "{}", daemon.log());
    assert_eq!(daemon.metric(FOUND), 0.0);
}

#[test]
fn an_event_set_back_behind_a_retry_waits_for_it() {
    let (db, stream) = (database(), stream());
    let daemon = Daemon::start(&config(&db, &stream));
    let before = published(&db, &stream, &[&daemon], 30);
    db.execute(
        "UPDATE outboxes SET published_at = NULL, id = gen_random_uuid(),
                             next_attempt_at = CASE seq WHEN 4 THEN now() + interval '4 minutes' END
          WHERE seq IN (1, 4, 7)",
    );
    wait_until("what is ahead of the retry is found", FIND_LIMIT, &[&db, &daemon], || db.pending() == 2);
    wait_next_pass(&daemon);
    assert_eq!((daemon.metric(FOUND), db.pending()), (1.0, 2));
    db.execute("UPDATE outboxes SET next_attempt_at = now() WHERE seq = 4; NOTIFY outbox_events");
    wait_until("all is published", FIND_LIMIT, &[&db, &daemon], || db.pending() == 0);
    assert_eq!(seqs_of(&stream, "k1", before), [1, 4, 7]);
}

/// Writers whose transactions stay open for a while, so that their events appear below what was read, and events that wait
/// behind a retry: each is below a mark and fresh for a moment, or for long, and lawfully so.
#[test]
fn nothing_is_found_under_load_where_nothing_was_passed() {
    let (db, stream) = (database(), stream());
    let config = config(&db, &stream);
    let [first, second] = Daemon::start_two(&config);
    for daemon in [&first, &second] {
        daemon.wait_ready();
    }
    db.event("order.placed", "held", "{}");
    wait_drained(&db, &stream, &[&first, &second], FIND_LIMIT);
    db.execute("UPDATE outboxes SET published_at = NULL, next_attempt_at = now() + interval '4 minutes'");
    let workload = Workload { events: 60_000, pause: Duration::from_millis(3), ..Workload::default() };
    let stop = AtomicBool::new(false);
    let history = thread::scope(|scope| {
        let writing = scope.spawn(|| writers_until(&db.dsn, &workload, &stop));
        let slow: Vec<_> = (0..4)
            .map(|writer| {
                let (db, stop) = (&db, &stop);
                scope.spawn(move || {
                    let mut client = db.client();
                    let key = if writer == 0 { "held".to_owned() } else { format!("slow-{writer}") };
                    let insert = format!(
                        "INSERT INTO outboxes (topic, metadata, payload)
                         VALUES ('slow', '{{\"ordering-key\": \"{key}\"}}', '{{}}')"
                    );
                    while !stop.load(Ordering::Relaxed) {
                        client
                            .batch_execute(&format!(
                                "BEGIN; {insert}; SELECT pg_sleep(0.15 * random()); COMMIT"
                            ))
                            .unwrap();
                    }
                })
            })
            .collect();
        // Passes come ten seconds apart.
        let passes = || first.log_lines("sweep is done").len() + second.log_lines("sweep is done").len();
        let before = passes();
        wait_until("there were some passes", 2 * FIND_LIMIT, &[&first, &second], || passes() >= before + 4);
        stop.store(true, Ordering::Relaxed);
        slow.into_iter().for_each(|writer| writer.join().unwrap());
        writing.join().unwrap()
    });
    let waiting =
        "SELECT count(*) FROM outboxes WHERE published_at IS NULL AND metadata ->> 'ordering-key' <> 'held'";
    wait_until("nothing is pending", FIND_LIMIT, &[&db, &first, &second], || db.number(waiting) == 0);
    assert!(db.pending() > 10, "some wait behind the retry");
    for daemon in [&first, &second] {
        assert_eq!(daemon.metric(FOUND), 0.0, "{:?}", daemon.log_lines("sweep found"));
    }
    let messages = stream.messages();
    let of_workload: Vec<_> = messages
        .into_iter()
        .filter(|message| message.header("Outbox-Topic") == Some("order.placed"))
        .skip(1)
        .collect();
    check_history(&history.committed, &of_workload).assert_clean();
}

#[test]
fn a_pass_takes_as_long_as_the_rate_says() {
    let (db, stream) = (database(), stream());
    db.execute(
        "INSERT INTO outboxes (topic, payload, published_at)
         SELECT 'order.placed', jsonb_build_object('x', repeat('x', 1000)), now() FROM generate_series(1, 3000)",
    );
    let blocks = db.number(
        "SELECT (sum(pg_relation_size(inhrelid)) / 8192)::int8 FROM pg_inherits WHERE inhparent = 'outboxes'::regclass",
    );
    assert!((350..800).contains(&blocks), "{blocks}");
    let rate = 100;
    let daemon = Daemon::start(&config(&db, &stream).set("partitions.sweep_rate", rate));
    wait_until("a pass begins", FIND_LIMIT, &[&daemon], || !daemon.log_lines("sweep begins").is_empty());
    let begun = Instant::now();
    wait_until("it is over", FIND_LIMIT, &[&daemon], || daemon.metric(LAST_PASS) > 0.0);
    let (took, least) = (begun.elapsed().as_secs_f64(), blocks as f64 / f64::from(rate));
    assert!(took >= least - 0.5, "{blocks} blocks in {took:.1} s");
    assert!(took < 4.0 * least + 10.0, "{blocks} blocks in {took:.1} s");
}

#[test]
fn a_partition_tells_whether_it_was_written() {
    let db = database();
    let store = crate::claim::store(&db);
    let month = "SELECT to_char(now() AT TIME ZONE 'UTC', '\"outboxes_\"YYYY\"_\"MM')";
    let month: String = db.client().query_one(month, &[]).unwrap().get(0);
    let written = || {
        let mut partitions = store.sweep().unwrap().partitions().unwrap();
        partitions.sort_by_key(|partition| partition.name != month);
        partitions
    };
    let before = written();
    assert_eq!(before[0].name, month);
    assert_eq!(
        before.last().unwrap().name,
        "outboxes_default".to_owned().max(before.last().unwrap().name.clone())
    );
    assert_eq!(written(), before);
    for write in [
        "INSERT INTO outboxes (topic, payload) VALUES ('a', '{}')",
        "UPDATE outboxes SET published_at = now()",
        "DELETE FROM outboxes",
    ] {
        let before = written();
        // A session counts at its end, at the latest.
        db.execute(write);
        wait_until("it shows", FIND_LIMIT, &[&db], || written()[0] != before[0]);
        assert_eq!(written()[1..], before[1..], "{write}");
    }
    let before = written();
    db.execute("SELECT pg_stat_reset()");
    wait_until("it shows", FIND_LIMIT, &[&db], || written()[0] != before[0]);
}
